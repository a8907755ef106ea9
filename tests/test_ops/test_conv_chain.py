"""Chains of convolutions, against the ops that they are made of."""

import pytest
import torch
from support.layers import assert_same_bits, exact_numerics

from mmactnn import ops

SEED = 5
GROUP_SIZE = 64
GEOMETRIES = [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 2), 2)]


def make_link(channels, geometry, kernel, follows, dtype, device):
    """Parameters, buffers, plan and settings of a convolution."""
    of_batch = follows is ops.Follows.NORM_RELU
    scale = torch.rand(channels, device=device) + 0.5
    shift = torch.randn(channels, device=device)
    norm = follows in (ops.Follows.NORM, ops.Follows.NORM_RELU)
    size = channels, channels // geometry[3], *kernel
    weight = torch.randn(size, device=device, dtype=dtype) / 4
    bias = torch.randn(channels, device=device, dtype=dtype)
    parameters = [weight, bias, scale, shift] if norm else [weight, bias]
    buffers = [shift.clone(), scale.clone()] if norm else [None, None]
    return (
        parameters + [None] * (4 - len(parameters)),
        [*buffers, None],
        ops.plan_link(*geometry, follows, of_batch, (3, 0, GROUP_SIZE)),
        [0.1, 1e-5],
    )


def run_ops(x, residual, links):
    """The forward pass, op by op: output and what each returned."""
    kept, inputs = [], [x]
    for i, (parameters, buffers, plan, settings) in enumerate(links):
        weight, bias, scale, shift = parameters
        dims = plan[0]
        stride, padding, dilation = (
            tuple(plan[1 + k * dims : 1 + (k + 1) * dims]) for k in range(3)
        )
        groups, follows, of_batch, bits, act_bits, _ = plan[1 + 3 * dims :]
        x = torch.convolution(
            x,
            weight,
            bias,
            stride,
            padding,
            dilation,
            False,
            (0,) * dims,
            groups,
        )
        random = dict(seed=SEED, offset=7 + i)
        if follows == ops.Follows.RELU:
            x, *codes = ops.relu_codes(x, bits, GROUP_SIZE, **random)
        elif follows != ops.Follows.NOTHING:
            copies = [None if b is None else b.clone() for b in buffers]
            x, invstd, codes = ops.batch_norm_act(
                x,
                residual if i == len(links) - 1 else None,
                scale,
                shift,
                ops.NormSettings(*copies, bool(of_batch), *settings),
                follows == ops.Follows.NORM_RELU,
                bits,
                act_bits,
                GROUP_SIZE,
                **random,
            )
            codes = [invstd, *codes]
        else:
            codes = []
        kept += codes
        inputs.append(x)
    return x, kept


