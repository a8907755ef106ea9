"""Fake kernels: shapes without data, for torch.compile and FakeTensor."""

import torch

from ..extension import load_error


def _ceil_div(a, b):
    return (a + b - 1) // b


def _row_numel(input):
    if isinstance(input.shape[0], int) and input.shape[0] == 0:
        return 0
    row_numel = 1
    for size in input.shape[1:]:
        row_numel = row_numel * size
    return row_numel


def _empty_ranges(input, group_size):
    groups = _ceil_div(_row_numel(input), group_size)
    return input.new_empty((input.shape[0], groups, 2), dtype=torch.bfloat16)


def _quantize(input, bits, group_size, seed, offset, count=None):
    row_bytes = _ceil_div(_row_numel(input), 8) * bits
    codes = input.new_empty((input.shape[0], row_bytes), dtype=torch.uint8)
    return codes, _empty_ranges(input, group_size)


def _quantize_rows(
    input,
    row_bits,
    row_starts,
    total_bits,
    group_size,
    seed,
    offset,
    count=None,
):
    # Rows are padded to 8 blocks of 8 elements.
    row_blocks = _ceil_div(_row_numel(input), 64) * 8
    codes = input.new_empty((total_bits * row_blocks,), dtype=torch.uint8)
    return codes, _empty_ranges(input, group_size)


def _dequantize(codes, ranges, size, stride, dtype, bits, group_size):
    return codes.new_empty_strided(size, stride, dtype=dtype)


def _dequantize_rows(
    codes, ranges, row_bits, row_starts, size, stride, dtype, group_size
):
    return codes.new_empty_strided(size, stride, dtype=dtype)


def _row_spread(input, group_size):
    return input.new_empty((input.shape[0],), dtype=torch.float32)


def _split_bits(sensitivity, total_bits):
    row_bits = torch.empty_like(sensitivity, dtype=torch.uint8)
    return row_bits, torch.empty_like(sensitivity, dtype=torch.int32)


def _empty_mask(input, max=None, slope=None):
    return input.new_empty((_ceil_div(input.numel(), 8),), dtype=torch.uint8)


def _relu_mask(input, max=None, slope=None):
    return torch.empty_like(input), _empty_mask(input)


def _relu_mask_backward(grad_output, mask, slope=None):
    return torch.empty_like(grad_output)


def _relu_codes(input, *format):
    return torch.empty_like(input), *_quantize(input, *format)


def _relu_codes_backward(grad_output, codes, bits):
    return torch.empty_like(grad_output)


def _dropout(input, p, seed, offset, count=None):
    return torch.empty_like(input)


def _dropout_(input, p, seed, offset, count=None):
    pass


def _frozen_norm_act_(input, residual, mean, var, weight, bias, eps, relu):
    pass


def _empty_pooled(like, size, channels_last):
    output = like.new_empty((*like.shape[:-2], *size))
    if channels_last:
        output = output.contiguous(memory_format=torch.channels_last)
    return output


def _max_pool2d(
    input, kernel_size, stride, padding, dilation, output_size, channels_last
):
    output = _empty_pooled(input, output_size, channels_last)
    indices = input.new_empty(
        (_ceil_div(output.numel(), 2),), dtype=torch.uint8
    )
    return output, indices


def _max_pool2d_backward(
    grad_output,
    indices,
    kernel_size,
    stride,
    padding,
    dilation,
    input_size,
    channels_last,
):
    return _empty_pooled(grad_output, input_size, channels_last)


def _channel_stats(input, eps, momentum, running_mean, running_var):
    def empty():
        return input.new_empty((input.shape[1],), dtype=torch.float32)

    return empty(), empty(), empty()


def _norm_grad_sums(grad_output, codes, ranges, bits, group_size, relu):
    return grad_output.new_empty(
        (2, grad_output.shape[1]), dtype=torch.float32
    )


def _norm_add_grad_sums(
    grad_output, codes, ranges, act_codes, bits, act_bits, group_size
):
    sums = _norm_grad_sums(grad_output, codes, ranges, bits, group_size, False)
    return torch.empty_like(grad_output), sums


