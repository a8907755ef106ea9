"""Whole batch normalisations, against the ops that they are made of."""

import pytest
import torch
from support.layers import assert_same_bits
from support.opcheck import opcheck
from support.pairs import in_turn, parametrize_pairs
from support.roundings import encoding

from mmactnn import ops

SHAPES = ((3, 8, 16, 16), (2, 5, 7, 7), (4, 3), (2, 6, 11))
# relu, residual, bits, bits of the output
MODES = {
    'plain': (False, False, 2, 0),
    'relu': (True, False, 3, 0),
    'add': (True, True, 2, 2),
    'add, 1 and 7 bits': (True, True, 1, 7),
}
DRAW = 5, 9


def format_of(rounding):
    group_size = 256 if rounding == 'rotated' else 64
    return dict(group_size=group_size, **encoding(rounding, *DRAW))


def make(shape, dtype=torch.float32, channels_last=False, device='cpu'):
    tensors = [torch.randn(shape) * 2 + 0.5, torch.randn(shape)]
    tensors = [t.to(dtype) for t in tensors]
    if channels_last:
        tensors = [
            t.movedim(1, -1).contiguous().movedim(-1, 1) for t in tensors
        ]
    vectors = [*torch.randn(2, shape[1]), *torch.rand(2, shape[1])]
    return [t.to(device) for t in (*tensors, *vectors)]


def settings_of(mean, var, use_batch_stats, tracked=None):
    return ops.NormSettings(mean, var, tracked, use_batch_stats, 0.1, 1e-5)


def run(op, tensors, mode, settings, affine=True, rounding='dither'):
    relu, adds, bits, act_bits = MODES[mode]
    x, residual, bias, _, weight, _ = tensors
    return op(
        x,
        residual if adds else None,
        weight if affine else None,
        bias if affine else None,
        settings,
        relu,
        bits,
        act_bits,
        **format_of(rounding),
    )


def put_together(tensors, mode, settings, affine=True, rounding='dither'):
    relu, adds, bits, act_bits = MODES[mode]
    x, residual, bias, _, weight, _ = tensors
    if settings.use_batch_stats:
        mean, _, invstd = ops.channel_stats(
            x, 1e-5, 0.1, settings.running_mean, settings.running_var
        )
    else:
        mean = settings.running_mean.float()
        invstd = (settings.running_var.double() + 1e-5).rsqrt().float()
    output, *codes = ops.norm_act(
        x,
        residual if adds else None,
        mean,
        invstd,
        weight if affine else None,
        bias if affine else None,
        relu,
        bits,
        act_bits,
        **format_of(rounding),
    )
    return output, invstd, codes[: 4 if adds else 2]


def assert_equal(found, expected):
    output, invstd, codes = found
    for actual, wanted in zip(
        (output, invstd, *codes), (*expected[:2], *expected[2]), strict=True
    ):
        assert_same_bits(actual + 0, wanted + 0)


@in_turn(
    by='mode',
    mode=tuple(MODES),
    shape=SHAPES,
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    channels_last=[False, True],
    use_batch_stats=[True, False],
    rounding=['dither', 'rotated'],
)
def test_forward(
    mode, shape, dtype, channels_last, use_batch_stats, rounding, device
):
    format = dict(rounding=rounding)
    tensors = make(shape, dtype, channels_last, device)
    running = [t.clone() for t in (tensors[3], tensors[5])]
    tracked = torch.tensor(3, device=device)
    wanted = settings_of(*(t.clone() for t in running), use_batch_stats)
    expected = put_together(tensors, mode, wanted, **format)
    settings = settings_of(*running, use_batch_stats, tracked)
    found = run(ops.batch_norm_act, tensors, mode, settings, **format)
    assert_equal(found, expected)
    assert_same_bits(settings.running_mean, wanted.running_mean)
    assert_same_bits(settings.running_var, wanted.running_var)
    assert tracked.item() == (4 if use_batch_stats else 3)
    # In place.
    x = tensors[0].clone()
    settings = settings_of(
        *(t.clone() for t in (tensors[3], tensors[5])), use_batch_stats
    )
    found = run(
        ops.batch_norm_act_, [x, *tensors[1:]], mode, settings, **format
    )
    assert_equal((x, *found), expected)


def test_without_running_statistics_weight_and_bias(device):
    tensors = make((2, 4, 8, 8), device=device)
    settings = settings_of(None, None, True)
    expected = put_together(tensors, 'relu', settings, affine=False)
    found = run(ops.batch_norm_act, tensors, 'relu', settings, affine=False)
    assert_equal(found, expected)


