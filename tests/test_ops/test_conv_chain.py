"""Chains of convolutions, against the ops that they are made of."""

import itertools

import pytest
import torch
from support.layers import assert_same_bits, exact_numerics
from support.opcheck import opcheck
from support.roundings import encoding

from mmactnn import ops

SEED = 5
GROUP_SIZE = 256
GEOMETRIES = [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 2), 2)]


INPUT = ops.source_of_input(0)


def make_layer(channels, kernel, epilogue, dtype, device, groups=1):
    """Parameters and buffers of a convolution and its epilogue."""
    scale = torch.rand(channels, device=device) + 0.5
    shift = torch.randn(channels, device=device)
    norm = epilogue in (ops.Epilogue.NORM, ops.Epilogue.NORM_RELU)
    size = channels, channels // groups, *kernel
    weight = torch.randn(size, device=device, dtype=dtype) / 4
    bias = torch.randn(channels, device=device, dtype=dtype)
    parameters = [weight, bias, scale, shift] if norm else [weight, bias]
    buffers = [shift.clone(), scale.clone()] if norm else [None, None]
    return parameters + [None] * (4 - len(parameters)), [*buffers, None]


def make_step(epilogue, source=INPUT, layer=0, residual=None, geometry=None):
    use_batch_stats = epilogue is ops.Epilogue.NORM_RELU
    act_bits = 0 if residual is None else 2
    return ops.ChainStep(
        source,
        residual,
        layer,
        *(geometry or GEOMETRIES[0]),
        epilogue,
        use_batch_stats,
        3,
        act_bits,
        GROUP_SIZE,
    )


def make_plan(steps, layers):
    return ops.ChainPlan.of(steps, [0.1, 1e-5] * layers)


def run_ops(inputs, steps, layers, rounding='dither'):
    """The forward pass, op by op: all outputs and what each returned."""
    kept, outputs, draws = [], [], iter(range(7, 99))
    for step in steps:
        (weight, bias, scale, shift), buffers = layers[step.layer]

        def read(source):
            pool = inputs if ops.is_input(source) else outputs
            return pool[~source if ops.is_input(source) else source]

        x = torch.convolution(
            read(step.source),
            weight,
            bias,
            step.stride,
            step.padding,
            step.dilation,
            False,
            (0,) * len(step.stride),
            step.groups,
        )
        codes = []
        if step.epilogue is ops.Epilogue.RELU:
            random = encoding(rounding, SEED, next(draws))
            x, *codes = ops.relu_codes(x, step.bits, GROUP_SIZE, **random)
        elif step.epilogue is not ops.Epilogue.NONE:
            x, invstd, codes = ops.batch_norm_act(
                x,
                None if step.residual is None else read(step.residual),
                scale,
                shift,
                ops.NormSettings(*buffers, step.use_batch_stats, 0.1, 1e-5),
                step.epilogue is ops.Epilogue.NORM_RELU,
                step.bits,
                step.act_bits,
                GROUP_SIZE,
                **encoding(rounding, SEED, next(draws)),
            )
            codes = [invstd, *codes]
        kept += codes
        outputs.append(x)
    return outputs, kept


def flatten(layers):
    """All parameters, all buffers."""
    return [[t for layer in layers for t in layer[k]] for k in range(2)]


def run_chain(
    inputs, steps, layers, formats=ops.NOT_ENCODED, rounding='dither'
):
    parameters, buffers = flatten(layers)
    return ops.conv_chain(
        inputs,
        parameters,
        buffers,
        make_plan(steps, len(layers)),
        formats,
        seed=SEED,
        offset=7,
        rotated=rounding == 'rotated',
    )


