// Codes as floats without the slow conversion of integers.
#pragma once

#include <cfloat>
#include <cstdint>

#include "../common/codec.h"
#include "launch.h"

namespace mmactnn {

// kIntegerFloat in a register, for a `count` that is not negative. The compiler
// must not know: it would make a constant of it, of which an instruction takes
// only one, and spend another instruction on the other for every element.
__device__ __forceinline__ uint32_t opaque_integer_float(uint32_t count) {
  return kIntegerFloat ^ (count & 0x80000000u);
}

// The product is exact, so that the sum rounds once, as decode() does; only
// beyond the largest number could one tell.
__device__ __forceinline__ float decode_fused(uint32_t code, Range range) {
  return __fmaf_rn(static_cast<float>(code), range.step, range.low);
}

// Whether no code of a group is special or decodes to more than `largest`, so
// that decode() needs no clamp and may round once: the product is exact.
__device__ __forceinline__ bool decodes_plainly(Range range, uint32_t max_code,
                                                float largest) {
  const float product = multiply(static_cast<float>(max_code), range.step);
  // False for NaN.
  return product <= FLT_MAX && range.low >= -largest &&
         add(product, range.low) <= largest;
}

// The codes of kItems elements in a word, each of kWidth bits from the lowest
// of kStride bits on. A code becomes the last bits of a float of 2^23 where it
// lies, which makes its number 2^place times as large, and the step is as much
// smaller. `integer` is opaque_integer_float().
template <int kStride, int kItems, int kWidth = kStride>
class CodeFloats {
 public:
  __device__ __forceinline__ CodeFloats(float step, uint32_t integer)
      : integer_(integer) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      steps_[i] = multiply(step, 1.0f / static_cast<float>(1u << place(i)));
    }
  }

  // Code of element `i`, less `offset`, times the factor that step(i) lacks.
  template <typename Word>
  __device__ __forceinline__ float number(Word word, int i,
                                          uint32_t offset = 0) const {
    const auto bits = static_cast<uint32_t>(word >> shift(i));
    const uint32_t mask = max_code_of(kWidth) << place(i);
    const float whole = bits_float(integer_ | (bits & mask));
    return add(whole, -bits_float(kIntegerFloat + (offset << place(i))));
  }
  __device__ __forceinline__ float step(int i) const { return steps_[i]; }

 private:
  // Bits that a float keeps after the first.
  static constexpr int kKept = 23;

  static __device__ __forceinline__ constexpr int shift(int i) {
    const int first = i * kStride;
    return first + kWidth <= kKept ? 0 : first / 16 * 16;
  }
  static __device__ __forceinline__ constexpr int place(int i) {
    return i * kStride - shift(i);
  }

  uint32_t integer_;
  float steps_[kItems];
};

}  // namespace mmactnn
