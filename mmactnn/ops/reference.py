"""The kernels in plain torch: executable specification and test oracle.

Slow on purpose. Codes equal those of the compiled kernels, bit for bit.
"""

import torch

from . import rotation_reference as rotation
from .philox_reference import pair_words, philox
from .rotation import rotates, rotates_zeroed

_MIN_STEP = 2.0**-111
_POSITIVE_INF, _NEGATIVE_INF, _NAN = 1, 2, 3


def _bfloat16_outward(value, towards_inf):
    bits = value.view(torch.int32)
    truncated = bits & -65536
    grows = bits > 0 if towards_inf else bits < 0
    inexact = (bits & 0xFFFF) != 0
    carry = (grows & inexact).to(torch.int32) << 16
    return (truncated + carry).view(torch.float32)


def _make_range(groups, valid, levels):
    """(low, step) of groups (Tensor[G, S]) whose padding is not valid."""
    inf = float('inf')
    finite = groups.isfinite() & valid
    low = groups.where(finite, inf).amin(1)
    high = groups.where(finite, -inf).amax(1)
    special = (valid & ~groups.isfinite()).any(1)

    base = _bfloat16_outward(low + 0.0, towards_inf=False)
    span = high - base
    step = _bfloat16_outward(span / levels, towards_inf=True)
    step = step.clamp(min=_MIN_STEP).where(span != 0, 0.0)
    overflow = ~(base.isfinite() & step.isfinite()) & ~special
    nan = torch.full_like(step, float('nan'))
    middle = (low * 0.5 + high * 0.5).where(low <= high, 0.0)
    middle = _bfloat16_outward(middle + 0.0, towards_inf=False)
    base = torch.where(special, middle, torch.where(overflow, nan, base))
    return base, torch.where(special | overflow, nan, step)