def _norm_grad_input(
    grad_output, codes, ranges, scale, means, bits, group_size, relu
):
    return torch.empty_like(grad_output)


def _norm_act(
    input,
    residual,
    mean,
    invstd,
    weight,
    bias,
    relu,
    bits,
    act_bits,
    group_size,
    seed,
    offset,
    count=None,
):
    output = torch.empty_like(input)
    codes, ranges = _quantize(input, bits, group_size, seed, offset)
    if relu and residual is None:
        ranges = ranges.new_empty((*ranges.shape[:2], 4))
    if residual is None:
        return output, codes, ranges, codes.new_empty(0), ranges.new_empty(0)
    act = _quantize(input, act_bits, group_size, seed, offset)
    return output, codes, ranges, *act


def _batch_norm_act(
    input,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    num_batches_tracked,
    of_batch,
    momentum,
    eps,
    *format,
):
    invstd = input.new_empty((input.shape[1],), dtype=torch.float32)
    output, *codes = _norm_act(
        input, residual, invstd, invstd, weight, bias, *format
    )
    return [output, invstd, *codes[: 2 if residual is None else 4]]


def _batch_norm_act_(*args):
    return _batch_norm_act(*args)[1:]


def _batch_norm_act_backward(
    grad_output,
    codes,
    ranges,
    act_codes,
    weight,
    invstd,
    relu,
    of_batch,
    needs_input,
    bits,
    act_bits,
    group_size,
):
    sums = _norm_grad_sums(grad_output, codes, ranges, bits, group_size, relu)
    count = needs_input + (act_codes is not None)
    return [sums, *(torch.empty_like(grad_output) for _ in range(count))]


def _dequantize_split(
    codes, ranges, weight, bias, size, stride, dtype, bits, group_size
):
    return codes.new_empty_strided(size, stride, dtype=dtype)


if load_error() is None:
    torch.library.register_fake('mmactnn::quantize', _quantize)
    torch.library.register_fake('mmactnn::dequantize', _dequantize)
    torch.library.register_fake('mmactnn::quantize_rows', _quantize_rows)
    torch.library.register_fake('mmactnn::dequantize_rows', _dequantize_rows)
    torch.library.register_fake('mmactnn::row_spread', _row_spread)
    torch.library.register_fake('mmactnn::split_bits', _split_bits)
    torch.library.register_fake('mmactnn::relu_mask', _relu_mask)
    torch.library.register_fake('mmactnn::relu_mask_', _empty_mask)
    torch.library.register_fake(
        'mmactnn::relu_mask_backward', _relu_mask_backward
    )
    torch.library.register_fake('mmactnn::relu_codes', _relu_codes)
    torch.library.register_fake('mmactnn::relu_codes_', _quantize)
    torch.library.register_fake(
        'mmactnn::relu_codes_backward', _relu_codes_backward
    )
    torch.library.register_fake('mmactnn::dropout', _dropout)
    torch.library.register_fake('mmactnn::dropout_', _dropout_)
    torch.library.register_fake('mmactnn::frozen_norm_act_', _frozen_norm_act_)
    torch.library.register_fake('mmactnn::max_pool2d', _max_pool2d)
    torch.library.register_fake(
        'mmactnn::max_pool2d_backward', _max_pool2d_backward
    )
    torch.library.register_fake('mmactnn::channel_stats', _channel_stats)
    torch.library.register_fake('mmactnn::norm_grad_sums', _norm_grad_sums)
    torch.library.register_fake(
        'mmactnn::norm_add_grad_sums', _norm_add_grad_sums
    )
    torch.library.register_fake('mmactnn::norm_grad_input', _norm_grad_input)
    torch.library.register_fake('mmactnn::norm_act', _norm_act)
    torch.library.register_fake('mmactnn::batch_norm_act', _batch_norm_act)
    torch.library.register_fake('mmactnn::batch_norm_act_', _batch_norm_act_)
    torch.library.register_fake(
        'mmactnn::batch_norm_act_backward', _batch_norm_act_backward
    )
    torch.library.register_fake('mmactnn::dequantize_split', _dequantize_split)
    torch.library.register_fake('mmactnn::dequantize_zeroed', _dequantize)
