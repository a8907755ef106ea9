// The number format of the codes: how a group's range is kept, how a value
// becomes a code and a code a value. Host and device share every operation
// (none is contracted to a fused multiply-add), so their codes are equal bit
// for bit, and equal to those of mmactnn/ops/reference.py.
//
// A group of values is kept as unsigned codes of `bits` bits and a pair of
// bfloat16 numbers, `low` and `step`; code c stands for low + c * step. `low`
// is rounded down and `step` up, so that no value lies outside of the range
// and stochastic rounding stays unbiased.
//
// NaN and inf: a group that holds one has step = NaN and `low` the middle of
// its finite values; its codes then tell what stands where (Special below).
// One bit cannot tell them apart and decodes each as NaN.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "portability.h"

namespace mmactnn {

constexpr int kMaxBits = 8;
constexpr int kBlock = 8;                 // elements that share a Philox call
constexpr float kRandomScale = 65536.0f;  // 16 random bits an element
// Smaller steps would make kRandomScale / step overflow.
constexpr float kMinStep = 0x1p-111f;

enum Special : uint32_t {
  kFinite = 0,
  kPositiveInf = 1,
  kNegativeInf = 2,
  kNaN = 3,
};

MMACTNN_HOST_DEVICE constexpr uint32_t max_code_of(int bits) {
  return (1u << bits) - 1u;
}

MMACTNN_HOST_DEVICE uint32_t float_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

MMACTNN_HOST_DEVICE float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

MMACTNN_HOST_DEVICE bool is_nan(float value) {
  return (float_bits(value) & 0x7FFFFFFFu) > 0x7F800000u;
}

MMACTNN_HOST_DEVICE bool is_finite(float value) {
  return (float_bits(value) & 0x7F800000u) != 0x7F800000u;
}

MMACTNN_HOST_DEVICE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

MMACTNN_HOST_DEVICE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// A float whose lower 16 bits are zero: bfloat16 rounded towards -inf.
MMACTNN_HOST_DEVICE float bfloat16_down(float value) {
  uint32_t bits = float_bits(value);
  if ((bits >> 31) != 0u && (bits & 0xFFFFu) != 0u) bits += 0x10000u;
  return bits_float(bits & 0xFFFF0000u);
}

// The same towards +inf, for a value that is not negative.
MMACTNN_HOST_DEVICE float bfloat16_up(float value) {
  uint32_t bits = float_bits(value);
  if ((bits & 0xFFFFu) != 0u) bits += 0x10000u;
  return bits_float(bits & 0xFFFF0000u);
}

struct Range {
  float low;   // both hold bfloat16 numbers
  float step;  // NaN: the codes are of type Special

  MMACTNN_HOST_DEVICE bool special() const { return is_nan(step); }

  // Two bfloat16 in memory order (low, step), as one little-endian word.
  MMACTNN_HOST_DEVICE uint32_t pack() const {
    return (float_bits(low) >> 16) | (float_bits(step) & 0xFFFF0000u);
  }

  static MMACTNN_HOST_DEVICE Range unpack(uint32_t word) {
    return {bits_float(word << 16), bits_float(word & 0xFFFF0000u)};
  }
};

// The smallest and the largest finite value of a group; low > high if there is
// none.
struct Extent {
  float low;
  float high;
  bool all_finite;  // false when it holds a NaN or inf besides
};

// Elements times squared extent, FLT_MAX at most.
MMACTNN_HOST_DEVICE float group_spread(Extent extent, int64_t count) {
  if (extent.low > extent.high) return 0.0f;
  const float span = add(extent.high, -extent.low);
  const float spread =
      multiply(multiply(span, span), static_cast<float>(count));
  return spread < FLT_MAX ? spread : FLT_MAX;
}

MMACTNN_HOST_DEVICE Range make_range(Extent extent, uint32_t max_code) {
  const auto [low, high, all_finite] = extent;
  const float nan = bits_float(0x7FC00000u);
  if (all_finite) {
    // Adding +0 turns -0 into +0: which zero is smaller is nobody's business.
    const float base = bfloat16_down(add(low, 0.0f));
    const float span = add(high, -base);
    if (span == 0.0f) return {base, 0.0f};
    const float step = bfloat16_up(span / static_cast<float>(max_code));
    if (is_finite(base) && is_finite(step)) {
      return {base, step < kMinStep ? kMinStep : step};
    }
    // Too wide for a bfloat16 step: no value could be kept.
    return {nan, nan};
  }
  if (low > high) return {0.0f, nan};
  const float middle = add(multiply(low, 0.5f), multiply(high, 0.5f));
  return {bfloat16_down(add(middle, 0.0f)), nan};
}

// What a value is multiplied with before its random bits are added.
MMACTNN_HOST_DEVICE float encode_scale(Range range) {
  return range.step == 0.0f ? 0.0f : kRandomScale / range.step;
}

// floor((value - low) / step + u) with u = random16 / 2^16: the value rounded
// up with the probability of its distance from the code below. The code is
// what the sum has above its lower 16 bits.
MMACTNN_HOST_DEVICE uint32_t encode_sum(float value, float low, float scale,
                                        uint32_t random16) {
  const float scaled = multiply(add(value, -low), scale);
  const int32_t fixed = static_cast<int32_t>(add(scaled, 0.5f));
  return static_cast<uint32_t>(fixed) + random16;
}

// Up to this width no sum exceeds the highest code c: `step` is at least the
// span over c but for 2^-24 of it, so that `scaled` is at most c * 2^16 and,
// with three roundings for c <= 15, a quarter; half added, that is less than
// c * 2^16 + 1.
constexpr int kMaxUnclampedBits = 4;

MMACTNN_HOST_DEVICE uint32_t encode(float value, Range range, float scale,
                                    uint32_t random16, uint32_t max_code) {
  const uint32_t code = encode_sum(value, range.low, scale, random16) >> 16;
  return code < max_code ? code : max_code;
}

MMACTNN_HOST_DEVICE uint32_t encode_special(float value, Range range,
                                            uint32_t max_code) {
  uint32_t code = kFinite;
  if (is_nan(value) || is_nan(range.low)) {
    code = kNaN;
  } else if (!is_finite(value)) {
    code = value > 0.0f ? kPositiveInf : kNegativeInf;
  }
  return code < max_code ? code : max_code;
}

MMACTNN_HOST_DEVICE float decode(uint32_t code, Range range) {
  // The product is exact: 8 bits of code times 8 bits of significand.
  return add(multiply(static_cast<float>(code), range.step), range.low);
}

MMACTNN_HOST_DEVICE float decode_special(uint32_t code, Range range,
                                         uint32_t max_code) {
  const float inf = bits_float(0x7F800000u);
  if (code == kFinite) return range.low;
  if (max_code == 1u || code == kNaN) return bits_float(0x7FC00000u);
  return code == kPositiveInf ? inf : -inf;
}

// A range is a little wider than its values; near the largest number of the
// output's type it must not turn a finite value into inf.
MMACTNN_HOST_DEVICE float clamp_finite(float value, float largest) {
  const float upper = value > largest ? largest : value;
  return upper < -largest ? -largest : upper;
}

}  // namespace mmactnn