@parametrize_pairs(
    mode=tuple(MODES),
    dtype=[torch.float32, torch.float16],
    channels_last=[False, True],
    use_batch_stats=[True, False],
    affine=[True, False],
    rounding=ops.ROUNDINGS,
)
def test_backward(
    mode, dtype, channels_last, use_batch_stats, affine, rounding, device
):
    group_size = format_of(rounding)['group_size']
    random = dict(drawn=ops.DrawnBits.of(rounding, *DRAW))
    relu, adds, bits, act_bits = MODES[mode]
    tensors = make((3, 8, 16, 16), dtype, channels_last, device)
    settings = settings_of(tensors[3], tensors[5], use_batch_stats)
    _, invstd, codes = run(
        ops.batch_norm_act, tensors, mode, settings, rounding=rounding
    )
    grad = torch.randn_like(tensors[0])
    weight = tensors[4] if affine else None
    sums, (grad_input, *others) = ops.batch_norm_act_backward(
        grad,
        *codes[:2],
        codes[2] if adds else None,
        weight,
        invstd,
        relu,
        use_batch_stats,
        True,
        bits,
        act_bits,
        group_size,
        **random,
    )
    passed = grad
    if adds:
        passed, expected = ops.norm_add_grad_sums(
            grad, *codes[:3], bits, act_bits, group_size, **random
        )
        assert_same_bits(others[0], passed)
    else:
        assert not others
        expected = ops.norm_grad_sums(
            grad, *codes[:2], bits, group_size, relu, **random
        )
    assert_same_bits(torch.stack(sums), expected)
    # By a tensor: torch multiplies with the inverse of a number.
    count = torch.full_like(expected, grad.numel() // 8)
    means = expected / count * use_batch_stats
    scale = invstd if weight is None else invstd * weight
    wanted = ops.norm_grad_input(
        *(passed, *codes[:2], scale, means, bits, group_size),
        relu and not adds,
        **random,
    )
    assert_same_bits(grad_input + 0, wanted + 0)


def test_backward_without_the_gradient_of_the_input(device):
    tensors = make((2, 4, 8, 8), device=device)
    settings = settings_of(None, None, True)
    _, invstd, codes = run(ops.batch_norm_act, tensors, 'relu', settings)
    sums, grads = ops.batch_norm_act_backward(
        tensors[0], *codes, None, None, invstd, True, True, False, 3, 0, 64
    )
    assert [each.shape for each in sums] == [(4,), (4,)] and grads == []


def test_wrong_arguments(device):
    tensors = make((2, 4, 8, 8), device=device)
    x, vector = tensors[0], tensors[2]
    good = settings_of(None, None, True)
    for settings, message in (
        (settings_of(None, None, False), 'must be given'),
        (settings_of(vector, None, True), 'both'),
        (settings_of(vector[:2], vector, True), 'running_mean'),
        (settings_of(vector, vector, True, vector), 'num_batches_tracked'),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(ops.batch_norm_act, tensors, 'relu', settings)
    with pytest.raises(RuntimeError, match='contiguous or channels_last'):
        turned = [x.transpose(2, 3), *tensors[1:]]
        run(ops.batch_norm_act_, turned, 'relu', good)
    with pytest.raises(RuntimeError, match='overlap'):
        run(ops.batch_norm_act_, [x, x, *tensors[2:]], 'add', good)
    with pytest.raises(RuntimeError, match='weight'):
        wrong = [*tensors[:4], tensors[4].double(), tensors[5]]
        run(ops.batch_norm_act, wrong, 'relu', good)
    _, invstd, codes = run(ops.batch_norm_act, tensors, 'relu', good)
    rest = (True, True, True, 3, 0, 64)
    with pytest.raises(RuntimeError, match='invstd'):
        ops.batch_norm_act_backward(x, *codes, None, None, invstd[:2], *rest)
    with pytest.raises(RuntimeError, match='codes'):
        ops.batch_norm_act_backward(x[:1], *codes, None, None, invstd, *rest)


@pytest.mark.parametrize('rotated', [False, True])
@pytest.mark.parametrize('mode', ['plain', 'relu', 'add'])
def test_opcheck(mode, rotated, device):
    relu, adds, bits, act_bits = MODES[mode]
    x, residual, bias, mean, weight, var = make((2, 4, 8, 8), device=device)
    added = residual if adds else None
    tracked = torch.tensor(0, device=device)
    statistics = (mean, var, tracked, True, 0.1, 1e-5)
    format = (relu, bits, act_bits, 256, 1, 2, None, rotated)
    arguments = (x, added, weight, bias, *statistics, *format)
    for op in ('batch_norm_act', 'batch_norm_act_'):
        opcheck(getattr(torch.ops.mmactnn, op).default, arguments)
    _, invstd, *codes = torch.ops.mmactnn.batch_norm_act.default(*arguments)
    opcheck(
        torch.ops.mmactnn.batch_norm_act_backward.default,
        (
            residual,
            *codes[:2],
            codes[2] if adds else None,
            weight,
            invstd,
            relu,
            True,
            True,
            bits,
            act_bits,
            256,
            [1, 2, 0, int(rotated)],
        ),
    )
