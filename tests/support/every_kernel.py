"""Runs every CUDA kernel once, for compute-sanitizer.

compute-sanitizer --tool memcheck python tests/support/every_kernel.py

Every dtype, bit width, group size, rounding and way through the kernels: one
width and one for each sample, whole and ragged groups, rows on and off the
16-byte boundary, NaN and inf, in place; every kind of fused normalisation and
every kind of pooling window, in both layouts; channels in every place of the
blocks of codes.
Results are compared with the CPU's, so that a run that computes nothing
cannot pass.
"""

import itertools

import torch

from mmactnn import ops

SHAPES = ((3, 1024), (2, 1000), (3, 515), (5, 7))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RECTIFIERS = (dict(), dict(max=6.0), dict(slope=0.1))
# Whole groups whose channels repeat every 2048 elements or do not, blocks
# across channels in whole groups, planes off the blocks, rows off them, no
# plane; all but the last two in both layouts.
NORM_SHAPES = (
    (3, 16, 8, 8),
    (2, 24, 8, 8),
    (2, 64, 2, 6),
    (3, 8, 7, 7),
    (2, 5, 7, 9),
    (2, 5, 3),
    (6, 40),
)
# Enough elements for every split of a channel, of whole groups and not.
LONG_SHAPES = ((32, 16, 128, 128), (32, 24, 100, 101))
# Batch norm alone, before a ReLU, and before a residual sum and a ReLU.
NORM_MODES = ((False, False), (True, False), (True, True))
# Odd and even numbers of outputs, a warp and less, several planes, lines of
# whole blocks.
POOL_SHAPES = (
    (2, 3, 9, 11),
    (3, 9, 11),
    (2, 8, 16, 16),
    (2, 3, 7, 24),
    (1, 1, 3, 3),
)
# Sizes of logits and labels: larger, smaller, one place, several pieces.
LOSS_SIZES = (
    ((2, 5, 4, 6), (32, 48)),
    ((1, 3, 9, 11), (4, 5)),
    ((2, 3, 1, 1), (5, 4)),
    ((1, 40, 20, 128), (2048, 200)),
)
SEED = 1
SMOOTHS = (
    ops.Smooth.gelu(),
    ops.Smooth.gelu('tanh'),
    ops.Smooth.silu(),
    ops.Smooth.mish(),
    ops.Smooth.hardswish(),
    ops.Smooth.elu(1.5),
    ops.Smooth.sigmoid(),
    ops.Smooth.tanh(),
    ops.Smooth.softplus(2.0, 5.0),
    ops.Smooth.hardsigmoid(),
    ops.Smooth.clamp(-1, 1),
)
WINDOWS = (
    dict(kernel_size=2),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=3, stride=2, ceil_mode=True),
    dict(kernel_size=2, stride=3, padding=1, dilation=2),
    dict(kernel_size=(3, 1), stride=(1, 2)),
)


def check(actual, expected):
    """Compare a result on the GPU with the CPU's, bit for bit."""
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=0, atol=0, equal_nan=True
    )


def randoms_of(group_size):
    """Ways to round and to decode.

    Yields:
        tuple[dict, DrawnBits | None]: Keyword arguments of what encodes, and
        random bits for what decodes.
    """
    for rounding in ops.ROUNDINGS:
        rotated = rounding == 'rotated'
        if not rotated or group_size == 256:
            drawn = ops.DrawnBits.of(rounding, SEED, 0)
            yield dict(seed=SEED, rotated=rotated), drawn


def run_quantize(x, bits, group_size):
    """Quantise and dequantise."""
    format = (x.shape, x.stride(), x.dtype, bits, group_size)
    for random, drawn in randoms_of(group_size):
        expected = ops.quantize(x, bits, group_size, **random)
        codes, ranges = ops.quantize(x.cuda(), bits, group_size, **random)
        check(codes, expected[0])
        check(ranges, expected[1])
        y = ops.dequantize(codes, ranges, *format, drawn=drawn)
        check(y, ops.dequantize(*expected, *format, drawn=drawn))


