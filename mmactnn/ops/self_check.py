"""Self-check of the kernels: one op of each kind against its reference."""

import torch

from . import reference, smooth_reference
from .batch_norm_act import NormSettings, batch_norm_act_
from .channel_stats import channel_stats
from .conv_chain import (
    NOT_ENCODED,
    ChainPlan,
    ChainStep,
    Epilogue,
    conv_chain,
    source_of_input,
)
from .dropout import dropout
from .frozen_norm import frozen_norm_act_
from .norm_act import norm_act
from .norm_grad import norm_grad_sums
from .pool import max_pool2d, max_pool2d_backward
from .quantize import dequantize, quantize
from .random_bits import DrawnBits
from .rectified import dequantize_zeroed
from .relu import relu_mask, relu_mask_backward
from .relu_codes import relu_codes
from .rotation import ROTATION
from .rows import allocate_sample_bits, quantize_rows, sample_range_energy
from .smooth import Smooth, smooth_decode, smooth_derivative

_GROUP_SIZE = 64


def _make_input(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 6, 10, generator=generator)
    return x.to(device)


def _vectors(x):
    # Vectors of channels: scale, shift, mean and variance.
    steps = torch.arange(1.0, x.shape[1] + 1, device=x.device)
    return steps / 4, 1 - steps / 8, steps / 16, 1 + steps / 4


def _require_equal(found, expected):
    pairs = zip(found, expected, strict=True)
    if not all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs):
        raise AssertionError('the result differs from the reference')


def _require_close(found, expected):
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise AssertionError('the result is too far from the reference')


def _check_quantize(x):
    layout = x.shape, x.stride(), x.dtype
    payload = quantize(x, 2, _GROUP_SIZE, seed=1)
    expected = reference.quantize(x.cpu(), 2, _GROUP_SIZE, 1, 0)
    _require_equal(payload, expected)
    y = dequantize(*payload, *layout, 2, _GROUP_SIZE)
    decoded = reference.dequantize(*expected, *layout, 2, _GROUP_SIZE)
    _require_equal([y], [decoded])


def _check_rotated(x):
    # One whole group a sample.
    x = x[:, :, :4, :8].contiguous()
    layout = x.shape, x.stride(), x.dtype
    format = 2, ROTATION
    payload = quantize(x, *format, seed=1, rotated=True)
    expected = reference.quantize(x.cpu(), *format, 1, 0, rotated=True)
    _require_equal(payload, expected)
    drawn = DrawnBits.of('rotated', 1, 0)
    y = dequantize(*payload, *layout, *format, drawn=drawn)
    decoded = reference.dequantize(*expected, *layout, *format, drawn)
    _require_equal([y], [decoded])


def _check_rows(x):
    energies = sample_range_energy(x, _GROUP_SIZE)
    widths = allocate_sample_bits(energies, 7)
    _require_equal(widths, reference.allocate_sample_bits(energies.cpu(), 7))
    format = 7, _GROUP_SIZE
    codes = quantize_rows(x, *widths, *format, seed=1)
    cpu = [tensor.cpu() for tensor in (x, *widths)]
    _require_equal(codes, reference.quantize_rows(*cpu, *format, 1, 0))


def _check_mask(x):
    found = relu_mask(x)
    _require_equal(found, reference.relu_mask(x.cpu()))
    _require_equal([relu_mask_backward(x, found[1])], [x.relu()])


def _check_rectified(x):
    output, codes, ranges = relu_codes(x, 3, _GROUP_SIZE, seed=1)
    expected = reference.relu_codes(x.cpu(), 3, _GROUP_SIZE, 1, 0)
    _require_equal([output, codes, ranges], expected)
    format = x.shape, x.stride(), x.dtype, 3, _GROUP_SIZE
    y = dequantize_zeroed(codes, ranges, *format)
    decoded = reference.dequantize_zeroed(*expected[1:], *format)
    _require_equal([y], [decoded])


