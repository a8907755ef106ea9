// The number format of the codes: ranges of groups, encoding and decoding of
// values. Host and device share every operation (none is contracted to a fused
// multiply-add), so their codes are equal bit for bit, and equal to those of
// mmactnn/ops/reference.py.
//
// A group of values is kept as unsigned codes of `bits` bits and a pair of
// bfloat16 numbers, `low` and `step`; code c stands for low + c * step. `low`
// is rounded down and `step` up, so that no value lies outside of the range
// and stochastic rounding stays unbiased.
//
// NaN and inf: a group that holds one has step = NaN and `low` the middle of
// its finite values; its codes then give the place of each (Special below).
// One bit cannot tell them apart and decodes each as NaN.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "portability.h"

namespace mmactnn {

constexpr int kMaxBits = 8;
constexpr int kBlock = 8;                 // elements whose codes fill bytes
constexpr float kRandomScale = 65536.0f;  // 16 random bits an element
// Smaller steps would make kRandomScale / step overflow.
constexpr float kMinStep = 0x1p-111f;
// 2^23: in floats from here up to its double, the last bit counts ones.
constexpr uint32_t kIntegerFloat = 0x4B000000u;

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
MMACTNN_HOST_DEVICE float group_range_energy(Extent extent, int64_t count) {
  if (extent.low > extent.high) return 0.0f;
  const float span = add(extent.high, -extent.low);
  const float energy =
      multiply(multiply(span, span), static_cast<float>(count));
  return energy < FLT_MAX ? energy : FLT_MAX;
}

// span / max_code, rounded once.
MMACTNN_HOST_DEVICE float divide_by_code(float span, uint32_t max_code) {
  const auto divisor = static_cast<float>(max_code);
#ifdef __CUDA_ARCH__
  // By its rounded reciprocal, a constant where the code is, with the
  // remainder put right (Markstein's theorem). The remainder is exact for
  // every span whose quotient is above kMinStep.
  const float reciprocal = 1.0f / divisor;
  const float quotient = multiply(span, reciprocal);
  const float remainder = __fmaf_rn(-divisor, quotient, span);
  const float right = __fmaf_rn(remainder, reciprocal, quotient);
  // An infinite span has no remainder.
  return is_finite(quotient) ? right : quotient;
#else
  return span / divisor;
#endif
}

MMACTNN_HOST_DEVICE Range make_range(Extent extent, uint32_t max_code) {
  const auto [low, high, all_finite] = extent;
  const float nan = bits_float(0x7FC00000u);
  if (all_finite) {
    // Adding +0 turns -0 into +0, so that the order of zeros does not matter.
    const float base = bfloat16_down(add(low, 0.0f));
    const float span = add(high, -base);
    if (span == 0.0f) return {base, 0.0f};
    const float step = bfloat16_up(divide_by_code(span, max_code));
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

// The bits of a sum below the code: as many as the 23 bits that a float keeps
// leave, 16 at most.
MMACTNN_HOST_DEVICE constexpr int fraction_bits(uint32_t max_code) {
  return max_code < 128u ? 16 : 15;
}

// Factor of a value before its random bits are added.
MMACTNN_HOST_DEVICE float encode_scale(Range range, uint32_t max_code) {
  if (range.step == 0.0f) return 0.0f;
  const auto ones = static_cast<float>(1 << fraction_bits(max_code));
#ifdef __CUDA_ARCH__
  // The rounded quotient without a division: the correction of an approximate
  // reciprocal errs by 2^-46 of it, and the reciprocal of 8 significant bits
  // is no closer than 2^-34 to where rounding changes. The shift of the
  // exponent keeps all of that within the normal numbers.
  constexpr float kShift = 0x1p-8f;
  const float step = multiply(range.step, kShift);
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(step));
  reciprocal =
      __fmaf_rn(__fmaf_rn(-step, reciprocal, 1.0f), reciprocal, reciprocal);
  return multiply(reciprocal, ones * kShift);
#else
  return ones / range.step;
#endif
}

// Random bits of an element as a float to which its scaled value is added.
MMACTNN_HOST_DEVICE float rounding_of(uint32_t random16, int fraction) {
  return bits_float(kIntegerFloat | random16 >> (16 - fraction));
}

// floor((value - low) / step + u), u being the random bits as a fraction: the
// value rounded up with the probability of its distance from the code below.
// The sum is a float of 2^23 and above, whose last bits are an integer: its
// fraction and, above it, the code.
MMACTNN_HOST_DEVICE uint32_t encode_sum(float value, float low, float scale,
                                        float rounding) {
  return float_bits(add(multiply(add(value, -low), scale), rounding));
}

// Up to this highest code c no sum exceeds it: `step` is at least the span
// over c but for 2^-24 of it, so that the scaled value is at most c * 2^16 and,
// with three roundings, a quarter, which the sum rounds off.
constexpr uint32_t kMaxUnclampedCode = 15;

// The largest sum of a code.
MMACTNN_HOST_DEVICE constexpr uint32_t largest_sum(uint32_t max_code) {
  return kIntegerFloat + ((max_code + 1u) << fraction_bits(max_code)) - 1u;
}

MMACTNN_HOST_DEVICE uint32_t encode(float value, Range range, float scale,
                                    uint32_t random16, uint32_t max_code) {
  const int fraction = fraction_bits(max_code);
  const uint32_t sum =
      encode_sum(value, range.low, scale, rounding_of(random16, fraction));
  const uint32_t largest = largest_sum(max_code);
  return ((sum < largest ? sum : largest) - kIntegerFloat) >> fraction;
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

// As clamp_finite(), but a number that is infinite stays so.
MMACTNN_HOST_DEVICE float clamp_if_finite(float value, float largest) {
  return is_finite(value) ? clamp_finite(value, largest) : value;
}

}  // namespace mmactnn