def _make_groups(input, group_size):
    """Groups (Tensor[G, S]) of a tensor, and the mask of valid elements."""
    rows, row_numel = input.shape[0], input[:1].numel()
    order = sorted(range(1, input.dim()), key=lambda d: -input.stride(d))
    flat = input.permute(0, *order).reshape(rows, row_numel).float()
    row_groups = -(-row_numel // group_size)
    padded = flat.new_zeros(rows, row_groups * group_size)
    padded[:, :row_numel] = flat
    valid = torch.zeros_like(padded, dtype=torch.bool)
    valid[:, :row_numel] = True
    return padded.view(-1, group_size), valid.view(-1, group_size)


def _pack(codes, bits):
    """Bytes (Tensor[N, B * bits]) of codes (Tensor[N, B * 8])."""
    shifts = torch.arange(bits, device=codes.device)
    stream = codes[..., None] >> shifts & 1
    shifts = torch.arange(8, device=codes.device)
    stream = stream.reshape(codes.shape[0], codes.shape[1] // 8 * bits, 8)
    return (stream << shifts).sum(-1).to(torch.uint8)


def _pack_rows(codes, tensor, bits):
    """:func:`_pack` of the codes (Tensor[G, S]) of a tensor's groups."""
    rows, row_blocks = tensor.shape[0], -(-tensor[:1].numel() // 8)
    padded = codes.numel() // rows if rows else 0
    return _pack(codes.reshape(rows, padded)[:, : row_blocks * 8], bits)


def _unpack(packed, bits):
    """The inverse of :func:`_pack`."""
    shifts = torch.arange(8, device=packed.device)
    stream = packed[..., None].long() >> shifts & 1
    shifts = torch.arange(bits, device=packed.device)
    stream = stream.reshape(packed.shape[0], packed.shape[1] // bits * 8, bits)
    return (stream << shifts).sum(-1)


def _moved(offset, offset_tensor):
    """Sum of an offset and an optional tensor of one element."""
    return offset if offset_tensor is None else offset + int(offset_tensor)


def quantize(
    input,
    bits,
    group_size,
    seed,
    offset,
    offset_tensor=None,
    rotated=False,
):
    """Specification of :func:`mmactnn.ops.quantize`, same arguments."""
    offset = _moved(offset, offset_tensor)
    levels = 2**bits - 1
    rows, row_numel = input.shape[0], input[:1].numel()
    row_blocks = -(-row_numel // 8)
    row_groups = -(-row_numel // group_size)
    groups, valid = _make_groups(input, group_size)

    if groups.numel() == 0:
        return (
            input.new_zeros((rows, row_blocks * bits), dtype=torch.uint8),
            input.new_zeros((rows, row_groups, 2), dtype=torch.bfloat16),
        )
    if rotated and rotates(row_numel, bits):
        codes, means, scale = rotation.encode(
            groups, valid, True, bits, seed, offset
        )
        ranges = torch.stack([means[:, 1], scale], -1)
        return _pack_rows(codes, input, bits), _ranges(ranges, rows)
    low, step = _make_range(groups, valid, levels)
    low_, step_ = low[:, None], step[:, None]

    random = _random16(rows, row_numel, group_size, seed, offset, input.device)
    codes = _round(groups, low_, step_, levels, random)

    special = torch.zeros_like(codes)
    special[groups == float('inf')] = _POSITIVE_INF
    special[groups == -float('inf')] = _NEGATIVE_INF
    special[groups.isnan() | low_.isnan()] = _NAN
    codes = torch.where(step_.isnan(), special.clamp(max=levels), codes)

    ranges = torch.stack([low, step], -1)
    return _pack_rows(codes * valid, input, bits), _ranges(ranges, rows)


def _ranges(numbers, rows):
    """Ranges (Tensor[N, G, R]) of all groups (Tensor[N * G, R])."""
    count, width = numbers.shape
    groups = count // rows if rows else 0
    return numbers.view(rows, groups, width).to(torch.bfloat16)


def dequantize(
    codes, ranges, size, stride, dtype, bits, group_size, drawn=None
):
    """Specification of :func:`mmactnn.ops.dequantize`, same arguments."""
    out = torch.empty_strided(size, stride, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    # Codes of 0 are exact where 0 is the smallest value.
    value = _decode_plain(
        codes, ranges, out, bits, group_size, drawn, lambda low: low != 0
    )
    largest = torch.finfo(dtype).max
    clamped = value.clamp(-largest, largest)
    special = ranges[..., 1].isnan().repeat_interleave(group_size, 1)
    special = _per_element(special[:, : out[:1].numel()], out)
    return out.copy_(torch.where(special, value, clamped))


def _random16(rows, row_numel, group_size, seed, offset, device, first_row=0):
    """16 random bits (Tensor[G, S]) for each element of the groups."""
    row_blocks = -(-row_numel // 8)
    row_groups = -(-row_numel // group_size)
    starts = (torch.arange(rows, device=device) + first_row) * row_blocks
    blocks = torch.arange(row_groups * group_size // 8, device=device)
    blocks = (starts[:, None] + blocks).flatten()
    words = pair_words(blocks, seed, offset).flatten()
    # Element i of a word takes bytes i and i + 1.
    twice = words | (words & 0xFF) << 32
    return torch.stack(
        [twice >> shift & 0xFFFF for shift in (0, 8, 16, 24)], -1
    ).view(-1, group_size)


def _row_random16(out, group_size, drawn):
    """16 random bits (Tensor[N, M]) of each element, in memory order."""
    rows, row_numel = out.shape[0], out[:1].numel()
    random = _random16(
        rows,
        row_numel,
        group_size,
        drawn.seed,
        _moved(drawn.offset, drawn.offset_tensor),
        out.device,
        drawn.first_row,
    )
    padded = -(-row_numel // group_size) * group_size
    return random.view(rows, padded)[:, :row_numel]


def _decode(code, low, step, levels, random=None, has_dither=None):
    """Values of codes that are not special, in float32.

    Args:
        code (Tensor[N, M]): int64.
        low (Tensor[N, M]): float32.
        step (Tensor[N, M]): float32.
        levels (int): The highest code.
        random (Tensor[N, M], optional): int64, 16 random bits; None: no
            dither.
        has_dither (Tensor[N, M], optional): Whether there is dither; None:
            everywhere.

    Returns:
        Tensor[N, M]: float32.
    """
    plain = code * step + low
    if random is None:
        return plain
    fraction = 16 if levels < 128 else 15
    unit = step * 2.0**-fraction
    rest = (1 << fraction) - 1 - (random >> (16 - fraction))
    number = (code << fraction) + rest - (1 << fraction - 1)
    # Rounded once: products and sums are exact in float64.
    exact = number.double() * unit.double() + (low + unit * 0.5).double()
    if has_dither is None:
        return exact.float()
    return torch.where(has_dither, exact.float(), plain)


def _round(groups, low, step, levels, random):
    """Codes of finite values; those of others are undefined."""
    fraction = 16 if levels < 128 else 15
    scale = (2.0**fraction / step).where(step != 0, 0.0)
    rounding = 2.0**23 + (random >> 16 - fraction).float()
    sums = (groups - low) * scale + rounding
    sums = sums.nan_to_num(0, 0, 0).clamp(2.0**23, 2.0**24).long() - 2**23
    return (sums >> fraction).clamp(max=levels)


def _encode_kind(groups, kind, levels, random):
    """Codes and range of the elements of a kind; (0, 0) if there are none.

    Special codes may be larger than ``levels``.
    """
    low, step = _make_range(groups, kind, levels)
    none = ~kind.any(1)
    low, step = low.where(~none, 0.0), step.where(~none, 0.0)
    low_, step_ = low[:, None], step[:, None]
    codes = _round(groups, low_, step_, levels, random)
    special = torch.zeros_like(codes)
    special[groups == float('inf')] = _POSITIVE_INF
    special[groups == -float('inf')] = _NEGATIVE_INF
    special[groups.isnan() | low_.isnan()] = _NAN
    return torch.where(step_.isnan(), special, codes), low, step


def _split_codes(value, positive, bits, group_size, seed, offset, rotated):
    """Split codes of ``value`` (Tensor[N, *]), see rectified_codec.h."""
    rows, row_numel = value.shape[0], value[:1].numel()
    levels = 2 ** (bits - 1) - 1
    groups, valid = _make_groups(value, group_size)
    kinds = _make_groups(positive, group_size)[0] != 0
    if rotated and rotates(row_numel, bits - 1):
        codes, means, scale = rotation.encode(
            groups, kinds, True, bits - 1, seed, offset
        )
        codes = codes | kinds.long() << (bits - 1)
        ranges = torch.cat([means, scale[:, None]], -1)
        return _pack_rows(codes, value, bits), _ranges(ranges, rows)
    random = _random16(rows, row_numel, group_size, seed, offset, value.device)
    codes, ranges = torch.zeros_like(random), []
    for sign, kind in enumerate([valid & ~kinds, valid & kinds]):
        code, low, step = _encode_kind(groups, kind, levels, random)
        code = code.clamp(max=levels) + (sign << (bits - 1))
        codes = torch.where(kind, code, codes)
        ranges += [low, step]
    ranges = torch.stack(ranges, -1)
    return _pack_rows(codes, value, bits), _ranges(ranges, rows)


def _zeroed_codes(value, bits, group_size, seed, offset, rotated):
    """Zeroed codes of a rectifier's output, see rectified_codec.h."""
    rows, row_numel = value.shape[0], value[:1].numel()
    levels = 2**bits - 2
    groups, valid = _make_groups(value, group_size)
    kind = valid & ~(groups <= 0)
    if rotated and rotates_zeroed(row_numel, bits):
        codes, means, scale = rotation.encode(
            groups, kind, False, bits - 1, seed, offset
        )
        codes = codes | kind.long() << (bits - 1)
        ranges = torch.stack([means[:, 1], scale], -1)
        return _pack_rows(codes, value, bits), _ranges(ranges, rows)
    random = _random16(rows, row_numel, group_size, seed, offset, value.device)
    codes, low, step = _encode_kind(groups, kind, levels, random)
    nan = step.isnan()[:, None] & (codes == _NAN)
    codes = torch.where(kind, codes.where(~nan, 2) + 1, 0)
    ranges = torch.stack([low, step], -1)
    return _pack_rows(codes, value, bits), _ranges(ranges, rows)


def _per_element(tensor, out):
    """Reshape rows of numbers in memory order to the layout of ``out``."""
    order = sorted(range(1, out.dim()), key=lambda d: -out.stride(d))
    shape = out.permute(0, *order).shape
    inverse = [0] + [order.index(d) + 1 for d in range(1, out.dim())]
    return tensor.reshape(shape).permute(inverse)


def _special_values(code, low, has_inf):
    """Values of special codes; at one bit all others than 0 are NaN."""
    nan, inf = float('nan'), float('inf')
    special = torch.full_like(low, nan)
    if has_inf:
        special = torch.where(code == _POSITIVE_INF, inf, special)
        special = torch.where(code == _NEGATIVE_INF, -inf, special)
    return torch.where(code == 0, low, special)


def _passes(unpacked, bits, rotated):
    """Whether the elements of zeroed codes (Tensor[N, M]) pass."""
    if rotated and rotates_zeroed(unpacked.shape[1], bits):
        return unpacked >> (bits - 1) == 1
    return unpacked != 0


def _decode_rotated(code, mean, scale, bits, drawn):
    """Values of rotated codes of rows.

    Args:
        code (Tensor[N, M]): int64.
        mean (Tensor[N, M]): float32, mean of the kind of each element.
        scale (Tensor[N, G]): float32.
        bits (int): Bits of a code.
        drawn (DrawnBits): Random bits.

    Returns:
        Tensor[N, M]: float32.
    """
    row_groups = scale.shape[1]
    first = drawn.first_row * row_groups
    groups = torch.arange(scale.numel(), device=code.device) + first
    values = rotation.decode(
        code.reshape(-1, 256),
        mean.reshape(-1, 256),
        scale.flatten(),
        bits,
        groups,
        drawn.seed,
        _moved(drawn.offset, drawn.offset_tensor),
    )
    return values.view(code.shape)


def _is_rotated(drawn, row_numel, bits, rule=rotates):
    return drawn is not None and drawn.rotated and rule(row_numel, bits)


def _decode_split(codes, ranges, out, bits, group_size, drawn=None):
    """Values (float32, in shape and layout of ``out``) and their kinds."""
    row_numel = out[:1].numel()
    levels = 2 ** (bits - 1) - 1
    unpacked = _unpack(codes, bits)[:, :row_numel]
    positive = unpacked >> (bits - 1) == 1
    code = unpacked & levels
    if _is_rotated(drawn, row_numel, bits - 1):
        ranges = ranges.float()
        means = ranges.repeat_interleave(group_size, 1)
        mean = torch.where(positive, means[..., 1], means[..., 0])
        value = _decode_rotated(code, mean, ranges[..., 2], bits - 1, drawn)
        return _per_element(value, out), _per_element(positive, out)
    ranges = ranges.float().repeat_interleave(group_size, 1)[:, :row_numel]
    low = torch.where(positive, ranges[..., 2], ranges[..., 0])
    step = torch.where(positive, ranges[..., 3], ranges[..., 1])
    random = drawn and _row_random16(out, group_size, drawn)
    value = _decode(code, low, step, levels, random)
    special = _special_values(code, low, bits > 2)
    value = torch.where(step.isnan(), special, value)
    return _per_element(value, out), _per_element(positive, out)


def _decode_plain(
    codes, ranges, out, bits, group_size, drawn=None, has_dither=None
):
    """Values (float32, in shape and layout of ``out``)."""
    row_numel = out[:1].numel()
    code = _unpack(codes, bits)[:, :row_numel]
    if _is_rotated(drawn, row_numel, bits):
        ranges = ranges.float()
        mean = ranges[..., 0].repeat_interleave(group_size, 1)
        value = _decode_rotated(code, mean, ranges[..., 1], bits, drawn)
        return _per_element(value, out)
    ranges = ranges.float().repeat_interleave(group_size, 1)[:, :row_numel]
    low, step = ranges.unbind(-1)
    random = drawn and _row_random16(out, group_size, drawn)
    value = _decode(
        code,
        low,
        step,
        2**bits - 1,
        random,
        has_dither and has_dither(low),
    )
    special = _special_values(code, low, bits > 1)
    return _per_element(torch.where(step.isnan(), special, value), out)


def _channels(vector, out):
    """Reshape a vector of channels to broadcast over ``out``."""
    return vector.view(-1, *[1] * (out.dim() - 2))


def _strided_like(values, out):
    return torch.empty_like(out).copy_(values)


def channel_stats(input, eps, momentum, running_mean, running_var):
    """Specification of :func:`mmactnn.ops.channel_stats`."""
    dims = [d for d in range(input.dim()) if d != 1]
    var, mean = torch.var_mean(input.double(), dims, correction=0)
    count = input.numel() // input.shape[1]
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = var * count / (count - 1)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    invstd = (var + eps).rsqrt()
    return mean.float(), var.float(), invstd.float()


def norm_act(
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
    offset_tensor=None,
    rotated=False,
):
    """Specification of :func:`mmactnn.ops.norm_act`, same arguments."""
    offset = _moved(offset, offset_tensor)
    normal = (input.float() - _channels(mean, input)) * _channels(
        invstd, input
    )
    total = normal
    if weight is not None:
        total = total * _channels(weight, input)
    if bias is not None:
        total = total + _channels(bias, input)
    if residual is not None:
        total = total + residual.float()
    output = _strided_like(total.to(input.dtype), input)
    normal = _strided_like(normal, input.float())
    if relu:
        output = output.where(~(output <= 0), 0.0)
    output = _strided_like(output, input)
    act = (
        input.new_empty(0, dtype=torch.uint8),
        input.new_empty(0, dtype=torch.bfloat16),
    )
    if relu and residual is None:
        positive = _strided_like(~(output <= 0), input.to(torch.bool))
        codes = _split_codes(
            normal, positive, bits, group_size, seed, offset, rotated
        )
    else:
        codes = quantize(normal, bits, group_size, seed, offset, None, rotated)
    if residual is not None:
        # Zeroed codes have a stream of their own, with the highest bit of the
        # counter set.
        act = _zeroed_codes(
            output, act_bits, group_size, seed, offset ^ (1 << 63), rotated
        )
    return output, *codes, *act


def norm_grad_sums(
    grad_output, codes, ranges, bits, group_size, relu, drawn=None
):
    """Specification of :func:`mmactnn.ops.norm_grad_sums`."""
    decode = _decode_split if relu else _decode_plain
    normal = decode(codes, ranges, grad_output, bits, group_size, drawn)
    grad = grad_output.double()
    if relu:
        normal, positive = normal
        grad = grad.where(positive, 0.0)
    dims = [d for d in range(grad.dim()) if d != 1]
    sums = [grad.sum(dims), (grad * normal).sum(dims)]
    return torch.stack(sums).float()


def norm_add_grad_sums(
    grad_output,
    codes,
    ranges,
    act_codes,
    bits,
    act_bits,
    group_size,
    drawn=None,
):
    """Specification of :func:`mmactnn.ops.norm_add_grad_sums`."""
    rotated = bool(drawn and drawn.rotated)
    grad = relu_codes_backward(grad_output, act_codes, act_bits, rotated)
    sums = norm_grad_sums(grad, codes, ranges, bits, group_size, False, drawn)
    return grad, sums


def norm_grad_input(
    grad_output,
    codes,
    ranges,
    scale,
    means,
    bits,
    group_size,
    relu,
    drawn=None,
):
    """Specification of :func:`mmactnn.ops.norm_grad_input`."""
    decode = _decode_split if relu else _decode_plain
    normal = decode(codes, ranges, grad_output, bits, group_size, drawn)
    grad = grad_output.float()
    if relu:
        normal, positive = normal
        grad = grad.where(positive, 0.0)
    shifted = grad - _channels(means[0], grad)
    shifted = shifted - normal * _channels(means[1], grad)
    result = shifted * _channels(scale, grad)
    return _strided_like(result.to(grad_output.dtype), grad_output)


def dequantize_split(
    codes,
    ranges,
    weight,
    bias,
    size,
    stride,
    dtype,
    bits,
    group_size,
    drawn=None,
):
    """Specification of :func:`mmactnn.ops.dequantize_split`."""
    out = torch.empty_strided(size, stride, dtype=dtype, device=codes.device)
    normal, positive = _decode_split(
        codes, ranges, out, bits, group_size, drawn
    )
    if weight is not None:
        normal = normal * _channels(weight, out)
    if bias is not None:
        normal = normal + _channels(bias, out)
    largest = torch.finfo(dtype).max
    value = normal.clamp(-largest, largest).where(normal.isfinite(), normal)
    return out.copy_(value.where(positive, 0.0))


def dequantize_zeroed(
    codes, ranges, size, stride, dtype, bits, group_size, drawn=None
):
    """Specification of :func:`mmactnn.ops.dequantize_zeroed`."""
    out = torch.empty_strided(size, stride, dtype=dtype, device=codes.device)
    row_numel = out[:1].numel()
    unpacked = _unpack(codes, bits)[:, :row_numel]
    largest = torch.finfo(dtype).max
    if _is_rotated(drawn, row_numel, bits, rotates_zeroed):
        ranges = ranges.float()
        passes = _passes(unpacked, bits, True)
        mean = ranges[..., 0].repeat_interleave(group_size, 1)
        code = unpacked & 2 ** (bits - 1) - 1
        value = _decode_rotated(code, mean, ranges[..., 1], bits - 1, drawn)
        value = value.clamp(-largest, largest).where(passes, 0.0)
        return out.copy_(_per_element(value, out))
    ranges = ranges.float().repeat_interleave(group_size, 1)[:, :row_numel]
    low, step = ranges.unbind(-1)
    code = unpacked - 1
    random = drawn and _row_random16(out, group_size, drawn)
    value = _decode(code, low, step, 2**bits - 2, random)
    value = value.clamp(-largest, largest)
    special = torch.where(code == 1, float('inf'), float('nan'))
    special = torch.where(code == 0, low, special)
    value = torch.where(step.isnan(), special, value)
    return out.copy_(_per_element(value.where(unpacked != 0, 0.0), out))


def _row_bytes(row_numel, bits):
    """Bytes of a row of codes, with and without padding."""
    blocks = -(-row_numel // 8)
    return -(-blocks // 8) * 8 * bits, blocks * bits


def quantize_rows(
    input,
    row_bits,
    row_starts,
    total_bits,
    group_size,
    seed,
    offset,
    offset_tensor=None,
    rotated=False,
):
    """Specification of :func:`mmactnn.ops.quantize_rows`, same arguments."""
    offset = _moved(offset, offset_tensor)
    row_numel = input[:1].numel()
    codes = input.new_zeros(
        _row_bytes(row_numel, total_bits)[0], dtype=torch.uint8
    )
    ranges = quantize(input, 1, group_size, seed, offset)[1]
    widths = zip(row_bits.tolist(), row_starts.tolist())
    for n, (bits, start) in enumerate(widths):
        whole = quantize(input, bits, group_size, seed, offset, None, rotated)
        first = _row_bytes(row_numel, start)[0]
        codes[first : first + whole[0].shape[1]] = whole[0][n]
        ranges[n] = whole[1][n]
    return codes, ranges


def dequantize_rows(
    codes,
    ranges,
    row_bits,
    row_starts,
    size,
    stride,
    dtype,
    group_size,
    drawn=None,
):
    """Specification of :func:`mmactnn.ops.dequantize_rows`."""
    out = torch.empty_strided(size, stride, dtype=dtype, device=codes.device)
    widths = zip(row_bits.tolist(), row_starts.tolist())
    for n, (bits, start) in enumerate(widths):
        first = _row_bytes(out[:1].numel(), start)[0]
        length = _row_bytes(out[:1].numel(), bits)[1]
        out[n] = dequantize(
            codes[None, first : first + length],
            ranges[n : n + 1],
            (1, *size[1:]),
            stride,
            dtype,
            bits,
            group_size,
            drawn and drawn.at_row(n),
        )[0]
    return out


def sample_range_energy(input, group_size):
    """Specification of :func:`mmactnn.ops.sample_range_energy`.

    Equal but for the rounding of sums.
    """
    groups, valid = _make_groups(input, group_size)
    inf, largest = float('inf'), torch.finfo(torch.float32).max
    if groups.numel() == 0:
        return input.new_zeros(input.shape[0], dtype=torch.float32)
    finite = groups.isfinite() & valid
    span = groups.where(finite, -inf).amax(1) - groups.where(finite, inf).amin(
        1
    )
    span = span.where(finite.any(1), 0.0)
    energies = (span * span * valid.sum(1)).clamp(max=largest).double()
    total = energies.view(input.shape[0], -1).sum(1)
    return total.clamp(max=largest).float()


def allocate_sample_bits(sensitivity, total_bits):
    """Specification of :func:`mmactnn.ops.allocate_sample_bits`."""
    rows = sensitivity.shape[0]
    largest = torch.finfo(torch.float32).max
    weight = sensitivity.nan_to_num(largest, largest).clamp(min=0.0)
    factors = [1 / (2**bits - 1) ** 2 for bits in range(1, 9)]
    unit_gain = torch.tensor(
        [now - then for now, then in zip(factors, factors[1:])]
    ).to(sensitivity)
    # Of equal gains that of fewer bits comes first, then of the lower row.
    gains = (weight * unit_gain[:, None]).view(-1)
    order = gains.sort(descending=True, stable=True).indices
    taken = torch.zeros_like(gains, dtype=torch.int32)
    taken[order[: total_bits - rows]] = 1
    row_bits = 1 + taken.view(-1, rows).sum(0)
    row_starts = row_bits.cumsum(0) - row_bits
    return row_bits.to(torch.uint8), row_starts.to(torch.int32)


def _memory_order(tensor):
    """The dimensions of a dense tensor, outermost in memory first."""
    return sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))


def _pack_bits(values, bits):
    """Bytes of unsigned numbers of a few bits, the first in the lowest."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(values, (0, -values.numel() % per_byte))
    shifts = torch.arange(per_byte, device=values.device) * bits
    packed = padded.view(-1, per_byte).long() << shifts
    return packed.sum(-1).to(torch.uint8)


def relu_mask(input, max=None, slope=None):
    """Specification of :func:`mmactnn.ops.relu_mask`."""
    if slope is None:
        keep = ~(input <= 0)
        rest = torch.zeros_like(input)
    else:
        keep = input > 0
        rest = (input.float() * slope).to(input.dtype)
    if max is not None:
        keep &= ~(input >= max)
        rest = rest.where(~(input >= max), max)
    mask = _pack_bits(keep.permute(_memory_order(input)).reshape(-1), bits=1)
    return input.where(keep, rest), mask


def relu_codes(
    input,
    bits,
    group_size,
    seed,
    offset,
    offset_tensor=None,
    rotated=False,
):
    """Specification of :func:`mmactnn.ops.relu_codes`, same arguments."""
    offset = _moved(offset, offset_tensor)
    output = _strided_like(input.where(~(input <= 0), 0.0), input)
    codes = _zeroed_codes(output, bits, group_size, seed, offset, rotated)
    return output, *codes


def relu_codes_backward(grad_output, codes, bits, rotated=False):
    """Specification of :func:`mmactnn.ops.relu_codes_backward`."""
    row_numel = grad_output[:1].numel()
    positive = _passes(_unpack(codes, bits)[:, :row_numel], bits, rotated)
    positive = _per_element(positive, grad_output)
    return _strided_like(grad_output.where(positive, 0.0), grad_output)


def dropout(input, p, seed, offset=0, offset_tensor=None):
    """Specification of :func:`mmactnn.ops.dropout`."""
    offset = _moved(offset, offset_tensor)
    threshold = min(round(p * 65536), 65535)
    blocks = torch.arange(-(-input.numel() // 8), device=input.device)
    words = philox(blocks, seed, offset)
    random = torch.stack([words & 0xFFFF, words >> 16], -1).flatten()
    factor = torch.full(
        (input.numel(),), 65536 / (65536 - threshold), device=input.device
    )
    factor[random[: input.numel()] < threshold] = 0
    output = torch.empty_like(input)
    view = output.permute(_memory_order(input))
    flat = input.permute(_memory_order(input)).flatten().float()
    view.copy_((flat * factor).view(view.shape))
    return output


def max_pool2d(input, format, output_size):
    """Specification of :func:`mmactnn.ops.max_pool2d`.

    Args:
        input (Tensor[N, C, H, W]): float32, float16 or bfloat16.
        format (PoolFormat): The window.
        output_size (tuple[int, int]): Height and width of the output.

    Returns:
        tuple[Tensor, Tensor]: The output and the positions.
    """
    maximum = input.new_full((*input.shape[:-2], *output_size), -torch.inf)
    tap = torch.zeros_like(maximum, dtype=torch.long)
    found = torch.zeros_like(maximum, dtype=torch.bool)
    for row, column, index, inside in _taps(format, output_size):
        value = input[..., row[:, None], column]
        better = ~found | (value > maximum) | value.isnan()
        better &= inside.to(input.device)
        maximum = value.where(better, maximum)
        tap = tap.masked_fill(better, index)
        found |= better
    if format.channels_last:
        tap = tap.permute(0, 2, 3, 1)
        maximum = maximum.contiguous(memory_format=torch.channels_last)
    return maximum, _pack_bits(tap.reshape(-1), bits=4)


def _taps(format, output_size):
    """Rows and columns of the input, index and validity, for every tap."""
    indices = [torch.arange(size) for size in output_size]
    for tap_row in range(format.kernel_size[0]):
        for tap_column in range(format.kernel_size[1]):
            places, inside = [], []
            for d, tap in enumerate((tap_row, tap_column)):
                place = indices[d] * format.stride[d] - format.padding[d]
                place = place + tap * format.dilation[d]
                size = format.input_size[d]
                inside.append((place >= 0) & (place < size))
                places.append(place.clamp(0, size - 1))
            index = tap_row * format.kernel_size[1] + tap_column
            yield *places, index, inside[0][:, None] & inside[1]


def max_pool2d_backward(grad_output, indices, format):
    """Specification of :func:`mmactnn.ops.max_pool2d_backward`.

    In float64, hence equal to the sums of the kernels but for rounding.
    """
    output_size = grad_output.shape[-2:]
    halves = torch.stack([indices & 15, indices >> 4], -1).flatten()
    shape = grad_output.shape
    halves = halves[: grad_output.numel()]
    if format.channels_last:
        n, c, h, w = shape
        tap = halves.view(n, h, w, c).permute(0, 3, 1, 2)
    else:
        tap = halves.view(shape)
    grad = grad_output.new_zeros(
        (*shape[:-2], *format.input_size), dtype=torch.float64
    )
    for row, column, index, inside in _taps(format, output_size):
        chosen = (tap == index) & inside.to(tap.device)
        place = row[:, None] * format.input_size[1] + column
        grad.flatten(-2).index_add_(
            -1,
            place.flatten().to(tap.device),
            grad_output.double().where(chosen, 0).flatten(-2),
        )
    return grad.to(grad_output.dtype)
