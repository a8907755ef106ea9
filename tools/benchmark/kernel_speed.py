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


def median_ms(function, written, repeats=50, warmup=10):
    """Median time of a call on the GPU, in milliseconds.

    Before a call the cache holds nothing that the call reads, as between
    layers, and as much that waits to be written to memory as the call itself
    will leave there: what writes little would otherwise be charged for what
    was written before, up to the size of the cache.

    Args:
        function (Callable): What is measured.
        written (int): Bytes that it writes.
        repeats (int, optional): Calls that count. Defaults to 50.
        warmup (int, optional): Calls before. Defaults to 10.
    """
    others = torch.zeros(2**26, dtype=torch.int32, device='cuda')
    largest = torch.empty((), dtype=torch.int32, device='cuda')
    cache_size = torch.cuda.get_device_properties().L2_cache_size
    waiting = others.new_empty(min(written, cache_size), dtype=torch.uint8)
    times = []
    for i in range(warmup + repeats):
        torch.amax(others, dim=0, out=largest)
        waiting.zero_()
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
    copy = 2 * x.nbytes / median_ms(lambda: y.copy_(x), y.nbytes) / 1e6

    def row(name, read, written, function):
        read, written = (sum(t.nbytes for t in ts) for ts in (read, written))
        time = median_ms(function, written)
        rate = (read + written) / time / 1e6
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
        payload = ops.quantize(x, bits, seed=1)
        quantize = functools.partial(ops.quantize, x, bits, seed=1)
        dequantize = functools.partial(
            ops.dequantize, *payload, x.shape, x.stride(), dtype, bits
        )
        yield row(f'quantize {bits} bit', [x], payload, quantize)
        yield row(f'dequantize {bits} bit', payload, [x], dequantize)
    yield from measure_rows(x, row)
    running = [torch.zeros(x.shape[1], device='cuda') for _ in range(2)]
    stats = functools.partial(ops.channel_stats, x, 1e-5, 0.1, *running)
    yield row('channel stats', [x], [], stats)
    yield from measure_norm_grads(x, row)
    yield from measure_norms(x, row)
    overwritten = torch.zeros_like(x)
    constants = (torch.ones(x.shape[1], device='cuda'),) * 4
    for name, residual in (('', None), (' add', x)):
        frozen = functools.partial(
            ops.frozen_norm_act_, overwritten, residual, *constants, 1e-5, True
        )
        read = [x] if residual is None else [x, residual]
        yield row(f'frozen norm{name} relu', read, [x], frozen)
    mask = ops.relu_mask(x)[1]
    yield row('relu forward', [x], [x, mask], lambda: ops.relu_mask(x))
    in_place = functools.partial(ops.relu_mask_, y)
    yield row('relu forward in place', [x], [x, mask], in_place)
    backward = functools.partial(ops.relu_mask_backward, x, mask)
    yield row('relu backward', [x, mask], [x], backward)
    yield from measure_relu_codes(x, row)
    yield row('dropout', [x], [x], lambda: ops.dropout(x, 0.1, seed=1))
    pooled, indices, format = ops.max_pool2d(x, 3, 2, 1)
    forward = functools.partial(ops.max_pool2d, x, 3, 2, 1)
    yield row('max pool forward', [x], [pooled, indices], forward)
    backward = functools.partial(
        ops.max_pool2d_backward, pooled, indices, format
    )
    yield row('max pool backward', [pooled, indices], [x], backward)


def measure_rows(x, row):
    """Measure what gives samples codes of different widths.

    Args:
        x (Tensor[N, *]): On the GPU.
        row (Callable): Makes a row of the result, see :func:`measure`.

    Yields:
        dict: One row of the result.
    """
    spread = ops.row_spread(x)
    measure_spread = functools.partial(ops.row_spread, x)
    yield row('row spread', [x], [spread], measure_spread)
    total = 2 * len(x)
    split = functools.partial(ops.split_bits, spread, total)
    yield row('split bits', [spread], split(), split)
    # All of 2 bits, to compare with the kernel of that width, and all widths.
    plain = torch.full((len(x),), 2, device='cuda')
    mixed = torch.arange(len(x), device='cuda') % 8 + 1
    for name, bits in (('2 bit', plain), ('1 to 8 bit', mixed)):
        total = int(bits.sum())
        widths = (bits.byte(), (bits.cumsum(0) - bits).int())
        quantize = functools.partial(
            ops.quantize_rows, x, *widths, total, seed=1
        )
        payload = quantize()
        dequantize = functools.partial(
            ops.dequantize_rows,
            *payload,
            *widths,
            x.shape,
            x.stride(),
            x.dtype,
        )
        yield row(f'quantize rows of {name}', [x], payload, quantize)
        yield row(f'dequantize rows of {name}', payload, [x], dequantize)


def measure_norm_grads(x, row):
    """Measure the backward pass of normalisations from codes.

    Args:
        x (Tensor[N, C, *]): On the GPU.
        row (Callable): Makes a row of the result, see :func:`measure`.

    Yields:
        dict: One row of the result.
    """
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
            read = [x, codes, pair]
            sums = functools.partial(
                ops.norm_grad_sums, x, codes, pair, **format
            )
            yield row(f'{name} grad sums {bits} bit', read, [], sums)
            grad_input = functools.partial(
                ops.norm_grad_input, x, codes, pair, *vectors, **format
            )
            name = f'{name} grad input {bits} bit'
            yield row(name, read, [x], grad_input)
        add_sums = functools.partial(
            ops.norm_add_grad_sums, x, codes, ranges, codes, bits, bits, 256
        )
        name = f'norm add relu grad sums {bits} bit'
        yield row(name, [x, codes, codes, ranges], [x], add_sums)


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
        output, codes, ranges, *act_payload = forward()
        read = [x] if add is None else [x, add]
        written = [output, codes, ranges, *act_payload]
        yield row(f'norm{name} {bits} bit', read, written, forward)
        if add is not None:
            decode = functools.partial(
                ops.dequantize_zeroed, *act_payload, *like, bits
            )
            name = f'dequantize zeroed {bits} bit'
            yield row(name, act_payload, [output], decode)
        elif relu:
            decode = functools.partial(
                ops.dequantize_split, codes, ranges, scale, bias, *like, bits
            )
            name = f'dequantize split {bits} bit'
            yield row(name, [codes, ranges], [output], decode)


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
        forward = functools.partial(ops.relu_codes, x, **arguments)
        output, codes, ranges = forward()
        written = [output, codes, ranges]
        yield row(f'{name} forward', [x], written, forward)
        # The first call leaves nothing to rectify; the work is the same.
        in_place = functools.partial(ops.relu_codes_, overwritten, **arguments)
        yield row(f'{name} forward in place', [x], written, in_place)
        backward = functools.partial(ops.relu_codes_backward, x, codes, bits)
        yield row(f'{name} backward', [x, codes], [x], backward)


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
