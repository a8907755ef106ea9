"""Speed of the kernels relative to the device's copy.

    python tools/benchmark/kernel_speed.py [--out kernels.json]

The rate of a kernel is the bytes that must move (input once, codes, ranges,
mask or positions, output once) over the median time; its share is that rate
over the rate of ``Tensor.copy_`` of the same tensor, read and write both
counted. GB = 10^9 bytes. ``--rounding`` says how values become codes, and
codes values: with ``rotated``, those of 1 to 3 bits for values are. The exit
status is 1 if a kernel failed.
"""

import itertools
import statistics
from functools import partial
from typing import NamedTuple

import torch

from mmactnn import ops
from shared import output

SHAPES = ((64, 256, 56, 56), (256, 512, 28, 28))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Random(NamedTuple):
    """Random bits, as further arguments of ops.

    Attributes:
        encoding (dict): Of ops that encode.
        decoding (dict): Of ops that decode.
    """

    encoding: dict
    decoding: dict

    @classmethod
    def of(cls, rounding):
        """Those of one of ``ops.ROUNDINGS``."""
        seed, offset = 1, 0
        return cls(
            dict(seed=seed, offset=offset, rotated=rounding == 'rotated'),
            dict(drawn=ops.DrawnBits.of(rounding, seed, offset)),
        )


def median_ms(function, written, repeats=50, warmup=10):
    """Median time of a call, which writes so many bytes, in milliseconds.

    Before a call the cache holds no data that the call reads, as between
    layers, and as much unwritten data as the call itself will leave there.
    Otherwise a call that writes little would also be charged for earlier
    writes, up to the size of the cache.
    """
    others = torch.zeros(2**26, dtype=torch.int32, device='cuda')
    largest = torch.empty((), dtype=torch.int32, device='cuda')
    cache_size = torch.cuda.get_device_properties().L2_cache_size
    waiting = others.new_empty(min(written, cache_size), dtype=torch.uint8)
    times = []
    for _ in range(warmup + repeats):
        torch.amax(others, dim=0, out=largest)
        waiting.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) for s, e in times[warmup:])