def run_backward(
    grads,
    made,
    steps,
    layers,
    needs=None,
    needs_inputs=(True,),
    observed=False,
    draws=(),
):
    """Run the backward pass, for all parameters unless ``needs`` is given.

    ``made`` are codes and formats of inputs, kept tensors and layouts.
    """
    codes, formats, kept, layouts = made
    parameters, _ = flatten(layers)
    if needs is None:
        needs = [p is not None for p in parameters]
    return ops.conv_chain_backward(
        grads,
        codes,
        formats,
        parameters,
        kept,
        layouts,
        make_plan(steps, len(layers)),
        needs,
        needs_inputs,
        True,
        observed,
        torch.float32,
        [
            number
            for draw in draws
            for number in (draw.numbers if draw else ops.NOT_DRAWN)
        ],
    )


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize(
    'names',
    [
        ['RELU'],
        ['NORM'],
        ['NORM_RELU', 'RELU', 'NONE'],
        ['RELU', 'NORM_RELU', 'NORM'],
    ],
)
@pytest.mark.parametrize('rounding', ['dither', 'rotated'])
def test_forward_is_that_of_the_ops(
    rounding, names, dtype, channels_last, device
):
    x = torch.randn(3, 8, 8, 16, device=device, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layers, steps = [], []
    for i, name in enumerate(names):
        epilogue, geometry = ops.Epilogue[name], GEOMETRIES[i % 2]
        layers.append(
            make_layer(8, (1, 3), epilogue, dtype, device, geometry[3])
        )
        source = i - 1 if i else INPUT
        steps.append(make_step(epilogue, source, i, None, geometry))
    with exact_numerics():
        (*_, expected), expected_kept = run_ops(
            [x], steps, clone(layers), rounding
        )
        (output,), codes, kept, layouts = run_chain(
            [x], steps, layers, rounding=rounding
        )
    assert_same_bits(output, expected)
    assert output.stride() == expected.stride()
    assert codes == []
    assert len(kept) == len(expected_kept)
    for found, tensor in zip(kept, expected_kept):
        assert_same_bits(found, tensor)
    # Dimensions, shape and strides of the input and each output.
    layouts = layouts.tolist()
    assert len(layouts) == (len(steps) + 1) * 9
    assert layouts[:9] == [4, *x.shape, *x.stride()]
    assert layouts[-9:] == [4, *output.shape, *output.stride()]


def clone(layers):
    return [
        tuple([t if t is None else t.clone() for t in part] for part in layer)
        for layer in layers
    ]


# A block of a residual network with a convolution in its shortcut, another
# one behind it, and two convolutions that read what that returns.
BLOCKS = [
    ('NORM', INPUT, None),
    ('NORM_RELU', INPUT, None),
    ('NORM_RELU', 1, 0),
    ('NORM_RELU', 2, None),
    ('NORM_RELU', 3, 2),
    ('NONE', 4, None),
    ('RELU', 4, None),
]


def make_blocks(device):
    steps = [
        make_step(ops.Epilogue[name], source, i, residual)
        for i, (name, source, residual) in enumerate(BLOCKS)
    ]
    layers = [
        make_layer(8, (1, 1), step.epilogue, torch.float32, device)
        for step in steps
    ]
    return steps, layers


def test_links_that_branch_and_join(device):
    x = torch.randn(3, 8, 9, 7, device=device)
    steps, layers = make_blocks(device)
    with exact_numerics():
        expected, expected_kept = run_ops([x], steps, clone(layers))
        outputs, _, kept, _ = run_chain([x], steps, layers)
    assert len(outputs) == 2
    for found, tensor in zip(outputs, expected[-2:]):
        assert_same_bits(found, tensor)
    assert len(kept) == sum(step.num_saved for step in steps)
    for found, tensor in zip(kept, expected_kept):
        assert_same_bits(found, tensor)


def test_layers_that_run_for_two_inputs(device):
    inputs = [torch.randn(3, 8, n, n, device=device) for n in (9, 5)]
    layers = [
        make_layer(8, (1, 1), epilogue, torch.float32, device)
        for epilogue in (ops.Epilogue.NORM_RELU, ops.Epilogue.NONE)
    ]
    steps = [
        make_step(ops.Epilogue.NORM_RELU, ops.source_of_input(0), 0),
        make_step(ops.Epilogue.NONE, 0, 1),
        make_step(ops.Epilogue.NORM_RELU, ops.source_of_input(1), 0),
        make_step(ops.Epilogue.NONE, 2, 1),
    ]
    twins = clone(layers)
    with exact_numerics():
        expected, _ = run_ops(inputs, steps, twins)
        outputs, *_ = run_chain(inputs, steps, layers, ops.NOT_ENCODED * 2)
    assert_same_bits(outputs[0], expected[1])
    assert_same_bits(outputs[1], expected[3])
    # One batch after the other.
    for found, tensor in zip(layers[0][1][:2], twins[0][1][:2]):
        assert_same_bits(found, tensor)


@pytest.mark.parametrize('rounding', ['dither', 'rotated'])
@pytest.mark.parametrize('kind', ['PLAIN', 'ROWS'])
def test_inputs_that_are_encoded(kind, rounding, device):
    x = torch.randn(3, 8, 8, 8, device=device)
    layer = make_layer(8, (1, 1), ops.Epilogue.RELU, torch.float32, device)
    # Two read it, and it is encoded once.
    steps = [make_step(ops.Epilogue.RELU), make_step(ops.Epilogue.RELU)]
    bits = 2 if kind == 'PLAIN' else 8
    format = ops.Encoding(ops.PayloadKind[kind], bits, GROUP_SIZE)
    outputs, codes, kept, _ = run_chain([x], steps, [layer], format, rounding)
    random = encoding(rounding, SEED, 7)
    if kind == 'PLAIN':
        expected = ops.quantize(x, 2, GROUP_SIZE, **random)
    else:
        widths = ops.allocate_sample_bits(
            ops.sample_range_energy(x, GROUP_SIZE), 8
        )
        expected = ops.quantize_rows(x, *widths, 8, GROUP_SIZE, **random)
        expected = *expected, *widths
    assert len(codes) == format.num_tensors == len(expected)
    for found, tensor in zip(codes, expected):
        assert_same_bits(found, tensor)
    x, *wanted = ops.relu_codes(
        torch.nn.functional.conv2d(x, *layer[0][:2]),
        3,
        GROUP_SIZE,
        **encoding(rounding, SEED, 9),
    )
    assert_same_bits(kept[2], wanted[0])
    assert_same_bits(outputs[1], x)


@pytest.mark.parametrize('rounding', ops.ROUNDINGS)
@pytest.mark.parametrize('kind', ['PLAIN', 'ROWS'])
def test_gradients_are_those_of_what_is_decoded(kind, rounding, device):
    """In float64, of the values that the codes stand for.

    Those of the codes alone for strided gradients.
    """
    strided = rounding == 'stochastic'
    inputs = [torch.randn(3, 8, 8, 8, device=device) for _ in range(2)]
    names = ['RELU', 'RELU', 'NONE']
    layers = [
        make_layer(8, (1, 1), ops.Epilogue[name], torch.float32, device)
        for name in names
    ]
    steps = [
        make_step(
            ops.Epilogue[name],
            3 * n + i - 1 if i else ops.source_of_input(n),
            i,
        )
        for n in range(2)
        for i, name in enumerate(names)
    ]
    # Of 3 samples.
    bits = 2 if kind == 'PLAIN' else 9
    formats = ops.Encoding(ops.PayloadKind[kind], bits, GROUP_SIZE) * 2
    outputs, codes, kept, layouts = run_chain(
        inputs, steps, layers, formats, rounding
    )
    grads = [torch.randn_like(output) for output in outputs]
    if strided:
        grads = [
            g.contiguous(memory_format=torch.channels_last) for g in grads
        ]
    parameters, _ = flatten(layers)
    offsets = ops.find_offsets(steps, (True, True))
    draws = [
        ops.DrawnBits.of(rounding, SEED, 7 + offset)
        for part in offsets
        for offset in part
    ]
    found = run_backward(
        grads,
        (codes, formats, kept, layouts),
        steps,
        layers,
        needs_inputs=[True, True],
        observed=True,
        draws=draws,
    )
    layout = inputs[0].shape, inputs[0].stride(), torch.float32
    expected = [0] * len(parameters)
    wanted = [None, None, None]
    for n, grad in enumerate(grads):
        own = codes[len(codes) // 2 * n :]
        if kind == 'PLAIN':
            values = [
                ops.dequantize(
                    *own[:2], *layout, bits, GROUP_SIZE, drawn=draws[n]
                )
            ]
        else:
            values = [
                ops.dequantize_rows(
                    *own[:4], *layout, GROUP_SIZE, drawn=draws[n]
                )
            ]
        for i in (0, 1):
            zeroed = kept[4 * n + 2 * i : 4 * n + 2 * i + 2]
            random = dict(drawn=draws[2 + 3 * n + i])
            values.append(
                ops.dequantize_zeroed(
                    *zeroed, *layout, 3, GROUP_SIZE, **random
                )
            )
        grad = grad.double()
        for i in (2, 1, 0):
            weight = parameters[4 * i].double()[:, :, 0, 0]
            if i < 2:
                ones = torch.ones_like(values[i + 1])
                grad = grad * ops.relu_codes_backward(
                    ones, kept[4 * n + 2 * i], 3, rounding == 'rotated'
                )
            if n == 0 and i == 0:
                wanted[2] = grad
            expected[4 * i + 1] += grad.sum((0, 2, 3))
            expected[4 * i] += torch.einsum(
                'nohw,nihw->oi', grad, values[i].double()
            )[:, :, None, None]
            grad = torch.einsum('nohw,oi->nihw', grad, weight)
        wanted[n] = grad
    compare(found, [*wanted, *expected], device)


def compare(found, wanted, device):
    assert len(found) == len(wanted)
    for tensor, expected in zip(found, wanted):
        if expected is None or isinstance(expected, int):
            assert tensor is None
            continue
        error = (tensor.double() - expected).norm() / expected.norm()
        assert error < (1e-5 if device.type == 'cpu' else 2e-3)


def test_gradients_of_links_that_branch_and_join(device):
    """Against torch's graph of the same layers, at 8 bits."""
    x = torch.randn(3, 8, 9, 7, device=device)
    steps, layers = make_blocks(device)
    steps = [
        step._replace(
            bits=8, act_bits=step.act_bits and 8, use_batch_stats=True
        )
        for step in steps
    ]
    format = ops.Encoding(ops.PayloadKind.PLAIN, 8, GROUP_SIZE)
    parameters, _ = flatten(layers)
    with exact_numerics():
        outputs, codes, kept, layouts = run_chain([x], steps, layers, format)
        grads = [torch.randn_like(output) for output in outputs]
        found = run_backward(
            grads, (codes, format, kept, layouts), steps, layers
        )
    leaf = x.double().requires_grad_()
    leaves = [
        None if p is None else p.double().requires_grad_() for p in parameters
    ]
    made = []
    for i, step in enumerate(steps):
        weight, bias, scale, shift = leaves[4 * i : 4 * i + 4]
        read = leaf if ops.is_input(step.source) else made[step.source]
        y = torch.nn.functional.conv2d(read, weight, bias)
        if scale is not None:
            y = torch.nn.functional.batch_norm(
                y, None, None, scale, shift, True
            )
        if step.residual is not None:
            y = y + made[step.residual]
        if step.epilogue in (ops.Epilogue.RELU, ops.Epilogue.NORM_RELU):
            y = y.relu()
        made.append(y)
    torch.autograd.backward(made[-2:], [g.double() for g in grads])
    for tensor, expected in zip(found[2:], leaves):
        if expected is None:
            assert tensor is None
            continue
        # Gradients of biases before a normalisation are zero.
        scale = expected.grad.norm() + 4
        assert (tensor.double() - expected.grad).norm() / scale < 0.03
    assert found[1] is None
    assert (found[0].double() - leaf.grad).norm() / leaf.grad.norm() < 0.03


def test_what_is_not_wanted_is_not_computed():
    x = torch.randn(3, 8, 9, 7)
    layer = make_layer(8, (1, 1), ops.Epilogue.RELU, torch.float32, 'cpu')
    steps = [make_step(ops.Epilogue.RELU)]
    format = ops.Encoding(ops.PayloadKind.PLAIN, 2, GROUP_SIZE)
    (output,), codes, kept, layouts = run_chain([x], steps, [layer], format)
    for needs in ([True, False], [False, True], [False, False]):
        grads = run_backward(
            [output],
            (codes, format, kept, layouts),
            steps,
            [layer],
            needs=[*needs, False, False],
            needs_inputs=[False],
        )
        wanted = [False, False, *needs, False, False]
        assert [g is not None for g in grads] == wanted


def test_outputs_without_gradients():
    x = torch.randn(3, 8, 9, 7)
    steps, layers = make_blocks('cpu')
    format = ops.Encoding(ops.PayloadKind.PLAIN, 2, GROUP_SIZE)
    outputs, codes, kept, layouts = run_chain([x], steps, layers, format)
    parameters, _ = flatten(layers)
    grads = run_backward(
        [outputs[0], None], (codes, format, kept, layouts), steps, layers
    )
    # But for those of the last layer alone.
    assert [g is not None for g in grads[2:-4]] == [
        p is not None for p in parameters[:-4]
    ]
    assert grads[-4:] == [None] * 4


def peak_bytes(function):
    """Most bytes of the CPU's memory that a function holds at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each has workspaces of its own
    try:
        with torch.profiler.profile(profile_memory=True) as profiler:
            function()
    finally:
        torch.set_num_threads(threads)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == '[memory]':
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_outputs_are_released():
    """Tensors that only the chain reads are freed before it ends."""
    x = torch.randn(2, 8, 256, 256)
    steps = [
        make_step(ops.Epilogue.RELU, i - 1 if i else INPUT, 0)
        for i in range(16)
    ]
    layer = make_layer(8, (1, 1), ops.Epilogue.RELU, torch.float32, 'cpu')
    peak = peak_bytes(lambda: run_chain([x], steps, [layer]))
    # One that is read, one that is written, and codes of all.
    assert 2 * x.nbytes <= peak < 5 * x.nbytes


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('needs_weight', [False, True])
def test_large_inputs(needs_weight, channels_last, device):
    """The gradients of large inputs are computed on their own."""
    x = torch.randn(3, 64, 264, 264, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    epilogue = ops.Epilogue.NONE
    layer = make_layer(8, (1, 1), epilogue, x.dtype, device, groups=8)
    layer[0][0] = torch.randn(8, 8, 1, 1, device=device)
    geometry = ((1, 1), (0, 0), (1, 1), 8)
    steps = [make_step(epilogue, geometry=geometry)]
    format = ops.Encoding(ops.PayloadKind.PLAIN, 2, GROUP_SIZE)
    weight, bias = layer[0][:2]
    with exact_numerics():
        (output,), codes, kept, layouts = run_chain(
            [x], steps, [layer], format
        )
        grad = torch.randn_like(output)
        found = run_backward(
            [grad],
            (codes, format, kept, layouts),
            steps,
            [layer],
            needs=[needs_weight, True, False, False],
        )
        decoded = ops.dequantize(
            *codes, x.shape, x.stride(), x.dtype, 2, GROUP_SIZE
        )
        expected = torch.ops.aten.convolution_backward.default(
            grad,
            decoded,
            weight,
            [8],
            *geometry[:3],
            False,
            [0, 0],
            8,
            [True, True, True],
        )
    assert found[1] is None
    assert found[0].stride() == x.stride()
    wanted = (expected[0], expected[1] if needs_weight else None, expected[2])
    for tensor, value in zip((found[0], *found[2:]), wanted):
        if value is None:
            assert tensor is None
        else:
            torch.testing.assert_close(tensor, value, rtol=1e-4, atol=1e-3)


def test_errors():
    x = torch.randn(3, 8, 9, 7)
    epilogue = ops.Epilogue.RELU
    parameters, buffers = make_layer(8, (1, 1), epilogue, torch.float32, 'cpu')
    step = make_step(epilogue)

    def run(
        x=x,
        parameters=parameters,
        buffers=buffers,
        steps=(step,),
        plan=None,
        formats=ops.NOT_ENCODED,
    ):
        plan = plan or make_plan(steps, 1)
        return ops.conv_chain(
            [x], parameters, buffers, plan, formats, seed=SEED
        )

    run()
    plan = make_plan([step], 1)
    with pytest.raises(RuntimeError, match='plan is shorter'):
        run(plan=plan._replace(numbers=plan.numbers[:-1]))
    with pytest.raises(RuntimeError, match='settings is shorter'):
        run(plan=plan._replace(settings=plan.settings[:-1]))
    with pytest.raises(RuntimeError, match='plan must have a convolution'):
        run(plan=plan._replace(numbers=plan.numbers[:0]))
    with pytest.raises(RuntimeError, match='parameters must be 4 for each'):
        run(parameters=parameters[:-1])
    with pytest.raises(RuntimeError, match='buffers must be 3'):
        run(buffers=buffers[:-1])
    with pytest.raises(RuntimeError, match='must have a weight'):
        run(parameters=[None, *parameters[1:]])
    with pytest.raises(RuntimeError, match='must be followed by a ReLU'):
        run(steps=[step._replace(residual=INPUT)])
    with pytest.raises(RuntimeError, match='one of the inputs or a step'):
        run(steps=[step._replace(source=0)])
    with pytest.raises(RuntimeError, match='one of the inputs or a step'):
        run(steps=[step._replace(source=ops.source_of_input(1))])
    with pytest.raises(RuntimeError, match='must be of one of 1 layers'):
        run(steps=[step._replace(layer=1)])
    with pytest.raises(RuntimeError, match='1 to 3 dimensions'):
        run(steps=[step._replace(stride=(), padding=(), dilation=())])
    with pytest.raises(RuntimeError, match='formats must be kind'):
        run(formats=ops.NOT_ENCODED[:2])
    with pytest.raises(RuntimeError, match=r'kind 0 \(plain\) or 1'):
        run(formats=ops.Encoding(ops.PayloadKind.SPLIT, 2, GROUP_SIZE))
    with pytest.raises(RuntimeError, match='aten::convolution failed'):
        run(x=x[:, :3])


def test_errors_of_the_backward_pass():
    x = torch.randn(3, 8, 9, 7)
    epilogue = ops.Epilogue.RELU
    layer = make_layer(8, (1, 1), epilogue, torch.float32, 'cpu')
    steps = [make_step(epilogue)]
    format = ops.Encoding(ops.PayloadKind.PLAIN, 2, GROUP_SIZE)
    (output,), codes, kept, layouts = run_chain([x], steps, [layer], format)

    def run(
        grads=(output,),
        codes=codes,
        formats=format,
        kept=kept,
        layouts=layouts,
        needs=(True, True, False, False),
    ):
        return run_backward(
            grads, (codes, formats, kept, layouts), steps, [layer], needs
        )

    run()
    with pytest.raises(RuntimeError, match='grad_outputs are too few: 0'):
        run(grads=[])
    with pytest.raises(RuntimeError, match='codes must be 2 tensors, got 1'):
        run(codes=codes[:1])
    with pytest.raises(RuntimeError, match='codes and ranges .* missing'):
        run(codes=[codes[0], None])
    with pytest.raises(RuntimeError, match='nothing is kept of an input'):
        run(formats=ops.NOT_ENCODED, codes=[])
    with pytest.raises(RuntimeError, match='must be -1 to 3, got 7'):
        run(formats=[7, 2, GROUP_SIZE])
    with pytest.raises(RuntimeError, match='kept must be 2 tensors, got 1'):
        run(kept=kept[:1])
    with pytest.raises(RuntimeError, match='layouts one for each input'):
        run(layouts=layouts[:9])
    with pytest.raises(RuntimeError, match='layouts is shorter'):
        run(layouts=layouts[:-1])
    with pytest.raises(RuntimeError, match='needs must have an entry'):
        run(needs=[True])


# How the input is encoded has nothing to do with what follows.
@pytest.mark.parametrize(
    ('epilogue', 'kind'),
    list(
        zip(
            ops.Epilogue,
            itertools.cycle([ops.PayloadKind.PLAIN, ops.PayloadKind.ROWS]),
        )
    ),
)
@pytest.mark.parametrize('rotated', [False, True])
def test_opcheck(epilogue, kind, rotated, device):
    x = torch.randn(2, 4, 8, 8, device=device)
    layers = [
        make_layer(4, (1, 1), each, x.dtype, device)
        for each in (ops.Epilogue.NORM_RELU, epilogue)
    ]
    residual = INPUT if epilogue is ops.Epilogue.NORM_RELU else None
    steps = [
        make_step(ops.Epilogue.NORM_RELU),
        make_step(epilogue, 0, 1, residual),
    ]
    parameters, buffers = flatten(layers)
    plan = make_plan(steps, len(layers))
    format = [int(kind), 3 if kind is ops.PayloadKind.PLAIN else 7, GROUP_SIZE]
    namespace = torch.ops.mmactnn
    arguments = [x], parameters, buffers, *plan[:2], format, SEED, 7, rotated
    opcheck(namespace.conv_chain.default, arguments)
    outputs, codes, kept, layouts = namespace.conv_chain.default(*arguments)
    needs = [int(parameter is not None) for parameter in parameters]
    opcheck(
        namespace.conv_chain_backward.default,
        (
            [torch.randn_like(output) for output in outputs],
            codes,
            format,
            parameters,
            kept,
            layouts.tolist(),
            plan.numbers,
            needs,
            [1],
            False,
            True,
            x.dtype,
            [1 + rotated, SEED, 7] * 3,
        ),
    )


def test_observed_gradient_is_a_tensor_of_its_own(device):
    x = torch.randn(2, 4, 6, 6, device=device)
    epilogue = ops.Epilogue.NONE
    layer = make_layer(4, (1, 1), epilogue, x.dtype, device)
    format = ops.Encoding(ops.PayloadKind.PLAIN, 2, GROUP_SIZE)
    steps = [make_step(epilogue)]
    (output,), codes, kept, layouts = run_chain([x], steps, [layer], format)
    grad = torch.randn_like(output)
    grads = run_backward(
        [grad], (codes, format, kept, layouts), steps, [layer], observed=True
    )
    assert torch.equal(grads[1], grad)
    assert grads[1].data_ptr() != grad.data_ptr()


def test_out_of_memory_has_its_class():
    if not torch.cuda.is_available():
        pytest.skip('no GPU is available')
    if torch.__version__ < (2, 13):
        pytest.skip('torch does not tell the reason before 2.13')
    x = torch.randn(64, 8, 64, 64, device='cuda')
    epilogue = ops.Epilogue.RELU
    layer = make_layer(8, (1, 1), epilogue, torch.float32, 'cuda')
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((used + 2**20) / total, 0)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run_chain([x], [make_step(epilogue)], [layer])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
