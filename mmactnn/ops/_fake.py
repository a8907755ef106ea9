"""Fake kernels: shapes without data, for torch.compile and FakeTensor."""

import torch

from ..extension import load_error


def _ceil_div(a, b):
    return (a + b - 1) // b


def _quantize(input, bits, group_size, seed, offset):
    rows = input.shape[0]
    row_numel = 1
    for size in input.shape[1:]:
        row_numel = row_numel * size
    if isinstance(rows, int) and rows == 0:
        row_numel = 0
    codes = input.new_empty(
        (rows, _ceil_div(row_numel, 8) * bits), dtype=torch.uint8
    )
    ranges = input.new_empty(
        (rows, _ceil_div(row_numel, group_size), 2), dtype=torch.bfloat16
    )
    return codes, ranges


def _dequantize(codes, ranges, size, stride, dtype, bits, group_size):
    return codes.new_empty_strided(size, stride, dtype=dtype)


def _empty_mask(input, max=None, slope=None):
    return input.new_empty((_ceil_div(input.numel(), 8),), dtype=torch.uint8)


def _relu_mask(input, max=None, slope=None):
    return torch.empty_like(input), _empty_mask(input)


def _relu_mask_backward(grad_output, mask, slope=None):
    return torch.empty_like(grad_output)


def _dropout(input, p, seed, offset):
    return torch.empty_like(input)


def _dropout_(input, p, seed, offset):
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


if load_error() is None:
    torch.library.register_fake('mmactnn::quantize', _quantize)
    torch.library.register_fake('mmactnn::dequantize', _dequantize)
    torch.library.register_fake('mmactnn::relu_mask', _relu_mask)
    torch.library.register_fake('mmactnn::relu_mask_', _empty_mask)
    torch.library.register_fake(
        'mmactnn::relu_mask_backward', _relu_mask_backward
    )
    torch.library.register_fake('mmactnn::dropout', _dropout)
    torch.library.register_fake('mmactnn::dropout_', _dropout_)
    torch.library.register_fake('mmactnn::max_pool2d', _max_pool2d)
    torch.library.register_fake(
        'mmactnn::max_pool2d_backward', _max_pool2d_backward
    )