def measure(
    shape,
    dtype,
    channels_last,
    failures,
    rounding=ops.DEFAULT_ROUNDING,
    device='cuda',
):
    """Yield a row of each kernel on a tensor; failures get the errors."""
    random = Random.of(rounding)
    x = torch.randn(shape, device=device, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    layout = 'channels_last' if channels_last else 'contiguous'
    setting = dict(shape=list(shape), dtype=str(dtype)[6:], layout=layout)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / median_ms(lambda: y.copy_(x), y.nbytes) / 1e6
    for cases in CASES:
        name = ' '.join([cases.__name__, *map(str, setting.values())])
        with output.catching(failures, name):
            for kernel, read, written, function in cases(x, random):
                nbytes = sum(tensor.nbytes for tensor in written)
                time = median_ms(function, nbytes)
                nbytes += sum(tensor.nbytes for tensor in read)
                rate = nbytes / time / 1e6
                yield dict(
                    kernel=kernel,
                    **setting,
                    ms=round(time, 4),
                    gb_s=round(rate),
                    copy_gb_s=round(copy),
                    share=round(rate / copy, 3),
                )


def codes(x, random):
    """Yield name, tensors read and written, and call: codes of one width."""
    for bits in ops.VALID_BITS:
        encode = partial(ops.quantize, x, bits, **random.encoding)
        payload = encode()
        coded = (*payload, *_like(x), bits)
        decode = partial(ops.dequantize, *coded, **random.decoding)
        yield f'quantize {bits} bit', [x], payload, encode
        yield f'dequantize {bits} bit', payload, [x], decode


def rows(x, random):
    """Yield likewise: codes of different widths by sample."""
    energies = ops.sample_range_energy(x)
    yield (
        'sample range energy',
        [x],
        [energies],
        partial(ops.sample_range_energy, x),
    )
    split = partial(ops.allocate_sample_bits, energies, 2 * len(x))
    yield 'allocate sample bits', [energies], split(), split
    # All samples at 2 bits, to compare with that kernel, and mixed widths.
    plain = torch.full((len(x),), 2, device=x.device)
    mixed = torch.arange(len(x), device=x.device) % 8 + 1
    for name, bits in (('2 bit', plain), ('1 to 8 bit', mixed)):
        widths = (bits.byte(), (bits.cumsum(0) - bits).int())
        total = int(bits.sum())
        format = (*widths, total)
        encode = partial(ops.quantize_rows, x, *format, **random.encoding)
        payload = encode()
        coded = (*payload, *widths, *_like(x))
        decode = partial(ops.dequantize_rows, *coded, **random.decoding)
        yield f'quantize rows of {name}', [x], payload, encode
        yield f'dequantize rows of {name}', payload, [x], decode


def norm_grads(x, random):
    """Yield likewise: the backward pass of normalisations from codes."""
    running = [torch.zeros(x.shape[1], device=x.device) for _ in range(2)]
    stats = partial(ops.channel_stats, x, 1e-5, 0.1, *running)
    yield 'channel stats', [x], [], stats
    vector = torch.ones(x.shape[1], device=x.device)
    vectors = vector, torch.stack([vector, vector])
    affine = vector - 1, vector, None, None
    for bits in (2, 3, 4):
        # Of the values themselves.
        for name, relu in (('norm relu', True), ('norm', False)):
            _, codes, ranges, *_ = ops.norm_act(
                x, None, *affine, relu, bits, 0, **random.encoding
            )
            format = dict(
                bits=bits, group_size=256, relu=relu, **random.decoding
            )
            read = [x, codes, ranges]
            sums = partial(ops.norm_grad_sums, *read, **format)
            yield f'{name} grad sums {bits} bit', read, [], sums
            grads = partial(ops.norm_grad_input, *read, *vectors, **format)
            yield f'{name} grad input {bits} bit', read, [x], grads
        # Any codes are valid zeroed ones.
        read = [x, codes, ranges, codes]
        coded = (*read, bits, bits, 256)
        sums = partial(ops.norm_add_grad_sums, *coded, **random.decoding)
        yield f'norm add relu grad sums {bits} bit', read, [x], sums


def norms(x, random):
    """Yield likewise: fused normalisation, and decoding of its codes."""
    mean, bias = torch.randn(2, x.shape[1], device=x.device)
    scale = torch.rand(x.shape[1], device=x.device) + 0.5
    modes = {'': None, ' relu': None, ' add relu': torch.randn_like(x)}
    for bits, name in itertools.product((2, 3, 4, 8), modes):
        add, relu = modes[name], 'relu' in name
        arguments = (add, mean, scale, scale, bias, relu, bits, bits)
        forward = partial(ops.norm_act, x, *arguments, **random.encoding)
        written, like = forward(), _like(x)
        output, codes, ranges, *act_payload = written
        read = [x] if add is None else [x, add]
        yield f'norm{name} {bits} bit', read, written, forward
        if add is not None:
            name, read = f'dequantize zeroed {bits} bit', act_payload
            coded = (*read, *like, bits)
            decode = partial(ops.dequantize_zeroed, *coded, **random.decoding)
            yield name, read, [output], decode
        elif relu:
            name, read = f'dequantize split {bits} bit', [codes, ranges]
            coded = (*read, scale, bias, *like, bits)
            decode = partial(ops.dequantize_split, *coded, **random.decoding)
            yield name, read, [output], decode
    y = torch.zeros_like(x)
    constants = (torch.ones(x.shape[1], device=x.device),) * 4
    for name, add, read in (('', None, [x]), (' add', x, [x, x])):
        frozen = partial(ops.frozen_norm_act_, y, add, *constants, 1e-5, True)
        yield f'frozen norm{name} relu', read, [x], frozen


def rectifiers(x, random):
    """Yield likewise: ReLUs that keep a mask, or codes of their output."""
    # After the first call in place nothing is negative; the work is the same.
    y, mask = x.clone(), ops.relu_mask(x)[1]
    backward = partial(ops.relu_mask_backward, x, mask)
    yield 'relu forward', [x], [x, mask], partial(ops.relu_mask, x)
    yield 'relu forward in place', [x], [x, mask], partial(ops.relu_mask_, y)
    yield 'relu backward', [x, mask], [x], backward
    for bits in (2, 3, 4, 8):
        name = f'relu codes {bits} bit'
        forward = partial(ops.relu_codes, x, bits, **random.encoding)
        written = forward()
        in_place = partial(ops.relu_codes_, y, bits, **random.encoding)
        format = bits, random.encoding['rotated']
        backward = partial(ops.relu_codes_backward, x, written[1], *format)
        yield f'{name} forward', [x], written, forward
        yield f'{name} forward in place', [x], written, in_place
        yield f'{name} backward', [x, written[1]], [x], backward


def smooths(x, _):
    """Yield likewise: smooth activations, by derivative and by one code."""
    seed, drawn = dict(seed=1), ops.DrawnBits.of('dither', 1, 0)
    layout = x.shape, x.stride(), x.dtype
    vectors = torch.ones(2, x.shape[1], device=x.device).unbind()
    affine = dict(zip(('weight', 'bias'), vectors))
    for name, smooth in (
        ('gelu', ops.Smooth.gelu()),
        ('silu', ops.Smooth.silu()),
    ):
        format = smooth, 4
        forward = partial(ops.smooth_derivative, x, *format, **seed)
        codes = forward()
        backward = partial(
            ops.smooth_derivative_backward, x, codes, *format, drawn=drawn
        )
        yield f'{name} derivative 4 bit', [x], [codes], forward
        yield f'{name} derivative 4 bit backward', [x, codes], [x], backward
        payload = list(ops.quantize(x, 4, **seed))
        for kind, norm in (('', {}), (' norm', affine)):
            random = dict(drawn=drawn, **norm)
            decode = partial(
                ops.smooth_decode, *payload, *layout, *format, **random
            )
            backward = partial(
                ops.smooth_decode_backward, x, *payload, *format, **random
            )
            yield f'{name}{kind} 4 bit decode', payload, [x], decode
            read = [x, *payload]
            yield f'{name}{kind} 4 bit backward', read, [x], backward


def others(x, _):
    """Yield likewise: dropout and max pooling."""
    yield 'dropout', [x], [x], partial(ops.dropout, x, 0.1, seed=1)
    forward = partial(ops.max_pool2d, x, 3, 2, 1)
    *payload, format = forward()
    backward = partial(ops.max_pool2d_backward, *payload, format)
    yield 'max pool forward', [x], payload, forward
    yield 'max pool backward', payload, [x], backward


CASES = (codes, rows, norm_grads, norms, rectifiers, smooths, others)


def _like(x):
    return x.shape, x.stride(), x.dtype


def main(argv=None):
    """Measure and print a table."""
    parser = output.make_parser(__doc__)
    parser.add_argument('--out', help='json file for the rows')
    roundings = dict(choices=ops.ROUNDINGS, default=ops.DEFAULT_ROUNDING)
    parser.add_argument('--rounding', **roundings, help='of codes')
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit('no GPU: there is nothing to measure')
    failures = {}
    settings = itertools.product(SHAPES, DTYPES, (False, True))
    rounding = args.rounding
    results = [
        row for s in settings for row in measure(*s, failures, rounding)
    ]
    output.publish(results, args)
    output.exit_on_failures(failures)


if __name__ == '__main__':
    main()