def run_rows(x, group_size):
    """Allocate bits by range energies, quantise and dequantise samples."""
    energies = ops.sample_range_energy(x.cuda(), group_size)
    torch.testing.assert_close(
        energies.cpu(), ops.sample_range_energy(x, group_size)
    )
    total = 4 * len(x) + 1
    widths = ops.allocate_sample_bits(energies.cpu(), total)
    for actual, expected in zip(
        ops.allocate_sample_bits(energies, total), widths
    ):
        check(actual, expected)
    # Every width, in as many calls as that takes.
    for first in range(1, 9, len(x)):
        row_bits = (torch.arange(len(x)) + first - 1) % 8 + 1
        row_starts = (row_bits.cumsum(0) - row_bits).int()
        run_widths(x, row_bits.byte(), row_starts, group_size)


def run_widths(x, row_bits, row_starts, group_size):
    """Quantise and dequantise samples of given widths."""
    total = int(row_bits.sum())
    widths = row_bits, row_starts
    cuda_widths = (row_bits.cuda(), row_starts.cuda())
    format = (x.shape, x.stride(), x.dtype, group_size)
    for random, drawn in randoms_of(group_size):
        expected = ops.quantize_rows(x, *widths, total, group_size, **random)
        codes, ranges = ops.quantize_rows(
            x.cuda(), *cuda_widths, total, group_size, **random
        )
        check(codes, expected[0])
        check(ranges, expected[1])
        y = ops.dequantize_rows(
            codes, ranges, *cuda_widths, *format, drawn=drawn
        )
        wanted = ops.dequantize_rows(*expected, *widths, *format, drawn=drawn)
        check(y, wanted)


def run_relu(x, arguments):
    """A rectifier, in place and not, and its backward."""
    expected, expected_mask = ops.relu_mask(x, **arguments)
    output, mask = ops.relu_mask(x.cuda(), **arguments)
    check(output, expected)
    check(mask, expected_mask)
    slope = arguments.get('slope')
    check(
        ops.relu_mask_backward(x.cuda(), mask, slope),
        ops.relu_mask_backward(x, expected_mask, slope),
    )
    inplace = x.cuda()
    check(ops.relu_mask_(inplace, **arguments), expected_mask)
    check(inplace, expected)


def run_relu_codes(x, bits, group_size):
    """A rectifier that keeps codes, in place and not, and its backward."""
    for random, _ in randoms_of(group_size):
        expected = ops.relu_codes(x, bits, group_size, **random)
        actual = ops.relu_codes(x.cuda(), bits, group_size, **random)
        inplace = x.cuda()
        payload = ops.relu_codes_(inplace, bits, group_size, **random)
        for one, other, wanted in zip(actual, (inplace, *payload), expected):
            check(one, wanted)
            check(other, wanted)
        format = bits, random['rotated']
        check(
            ops.relu_codes_backward(x.cuda(), payload[0], *format),
            ops.relu_codes_backward(x, expected[1], *format),
        )


