// Rotated codes: a group of 256 values is turned by a random rotation, after
// which every coefficient is nearly normally distributed whatever the values
// are, and rounded to the nearest of 2^bits levels for that distribution.
//
// From the values x of a group the mean m of those of their kind is taken away
// (kinds are the elements that a rectifier lets pass, and the others). The rest
// r is rounded at random to integers v of 8 bits times a power of two, and
// rotated:
//
//   y = A S B S A s v,  v in proportion to s A S B S A y
//
// for random signs s and S, which are a shifted copy of s, and Hadamard
// matrices A and B of order 16 over half of the bits of an element's place
// each. (A and B once would do for values of all kinds but few large ones among
// many small ones, whose coefficients are sums of the same few numbers.)
// Coefficients have the root mean square 4 |v|. Code c of a coefficient stands
// for the odd number q = 2 c - (2^bits - 1), in units of half a step of that.
// Decoded is
//
//   x' = m + scale * s A S B S A q,  scale = r / v * <v, v> / <y, q>,
//
// whose projection on v is v but for the rounding of `scale`. The rest
// of the error is orthogonal to r and, as rotations are random, of any
// direction: x' is unbiased but for a small rest, since there are other
// rotations than these (EDEN: S. Vargaftik et al., "EDEN:
// Communication-efficient and robust distributed mean estimation for federated
// learning", ICML'22). For normal coefficients the variance is <r, r> / 256
// times D / (1 - D), D being the squared error of the levels.
//
// Levels are at equal distances, those of J. Max, "Quantizing for minimum
// distortion" (IRE Transactions on Information Theory, 1960), Table II: at 2
// and 3 bits their squared error is 1 % and 8 % above that of levels at any
// distances (Table I). All sums but those of means are of small integers, and
// hence exact in any order and on any device: of those before the third matrix,
// of which tensor cores take 11 bits, the encoder drops lower ones.
//
// A group's range is its mean and `scale` (bfloat16, NaN where a value of the
// group is not finite); that of split codes is the mean of the elements that do
// not pass, of those that do, and `scale`. Split and zeroed codes of b bits
// have the highest bit set for elements that pass, and b - 1 bits for the
// coefficient of the element's place; zeroed ones stand for 0 where it is not.
#pragma once

#include <cmath>
#include <cstdint>

#include "codec.h"
#include "dither.h"
#include "geometry.h"
#include "philox.h"
#include "portability.h"

