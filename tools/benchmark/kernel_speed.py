"""Measure the kernels against the device's own copy.

    python tools/benchmark/kernel_speed.py [--out kernels.json]

The rate of a kernel is the bytes that must move (input once, codes, ranges,
mask or positions, output once) over the median time; its share is that rate
over the rate of ``Tensor.copy_`` of the same tensor, read and write both
counted. GB = 10^9 bytes.
"""

import argparse
import functools
import itertools
import json

import torch
from rich.console import Console
from rich.table import Table

from mmactnn import ops

SHAPES = ((64, 256, 56, 56), (256, 512, 28, 28))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def median_ms(function, repeats=50, warmup=10):
    """Median time of a call on the GPU, in milliseconds.

    The cache is flushed between calls, as it is between layers.

    Args:
        function (Callable): What is measured.
        repeats (int, optional): Calls that count. Defaults to 50.
        warmup (int, optional): Calls before. Defaults to 10.
    """
    cache = torch.empty(2**28, dtype=torch.uint8, device='cuda')
    times = []
    for i in range(warmup + repeats):
        cache.zero_()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        if i >= warmup:
            times.append((start, end))
    torch.cuda.synchronize()
    return sorted(s.elapsed_time(e) for s, e in times)[repeats // 2]


def measure(shape, dtype, channels_last):
    """Measure all kernels on one tensor.

    Yields:
        dict: One row of the result.
    """
    x = torch.randn(shape, device='cuda', dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e6

    def row(name, nbytes, function):
        time = median_ms(function)
        rate = nbytes / time / 1e6
        return dict(
            kernel=name,
            shape=list(shape),
            dtype=str(dtype)[6:],
            layout='channels_last' if channels_last else 'contiguous',
            ms=round(time, 4),
            gb_s=round(rate),
            copy_gb_s=round(copy),
            share=round(rate / copy, 3),
        )

    for bits in ops.VALID_BITS:
        codes, ranges = ops.quantize(x, bits, seed=1)
        nbytes = x.nbytes + codes.nbytes + ranges.nbytes
        quantize = functools.partial(ops.quantize, x, bits, seed=1)
        dequantize = functools.partial(
            ops.dequantize, codes, ranges, x.shape, x.stride(), dtype, bits
        )
        yield row(f'quantize {bits} bit', nbytes, quantize)
        yield row(f'dequantize {bits} bit', nbytes, dequantize)
    spread = ops.row_spread(x)
    yield row('row spread', x.nbytes, functools.partial(ops.row_spread, x))
    total = 2 * len(x)
    split = functools.partial(ops.split_bits, spread, total)
    yield row('split bits', 9 * len(x), split)
    # All of 2 bits, to compare with the kernel of that width, and all widths.
    plain = torch.full((len(x),), 2, device='cuda')
    mixed = torch.arange(len(x), device='cuda') % 8 + 1
    for name, bits in (('2 bit', plain), ('1 to 8 bit', mixed)):
        total = int(bits.sum())
        widths = (bits.byte(), (bits.cumsum(0) - bits).int())
        codes, ranges = ops.quantize_rows(x, *widths, total, seed=1)
        nbytes = x.nbytes + codes.nbytes + ranges.nbytes
        quantize = functools.partial(
            ops.quantize_rows, x, *widths, total, seed=1
        )
        dequantize = functools.partial(
            ops.dequantize_rows,
            codes,
            ranges,
            *widths,
            x.shape,
            x.stride(),
            dtype,
        )
        yield row(f'quantize rows of {name}', nbytes, quantize)
        yield row(f'dequantize rows of {name}', nbytes, dequantize)
    running = [torch.zeros(x.shape[1], device='cuda') for _ in range(2)]
    stats = functools.partial(ops.channel_stats, x, 1e-5, 0.1, *running)
    yield row('channel stats', x.nbytes, stats)
    vector = torch.ones(x.shape[1], device='cuda')
    vectors = vector, torch.stack([vector, vector])
    for bits in (2, 3, 4):
        codes, ranges = ops.quantize(x, bits, seed=1)
        # Any codes are split codes, too: here of one range for both kinds.
        split_ranges = torch.cat([ranges, ranges], -1)
        for name, relu, pair in (
            ('norm', False, ranges),
            ('norm relu', True, split_ranges),
        ):
            format = dict(bits=bits, group_size=256, relu=relu)
            nbytes = x.nbytes + codes.nbytes + pair.nbytes
            sums = functools.partial(
                ops.norm_grad_sums, x, codes, pair, **format
            )
            yield row(f'{name} grad sums {bits} bit', nbytes, sums)
            grad_input = functools.partial(
                ops.norm_grad_input, x, codes, pair, *vectors, **format
            )
            name = f'{name} grad input {bits} bit'
            yield row(name, nbytes + x.nbytes, grad_input)
        nbytes = 2 * x.nbytes + 2 * codes.nbytes + ranges.nbytes
        add_sums = functools.partial(
            ops.norm_add_grad_sums, x, codes, ranges, codes, bits, bits, 256
        )
        yield row(f'norm add relu grad sums {bits} bit', nbytes, add_sums)
    yield from measure_norms(x, row)
    overwritten, constants = torch.zeros_like(x), (vector,) * 4
    for name, residual in (('', None), (' add', x)):
        frozen = functools.partial(
            ops.frozen_norm_act_, overwritten, residual, *constants, 1e-5, True
        )
        nbytes = (2 if residual is None else 3) * x.nbytes
        yield row(f'frozen norm{name} relu', nbytes, frozen)
    mask = ops.relu_mask(x)[1]
    nbytes = 2 * x.nbytes + mask.nbytes
    yield row('relu forward', nbytes, lambda: ops.relu_mask(x))
    yield row('relu forward in place', nbytes, lambda: ops.relu_mask_(y))
    yield row('relu backward', nbytes, lambda: ops.relu_mask_backward(x, mask))
    yield from measure_relu_codes(x, row)
    nbytes = 2 * x.nbytes
    yield row('dropout', nbytes, lambda: ops.dropout(x, 0.1, seed=1))
    pooled, indices, format = ops.max_pool2d(x, 3, 2, 1)
    nbytes = x.nbytes + pooled.nbytes + indices.nbytes
    yield row('max pool forward', nbytes, lambda: ops.max_pool2d(x, 3, 2, 1))
    yield row(
        'max pool backward',
        nbytes,
        lambda: ops.max_pool2d_backward(pooled, indices, format),
    )


def measure_norms(x, row):
    """Measure the fused normalisation and what decodes its codes.

    Args:
        x (Tensor[N, C, *]): On the GPU.
        row (Callable): Makes a row of the result, see :func:`measure`.

    Yields:
        dict: One row of the result.
    """
    residual = torch.randn_like(x)
    mean, bias = torch.randn(2, x.shape[1], device=x.device)
    scale = torch.rand(x.shape[1], device=x.device) + 0.5
    like = (x.shape, x.stride(), x.dtype)
    modes = (('', None, False), (' relu', None, True))
    modes += ((' add relu', residual, True),)
    for bits, (name, add, relu) in itertools.product((2, 3, 4, 8), modes):
        arguments = (add, mean, scale, scale, bias, relu, bits, bits)
        forward = functools.partial(ops.norm_act, x, *arguments, seed=1)
        output, codes, ranges, act_codes, act_ranges = forward()
        payload = codes.nbytes + ranges.nbytes
        act_payload = act_codes.nbytes + act_ranges.nbytes
        moved = x.nbytes + output.nbytes + payload + act_payload
        moved += 0 if add is None else add.nbytes
        yield row(f'norm{name} {bits} bit', moved, forward)
        if add is not None:
            decode = functools.partial(
                ops.dequantize_zeroed, act_codes, act_ranges, *like, bits
            )
            moved = x.nbytes + act_payload
            yield row(f'dequantize zeroed {bits} bit', moved, decode)
        elif relu:
            decode = functools.partial(
                ops.dequantize_split, codes, ranges, scale, bias, *like, bits
            )
            moved = x.nbytes + payload
            yield row(f'dequantize split {bits} bit', moved, decode)


def measure_relu_codes(x, row):
    """Measure the ReLU that keeps codes of its output.

    Args:
        x (Tensor[N, *]): On the GPU.
        row (Callable): Makes a row of the result, see :func:`measure`.

    Yields:
        dict: One row of the result.
    """
    overwritten = x.clone()
    for bits in (2, 3, 4, 8):
        name = f'relu codes {bits} bit'
        arguments = dict(bits=bits, seed=1)
        _, codes, ranges = ops.relu_codes(x, **arguments)
        nbytes = 2 * x.nbytes + codes.nbytes + ranges.nbytes
        forward = functools.partial(ops.relu_codes, x, **arguments)
        yield row(f'{name} forward', nbytes, forward)
        # The first call leaves nothing to rectify; the work is the same.
        in_place = functools.partial(ops.relu_codes_, overwritten, **arguments)
        yield row(f'{name} forward in place', nbytes, in_place)
        backward = functools.partial(ops.relu_codes_backward, x, codes, bits)
        yield row(f'{name} backward', nbytes - ranges.nbytes, backward)


def main():
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', help='json file for the rows')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit('no GPU: there is nothing to measure')
    rows = [
        row
        for shape in SHAPES
        for dtype in DTYPES
        for channels_last in (False, True)
        for row in measure(shape, dtype, channels_last)
    ]
    table = Table(
        title=f'{torch.cuda.get_device_name()}, torch {torch.__version__}'
    )
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=120).print(table)
    if args.out:
        with open(args.out, 'w') as file:
            json.dump(
                dict(
                    device=torch.cuda.get_device_name(),
                    torch=torch.__version__,
                    rows=rows,
                ),
                file,
                indent=1,
            )


if __name__ == '__main__':
    main()