def run_smooth(x, bits, group_size):
    """Smooth activations: all functions, but for their last bits."""
    close = dict(rtol=1e-2, atol=1e-2)
    if x.dtype == torch.float32:
        close = dict(rtol=1e-5, atol=5e-5)
    special = not x.isfinite().all()
    cuda = x.cuda()
    grad = x.nan_to_num(0, 0, 0)
    drawn = ops.DrawnBits.of('dither', SEED, 0)
    payload = ops.quantize(x, bits, group_size, seed=SEED)
    cuda_payload = [tensor.cuda() for tensor in payload]
    layout = x.shape, x.stride(), x.dtype
    for place, smooth in enumerate(SMOOTHS):
        # By turns behind a normalisation; its layouts are those of channels.
        affine, cuda_affine = {}, {}
        if place % 2 and 2 <= x.dim() <= 5:
            steps = torch.arange(1.0, x.shape[1] + 1) / x.shape[1]
            affine = dict(weight=2 - steps, bias=steps - 0.5)
            cuda_affine = {k: v.cuda() for k, v in affine.items()}
        codes = ops.smooth_derivative(x, smooth, bits, seed=SEED)
        found = ops.smooth_derivative(cuda, smooth, bits, seed=SEED)
        # NaN has any code.
        differ = int((found.cpu() != codes).sum())
        assert special or differ <= 1 + x.numel() // 1000, (smooth, differ)
        format = smooth, bits
        check(
            ops.smooth_derivative_backward(
                grad.cuda(), codes.cuda(), *format, drawn=drawn
            ),
            ops.smooth_derivative_backward(grad, codes, *format, drawn=drawn),
        )
        format = smooth, bits, group_size
        torch.testing.assert_close(
            ops.smooth_decode(
                *cuda_payload, *layout, *format, drawn=drawn, **cuda_affine
            ),
            ops.smooth_decode(
                *payload, *layout, *format, drawn=drawn, **affine
            ).cuda(),
            equal_nan=True,
            **close,
        )
        found = ops.smooth_decode_backward(
            grad.cuda(), *cuda_payload, *format, drawn=drawn, **cuda_affine
        )
        wanted = ops.smooth_decode_backward(
            grad, *payload, *format, drawn=drawn, **affine
        ).cuda()
        # Where a derivative jumps, the last bit of an argument decides.
        same = torch.isclose(found, wanted, equal_nan=True, **close)
        assert int((~same).sum()) <= 1 + x.numel() // 1000, smooth


def run_dropout(x):
    """Dropout, in place and not."""
    expected = ops.dropout(x, 0.3, seed=1)
    check(ops.dropout(x.cuda(), 0.3, seed=1), expected)
    check(ops.dropout_(x.cuda(), 0.3, seed=1), expected)


def run_norm_act(x, relu, add, bits, group_size):
    """A fused normalisation, and what its codes decode to.

    Both widths of codes are ``bits``, but at 5 bits those of the output take
    6.
    """
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(4, x.shape[1], generator=generator)
    vectors[1] = vectors[1].exp()
    residual = x.flip(0).clone() if add else None
    act_bits = 6 if bits == 5 else bits
    format = (relu, bits, act_bits, group_size)
    cuda_residual = residual.cuda() if add else None
    cuda_vectors = vectors.cuda()
    run_batch_norm_act(x, residual, vectors, format)
    like = (x.shape, x.stride(), x.dtype)
    for random, drawn in randoms_of(group_size):
        expected = ops.norm_act(x, residual, *vectors, *format, **random)
        actual = ops.norm_act(
            x.cuda(), cuda_residual, *cuda_vectors, *format, **random
        )
        for output, wanted in zip(actual, expected):
            check(output, wanted)
        if add:
            own = (*like, act_bits, group_size)
            second = dict(drawn=drawn and drawn.second())
            check(
                ops.dequantize_zeroed(*actual[3:], *own, **second),
                ops.dequantize_zeroed(*expected[3:], *own, **second),
            )
        elif relu:
            own = (*like, bits, group_size)
            check(
                ops.dequantize_split(
                    *actual[1:3], *cuda_vectors[2:], *own, drawn=drawn
                ),
                ops.dequantize_split(
                    *expected[1:3], *vectors[2:], *own, drawn=drawn
                ),
            )