def run_chain(x, residual, links):
    flat = [[item for link in links for item in link[k]] for k in range(4)]
    return ops.conv_chain(x, residual, *flat, seed=SEED, offset=7)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize(
    'names',
    [
        ['RELU'],
        ['NORM'],
        ['NORM_RELU', 'RELU', 'NOTHING'],
        ['RELU', 'NORM_RELU', 'NORM'],
    ],
)
def test_forward_is_that_of_the_ops(names, dtype, channels_last, device):
    x = torch.randn(3, 8, 9, 7, device=device, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    links = [
        make_link(
            8, GEOMETRIES[i % 2], (1, 3), ops.Follows[name], dtype, device
        )
        for i, name in enumerate(names)
    ]
    with exact_numerics():
        expected, expected_kept = run_ops(x, None, links)
        output, kept, layouts = run_chain(x, None, links)
    assert_same_bits(output, expected)
    assert output.stride() == expected.stride()
    assert len(kept) == len(expected_kept)
    for found, tensor in zip(kept, expected_kept):
        assert_same_bits(found, tensor)
    # Of the input and each output: dimensions, shape and strides.
    assert len(layouts) == (len(links) + 1) * 9
    assert layouts[:9] == [4, *x.shape, *x.stride()]
    assert layouts[-9:] == [4, *output.shape, *output.stride()]


@pytest.mark.parametrize('strided', [False, True])
def test_gradients_are_those_of_what_is_decoded(strided, device):
    x = torch.randn(3, 8, 9, 7, device=device)
    links = [
        make_link(
            8,
            GEOMETRIES[0],
            (1, 1),
            ops.Follows[name],
            torch.float32,
            device,
        )
        for name in ('RELU', 'RELU', 'NOTHING')
    ]
    parameters = [p for link in links for p in link[0]]
    plan = [number for link in links for number in link[2]]
    output, kept, layouts = run_chain(x, None, links)
    codes, ranges = ops.quantize(x, 8, GROUP_SIZE, seed=SEED)
    grad = torch.randn_like(output)
    if strided:
        grad = grad.contiguous(memory_format=torch.channels_last)
    format = _Format(torch.float32, 8, GROUP_SIZE, 'plain')
    found = ops.conv_chain_backward(
        grad,
        (format, (codes, ranges)),
        parameters,
        kept,
        layouts,
        plan,
        [p is not None for p in parameters],
        True,
        False,
        True,
    )
    # In float64, of the values that the codes stand for.
    layout = x.shape, x.stride(), torch.float32
    values = [ops.dequantize(codes, ranges, *layout, 8, GROUP_SIZE)]
    for i in (0, 2):
        values.append(
            ops.dequantize_zeroed(*kept[i : i + 2], *layout, 3, GROUP_SIZE)
        )
    expected = [None] * len(parameters)
    grad = grad.double()
    for i in (2, 1, 0):
        weight, bias = (p.double() for p in parameters[4 * i : 4 * i + 2])
        if i < 2:
            grad = grad * (values[i + 1] != 0)
        if i == 0:
            first = grad
        expected[4 * i + 1] = grad.sum((0, 2, 3))
        expected[4 * i] = torch.einsum(
            'nohw,nihw->oi', grad, values[i].double()
        )[:, :, None, None]
        grad = torch.einsum('nohw,oi->nihw', grad, weight[:, :, 0, 0])
    for tensor, wanted in zip(found, [grad, None, first, *expected]):
        if wanted is None:
            assert tensor is None
            continue
        error = (tensor.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if device.type == 'cpu' else 2e-3)


class _Format:
    """As much of a payload's format as the op wants."""

    def __init__(self, dtype, bits, group_size, kind):
        self.dtype, self.bits = dtype, bits
        self.group_size, self.kind = group_size, kind


def test_what_is_not_wanted_is_not_computed():
    x = torch.randn(3, 8, 9, 7)
    link = make_link(
        8, GEOMETRIES[0], (1, 1), ops.Follows.RELU, torch.float32, 'cpu'
    )
    output, kept, layouts = run_chain(x, None, [link])
    codes = ops.quantize(x, 2, GROUP_SIZE, seed=SEED)
    format = _Format(torch.float32, 2, GROUP_SIZE, 'plain')
    needs = [True, False, False, False]
    grads = ops.conv_chain_backward(
        output,
        (format, codes),
        link[0],
        kept,
        layouts,
        link[2],
        needs,
        False,
        False,
        False,
    )
    assert [g is not None for g in grads] == [False] * 3 + needs


def test_errors():
    x = torch.randn(3, 8, 9, 7)
    parameters, buffers, plan, settings = make_link(
        8, GEOMETRIES[0], (1, 1), ops.Follows.RELU, torch.float32, 'cpu'
    )

    def run(
        x=x,
        residual=None,
        parameters=parameters,
        buffers=buffers,
        plan=plan,
        settings=settings,
    ):
        return ops.conv_chain(
            x, residual, parameters, buffers, plan, settings, seed=SEED
        )

    run()
    with pytest.raises(RuntimeError, match='plan is shorter'):
        run(plan=plan[:-1])
    with pytest.raises(RuntimeError, match='parameters must be 4 for each'):
        run(parameters=parameters[:-1])
    with pytest.raises(RuntimeError, match='buffers and settings must be 3'):
        run(buffers=buffers[:-1])
    with pytest.raises(RuntimeError, match='must have a weight'):
        run(parameters=[None, *parameters[1:]])
    with pytest.raises(RuntimeError, match='residual must be followed'):
        run(residual=x)
    with pytest.raises(RuntimeError, match='aten::convolution failed'):
        run(x=x[:, :3])


def test_out_of_memory_has_its_class():
    if not torch.cuda.is_available():
        pytest.skip('no GPU is available')
    if torch.__version__ < (2, 13):
        pytest.skip('torch does not tell the reason before 2.13')
    x = torch.randn(64, 8, 64, 64, device='cuda')
    link = make_link(
        8, GEOMETRIES[0], (1, 1), ops.Follows.RELU, torch.float32, 'cuda'
    )
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((used + 2**20) / total, 0)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run_chain(x, None, [link])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