def _check_smooth(x):
    smooth, layout = Smooth.gelu(), (x.shape, x.stride())
    drawn = DrawnBits.of('dither', 1, 0)
    codes = smooth_derivative(x, smooth, 8, seed=1)
    expected = smooth_reference.smooth_derivative(x.cpu(), smooth, 8, drawn)
    # By the last bits of the function at most.
    if (codes.cpu() != expected).sum() > 2:
        raise AssertionError('the result differs from the reference')
    format = smooth, 4, _GROUP_SIZE
    payload = quantize(x, 4, _GROUP_SIZE, seed=1)
    y = smooth_decode(*payload, *layout, x.dtype, *format, drawn=drawn)
    cpu = [tensor.cpu() for tensor in payload]
    expected = smooth_reference.smooth_decoded(*cpu, *layout, *format, drawn)
    _require_close(y.cpu(), expected[0].float())


def _check_pool(x):
    output, indices, format = max_pool2d(x, 3, 2, 1)
    _require_equal([output], [torch.nn.functional.max_pool2d(x, 3, 2, 1)])
    grad = max_pool2d_backward(output, indices, format)
    expected = reference.max_pool2d_backward(
        output.cpu(), indices.cpu(), format
    )
    _require_equal([grad], [expected])


def _check_norm(x):
    scale, shift, mean, _ = _vectors(x)
    arguments = [x, None, mean, scale, scale, shift]
    format = True, 2, 0, _GROUP_SIZE
    output, *payload = norm_act(*arguments, *format, seed=1)
    cpu = [a if a is None else a.cpu() for a in arguments]
    expected = reference.norm_act(*cpu, *format, 1, 0)
    _require_equal([output, *payload[:2]], expected[:3])
    sums = norm_grad_sums(x, *payload[:2], 2, _GROUP_SIZE, True)
    grads = [x.cpu(), *expected[1:3]]
    expected = reference.norm_grad_sums(*grads, 2, _GROUP_SIZE, True)
    _require_close(sums.cpu(), expected.to(sums.dtype))


def _check_statistics(x):
    found = channel_stats(x, 1e-5, 0.1, None, None)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    _require_close(found[0], mean)
    _require_close(found[1], var)


def _check_frozen_norm(x):
    scale, shift, mean, var = _vectors(x)
    y = x.clone()
    frozen_norm_act_(y, None, mean, var, scale, shift, 1e-5, True)
    expected = torch.nn.functional.batch_norm(x, mean, var, scale, shift)
    _require_close(y, expected.relu())


def _check_dropout(x):
    _require_equal([dropout(x, 0.5, 1)], [reference.dropout(x.cpu(), 0.5, 1)])


def _check_chain(x):
    scale, shift, mean, var = _vectors(x)
    weight = torch.eye(x.shape[1], device=x.device)[..., None, None]
    window = (1, 1), (0, 0), (1, 1)
    format = False, 2, 0, _GROUP_SIZE
    step = ChainStep(
        source_of_input(0), None, 0, *window, 1, Epilogue.NORM_RELU, *format
    )
    (output,), _, kept, _ = conv_chain(
        [x],
        [weight, None, scale, shift],
        [mean, var, None],
        ChainPlan.of([step], [0.1, 1e-5]),
        NOT_ENCODED,
        seed=1,
    )
    y = x.clone()
    settings = NormSettings(mean, var, None, False, 0.1, 1e-5)
    format = True, 2, 0, _GROUP_SIZE
    invstd, codes = batch_norm_act_(
        y, None, scale, shift, settings, *format, seed=1
    )
    _require_equal([output, *kept], [y, invstd, *codes])


_CHECKS = dict(
    quantize=_check_quantize,
    rotated=_check_rotated,
    rows=_check_rows,
    mask=_check_mask,
    rectified=_check_rectified,
    smooth=_check_smooth,
    pool=_check_pool,
    norm=_check_norm,
    statistics=_check_statistics,
    frozen_norm=_check_frozen_norm,
    dropout=_check_dropout,
    chain=_check_chain,
)


def self_check(device):
    """Compare one op of each kind with its reference.

    Args:
        device (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        dict[str, str]: ``'ok'`` or the error, by kind of op.
    """
    results = {}
    for kind, check in _CHECKS.items():
        try:
            check(_make_input(device))
        except Exception as error:  # a broken kernel may raise any
            results[kind] = str(error) or type(error).__name__
        else:
            results[kind] = 'ok'
    return results
