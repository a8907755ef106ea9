// Encoding of one kind of elements in kernels that fuse a rectifier.
#pragma once

#include <cstdint>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/rectified_codec.h"
#include "packed_block.h"

namespace mmactnn {

// Parameters to encode the elements of one kind.
struct Coding {
  float low;
  float scale;  // NaN: the codes are special

  __device__ __forceinline__ bool special() const { return is_nan(scale); }
};

// Whether the flags of a block are put between its codes all at once.
template <int kBits>
constexpr bool kSpread = kBits != kAnyBits && kBits <= 4;

// The sum that holds the code of a value, see encode_sum().
template <int kBits>
__device__ __forceinline__ uint32_t code_sum(float value, const Coding& coding,
                                             float rounding,
                                             uint32_t max_code) {
  const uint32_t sum = encode_sum(value, coding.low, coding.scale, rounding);
  if constexpr (kSpread<kBits>) {
    static_assert(max_code_of(kBits) <= kMaxUnclampedCode);
    return sum;
  } else {
    return min(sum, largest_sum(max_code));
  }
}

// The same in groups that have special codes.
template <bool kZeroed>
__device__ __forceinline__ uint32_t special_sum(float value,
                                                const Coding& coding,
                                                float rounding,
                                                uint32_t max_code) {
  if (!coding.special()) {
    return code_sum<kAnyBits>(kZeroed ? fmaxf(value, coding.low) : value,
                              coding, rounding, max_code);
  }
  const Range range{coding.low, coding.scale};
  const uint32_t code = kZeroed ? encode_zeroed_special(value, range)
                                : encode_special(value, range, max_code);
  return kIntegerFloat | code << fraction_bits(max_code);
}

// The zeroed codes of a block of a rectifier's output, whose positive elements
// have a bit each in `flags`. `special`: a group of the warp may have special
// codes. `rounding(i)`: random bits of element `i`.
template <int kBits, typename T, typename Rounding>
__device__ __forceinline__ CodeWord<kBits> zeroed_word(
    const PackedBlock<T>& output, uint32_t flags, const Coding& coding,
    bool special, const Rounding& rounding, int bits) {
  const uint32_t max_code = max_zeroed_code(bits);
  const int fraction = fraction_bits(max_code);
  uint32_t sums[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    // Zeros get the lowest code, and lose it below.
    sums[i] = code_sum<kBits>(fmaxf(output.get(i), coding.low), coding,
                              rounding(i), max_code);
  }
  if (special) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      sums[i] = special_sum<true>(output.get(i), coding, rounding(i), max_code);
    }
  }
  if constexpr (!kSpread<kBits>) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      sums[i] = (flags & (1u << i)) != 0u ? sums[i] + (1u << fraction)
                                          : kIntegerFloat;
    }
  }
  CodeWord<kBits> word = pack_sums<kBits>(sums, bits, fraction);
  if constexpr (kSpread<kBits>) {
    const uint32_t ones = spread_flags<kBits>(flags);
    word = (word + ones) & (ones * max_code_of(kBits));
  }
  return word;
}

}  // namespace mmactnn