def run_batch_norm_act(x, residual, vectors, format):
    """A whole normalisation by running statistics, and its backward.

    Those of the batch, and sums, are equal but for rounding only.
    """
    mean, invstd, weight, bias = vectors
    relu, bits, act_bits, group_size = format

    def forward(device, inplace, random, drawn):
        mean_, var, weight_, bias_ = (
            v.to(device) for v in (mean, invstd.square(), weight, bias)
        )
        settings = ops.NormSettings(mean_, var, None, False, 0.1, 1e-5)
        op = ops.batch_norm_act_ if inplace else ops.batch_norm_act
        input = x.to(device, copy=True)
        added = None if residual is None else residual.to(device)
        found = op(input, added, weight_, bias_, settings, *format, **random)
        output, invstd_, codes = (input, *found) if inplace else found
        # The statistics are constants here: no sum goes into this gradient.
        grads = ops.batch_norm_act_backward(
            x.to(device),
            *codes[:2],
            codes[2] if relu and residual is not None else None,
            weight_,
            invstd_,
            relu,
            False,
            True,
            bits,
            act_bits,
            group_size,
            drawn=drawn,
        )[1]
        return output, invstd_, *codes, *grads

    # By turns in place and not.
    for turn, random in enumerate(randoms_of(group_size)):
        expected = forward('cpu', False, *random)
        actual = forward('cuda', turn % 2 == 0, *random)
        for output, wanted in zip(actual, expected):
            check(output, wanted)


def run_norm_acts(shape, dtype):
    """The fused normalisations of one shape, in both layouts."""
    count = 0
    for last, special in itertools.product((False, True), repeat=2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if special:
            x.view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        x = x.to(dtype)
        if last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        for mode, bits, group_size in itertools.product(
            NORM_MODES, (2, 3, 4, 5, 8), ops.GROUP_SIZES
        ):
            run_norm_act(x, *mode, bits, group_size)
            count += 1
    return count


def run_max_pool(x, window):
    """Max pooling and its backward."""
    expected, expected_indices, format = ops.max_pool2d(x, **window)
    output, indices, _ = ops.max_pool2d(x.cuda(), **window)
    check(output, expected)
    check(indices, expected_indices)
    check(
        ops.max_pool2d_backward(output, indices, format),
        ops.max_pool2d_backward(expected, expected_indices, format),
    )


def run_channel_stats(x):
    """Statistics of channels."""
    running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    cuda_running = [value.cuda() for value in running]
    expected = ops.channel_stats(x, 1e-5, 0.1, *running)
    actual = ops.channel_stats(x.cuda(), 1e-5, 0.1, *cuda_running)
    for one, other in zip((*actual, *cuda_running), (*expected, *running)):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)


def check_sums(actual, expected):
    """Compare sums on the GPU with the CPU's, but for rounding."""
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=1e-4, atol=1e-3, equal_nan=True
    )


def run_norm_grad(x, bits, relu):
    """Gradients of a normalisation that changes nothing."""
    for group_size in (64, 256):
        for random, drawn in randoms_of(group_size):
            # Dither of the larger groups takes the same way.
            if group_size == 64 or random['rotated']:
                run_norm_grad_of(x, bits, relu, group_size, random, drawn)


def run_norm_grad_of(x, bits, relu, group_size, random, drawn):
    """The same, rounded in one way."""
    grad = x.nan_to_num(0, 0, 0)
    zeros, ones = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    _, codes, ranges, *_ = ops.norm_act(
        *(x, None, zeros, ones, None, None, relu, bits, 0, group_size),
        **random,
    )
    scale = torch.linspace(-1, 1, x.shape[1])
    vectors = scale, torch.stack([scale / 4, scale / 8])
    payload = grad, codes, ranges
    cuda_payload = [tensor.cuda() for tensor in payload]
    format = dict(bits=bits, group_size=group_size, relu=relu, drawn=drawn)
    expected = ops.norm_grad_sums(*payload, **format)
    check_sums(ops.norm_grad_sums(*cuda_payload, **format), expected)
    check(
        ops.norm_grad_input(
            *cuda_payload, *(vector.cuda() for vector in vectors), **format
        ),
        ops.norm_grad_input(*payload, *vectors, **format),
    )
    if relu:
        return
    for act_bits in {max(bits, 2), 5}:
        # Any codes are zeroed ones, too.
        act_codes = ops.quantize(x, act_bits, group_size, seed=2)[0]
        format = bits, act_bits, group_size
        expected = ops.norm_add_grad_sums(
            *payload, act_codes, *format, drawn=drawn
        )
        actual = ops.norm_add_grad_sums(
            *cuda_payload, act_codes.cuda(), *format, drawn=drawn
        )
        check(actual[0], expected[0])
        check_sums(actual[1], expected[1])