namespace mmactnn {

constexpr int kRotation = 256;  // elements of a group
// More bits have no less variance than dither has, at uniform levels.
constexpr int kMaxRotatedBits = 3;
constexpr int kRotationWords = kRotation / 32;  // of signs
// The signs S of a block are those s of the block that comes so much later,
// from the last one on the first.
constexpr int kSignShift = 21;

// Whether codes that are asked to be rotated are, with `bits` bits for values;
// all others have ranges, and dither.
MMACTNN_HOST_DEVICE constexpr bool rotates(const Geometry& geometry, int bits) {
  return bits <= kMaxRotatedBits && geometry.group_size == kRotation &&
         geometry.row_numel % kRotation == 0;
}

// The same of zeroed codes of `bits` bits: with more for values than one,
// dither has less variance. It spends one code on zero and all others on the
// range of the positive values, which is half of that of a distribution, where
// rotated codes have a bit for the mask.
MMACTNN_HOST_DEVICE constexpr bool rotates_zeroed(const Geometry& geometry,
                                                  int bits) {
  return bits == 2 && rotates(geometry, 1);
}

// Distance of levels for the standard normal distribution. One bit has levels
// of any distance: the sign.
MMACTNN_HOST_DEVICE constexpr float rotation_step(int bits) {
  return bits == 1 ? 1.5958f : bits == 2 ? 0.9957f : 0.5860f;
}

// bfloat16 rounded to nearest, to even in a tie; NaN and inf as they are.
MMACTNN_HOST_DEVICE float bfloat16_nearest(float value) {
  uint32_t bits = float_bits(value);
  if (is_finite(value)) bits += 0x7FFFu + (bits >> 16 & 1u);
  return bits_float(bits & 0xFFFF0000u);
}

// Random words of a rotation; those of offsets apart from those of signs.
MMACTNN_HOST_DEVICE PhiloxPair draw_pair(PairStream stream, uint64_t counter,
                                         bool offset) {
  const uint32_t apart = offset ? 0x80000000u : 0u;
  return philox_pair(
      static_cast<uint32_t>(counter),
      stream.counter ^ static_cast<uint32_t>(counter >> 32) ^ apart,
      stream.key);
}

// Signs of 32 elements, a set bit for a minus: bit 8 i + k of word w is that of
// element k of block w + 8 i of the group.
MMACTNN_HOST_DEVICE uint32_t rotation_signs(PairStream stream, uint64_t group,
                                            int word) {
  const PhiloxPair random = draw_pair(
      stream, group * (kRotationWords / 2) + static_cast<uint64_t>(word / 2),
      false);
  return word % 2 == 0 ? random.word[0] : random.word[1];
}

// The number that is added to all rests of a group before they are rounded,
// within half a unit either way, from draw_pair() of the group: their rounding
// has no bias then.
MMACTNN_HOST_DEVICE float rotation_offset(PhiloxPair random) {
  const auto number = static_cast<float>(random.word[0] >> 8);
  return multiply(number, 0x1p-24f) - (0.5f - 0x1p-25f);
}

// Mean of a kind from its sum, as a bfloat16. The rest of the values is taken
// from that, so that its rounding is no error.
MMACTNN_HOST_DEVICE float kind_mean(float sum, float count) {
  if (count == 0.0f) return 0.0f;
#ifdef __CUDA_ARCH__
  return bfloat16_nearest(multiply(sum, __frcp_rn(count)));
#else
  return bfloat16_nearest(multiply(sum, 1.0f / count));
#endif
}

// Power of two that makes integers of rests, of 128 at most.
class RotationUnit {
 public:
  // `largest` is the absolute value of the largest rest.
  explicit MMACTNN_HOST_DEVICE RotationUnit(float largest) {
    // 64 to 128 after the product; of the smallest numbers less.
    constexpr uint32_t kTop = 127 + 133, kLargestExponent = 253;
    const uint32_t exponent = kTop - (float_bits(largest) >> 23);
    factor_ = (exponent < kLargestExponent ? exponent : kLargestExponent) << 23;
  }

  MMACTNN_HOST_DEVICE float factor() const { return bits_float(factor_); }
  MMACTNN_HOST_DEVICE float inverse() const {
    return bits_float((UINT32_C(254) << 23) - factor_);
  }

 private:
  uint32_t factor_;
};

// Factor of coefficients from <v, v>: one over the width of all levels.
MMACTNN_HOST_DEVICE float rotation_factor(float energy, int bits) {
  if (energy == 0.0f) return 0.0f;
  const float width = rotation_step(bits) * static_cast<float>(4 << bits);
#ifdef __CUDA_ARCH__
  return __frcp_rn(multiply(width, __fsqrt_rn(energy)));
#else
  return 1.0f / multiply(width, std::sqrt(energy));
#endif
}

// Code of a coefficient, as the last bits of a float above kIntegerFloat: the
// floor of its place among all levels, from 0 to 1, times a little less than
// their number.
MMACTNN_HOST_DEVICE float rotation_code(float coefficient, float factor,
                                        int bits) {
  const float number = static_cast<float>(1 << bits) * (1.0f - 0x1p-24f);
#ifdef __CUDA_ARCH__
  const float place = __saturatef(__fmaf_rn(coefficient, factor, 0.5f));
  return __fmaf_rd(place, number, bits_float(kIntegerFloat));
#else
  const float place = multiply_add(coefficient, factor, 0.5f);
  const float inside = place > 0.0f ? (place < 1.0f ? place : 1.0f) : 0.0f;
  return bits_float(kIntegerFloat) + static_cast<float>(static_cast<int32_t>(
                                         static_cast<double>(inside) * number));
#endif
}

// The odd number that a code stands for.
MMACTNN_HOST_DEVICE constexpr int rotation_level(uint32_t code, int bits) {
  return 2 * static_cast<int>(code) - static_cast<int>(max_code_of(bits));
}

// `scale` of a group from <v, v> and <y, q>, which floats hold exactly.
MMACTNN_HOST_DEVICE float rotation_scale(float energy, float product,
                                         float inverse_unit) {
  if (energy == 0.0f) return 0.0f;
#ifdef __CUDA_ARCH__
  const float ratio = __fdiv_rn(energy, product);
#else
  const float ratio = energy / product;
#endif
  return bfloat16_nearest(multiply(ratio, inverse_unit));
}

}  // namespace mmactnn