def run_norm_grads():
    """Everything of a fused normalisation; returns how many payloads."""
    count = 0
    for shape, dtype, last in itertools.product(
        NORM_SHAPES + LONG_SHAPES, DTYPES, (False, True)
    ):
        if last and len(shape) != 4:
            continue
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).to(dtype)
        if last:
            x = x.to(memory_format=torch.channels_last)
        run_channel_stats(x)
        for bits in (3,) if shape in LONG_SHAPES else ops.VALID_BITS:
            for relu in (False, True) if bits > 1 else (False,):
                run_norm_grad(x, bits, relu)
                special = x.clone()
                special[0, :3, ...] = torch.inf
                run_norm_grad(special, bits, relu)
                count += 2
    return count


def run_resized_cross_entropy(sizes, dtype, align_corners):
    """Losses and gradient, of labels of both dtypes, with all weights."""
    size, out = sizes
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, generator=generator).to(dtype)
    labels = torch.randint(size[1], (size[0], *out), generator=generator)
    labels[0, 0] = 255
    weight = torch.rand(size[1], generator=generator)
    scale = torch.randn(labels.shape, generator=generator)
    for kind in (torch.int64, torch.uint8):
        results = []
        for device in ('cpu', 'cuda'):
            x, y, *factors = (
                tensor.to(device)
                for tensor in (logits, labels.to(kind), weight, scale)
            )
            settings = align_corners, 255
            losses, log_sums, _ = ops.resized_cross_entropy(
                x, y, factors[0], *settings
            )
            gradient = ops.resized_cross_entropy_backward(
                x, y, log_sums, *factors, *settings
            )
            results.append((losses.cpu(), log_sums.cpu(), gradient.cpu()))
        # Exponentials are the device's own; a rounded logit may differ.
        tolerance = 4 * torch.finfo(dtype).eps
        for actual, expected in zip(results[1], results[0]):
            torch.testing.assert_close(
                actual, expected, rtol=8 * tolerance, atol=8 * tolerance
            )


def main():
    """Run everything and count it."""
    count = 0
    for shape, dtype, special in itertools.product(
        SHAPES, DTYPES, (False, True)
    ):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if special:
            x[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        x = x.to(dtype)
        for arguments in RECTIFIERS:
            run_relu(x, arguments)
        run_dropout(x)
        for bits, group_size in itertools.product(
            ops.VALID_BITS, ops.GROUP_SIZES
        ):
            run_quantize(x, bits, group_size)
            if bits > 1:
                run_relu_codes(x, bits, group_size)
            if group_size in (64, 256):
                run_smooth(x, bits, group_size)
            count += 1
        for group_size in ops.GROUP_SIZES:
            run_rows(x, group_size)
    norms = sum(
        run_norm_acts(shape, dtype)
        for shape, dtype in itertools.product(NORM_SHAPES, DTYPES)
    )
    pools = 0
    for shape, dtype, window in itertools.product(
        POOL_SHAPES, DTYPES, WINDOWS
    ):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x[..., :2, :2] = -torch.inf
        x[..., -1, -1] = torch.nan
        run_max_pool(x.to(dtype), window)
        if x.dim() == 4:
            last = x.to(dtype, memory_format=torch.channels_last)
            run_max_pool(last, window)
        pools += 1
    norms += run_norm_grads()
    losses = 0
    for sizes, dtype, align_corners in itertools.product(
        LOSS_SIZES, DTYPES, (False, True)
    ):
        run_resized_cross_entropy(sizes, dtype, align_corners)
        losses += 1
    torch.cuda.synchronize()
    masks = len(SHAPES) * len(DTYPES) * 2
    print(
        f'{count} formats, {masks} masks, {pools} pools, {norms} norms, '
        f'{losses} losses: ok'
    )


if __name__ == '__main__':
    main()
