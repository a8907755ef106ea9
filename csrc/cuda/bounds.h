// The smallest and the largest of a thread's and of a group's numbers.
#pragma once

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "../common/codec.h"
#include "launch.h"
#include "packed_block.h"

namespace mmactnn {

// min() that is NaN where one of both is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return is_nan(a) || is_nan(b) ? bits_float(0x7FC00000u) : fminf(a, b);
#endif
}

// The bounds of numbers for as long as all may be finite: inf and NaN, which
// `low` holds on to, show that they are not.
struct Bounds {
  float low = FLT_MAX;
  float high = -FLT_MAX;

  __device__ __forceinline__ void include(float value) {
    low = min_or_nan(low, value);
    high = fmaxf(high, value);
  }
  __device__ __forceinline__ void include(const Bounds& other) {
    low = min_or_nan(low, other.low);
    high = fmaxf(high, other.high);
  }
  __device__ __forceinline__ Bounds from_lane(int step) const {
    return {__shfl_xor_sync(0xFFFFFFFFu, low, step),
            __shfl_xor_sync(0xFFFFFFFFu, high, step)};
  }
  // Bounds over `lanes` threads; all threads of a warp call it.
  __device__ __forceinline__ Bounds of_lanes(int lanes) const {
    Bounds all = *this;
#pragma unroll
    for (int step = 1; step < lanes; step *= 2) {
      all.include(all.from_lane(step));
    }
    return all;
  }
  __device__ __forceinline__ bool all_finite() const {
    return low >= -FLT_MAX && high <= FLT_MAX;
  }
};

// Two numbers of a 16-bit dtype in a register.
template <typename T>
using PairOf =
    std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T>
__device__ __forceinline__ PairOf<T> as_pair(uint32_t word) {
  return *reinterpret_cast<const PairOf<T>*>(&word);
}
template <typename Pair>
__device__ __forceinline__ uint32_t pair_bits(Pair pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The same of blocks, for a 16-bit dtype by pairs.
template <typename T>
struct PackedBounds {
  using Pair = PairOf<T>;
  Pair low;
  Pair high;

  explicit __device__ __forceinline__ PackedBounds(const PackedBlock<T>& first)
      : low(as_pair<T>(first.word[0])), high(low) {}

  __device__ __forceinline__ void include(const PackedBlock<T>& block) {
#pragma unroll
    for (int w = 0; w < PackedBlock<T>::kWords; ++w) {
      low = __hmin2_nan(low, as_pair<T>(block.word[w]));
      high = __hmax2(high, as_pair<T>(block.word[w]));
    }
  }
  // Bounds over `lanes` threads. The minimum and the negated maximum are the
  // halves of one register.
  __device__ __forceinline__ Bounds of_lanes(int lanes) const {
    const uint32_t lows = pair_bits(low);
    const uint32_t highs = pair_bits(high) ^ 0x80008000u;
    Pair both = __hmin2_nan(as_pair<T>(__byte_perm(lows, highs, 0x5410)),
                            as_pair<T>(__byte_perm(lows, highs, 0x7632)));
#pragma unroll
    for (int step = 1; step < lanes; step *= 2) {
      const uint32_t word = pair_bits(both);
      both = __hmin2_nan(both,
                         as_pair<T>(__shfl_xor_sync(0xFFFFFFFFu, word, step)));
    }
    return {Number<T>::load(both.x), -Number<T>::load(both.y)};
  }
};

template <>
struct PackedBounds<float> {
  Bounds bounds;

  explicit __device__ __forceinline__ PackedBounds(const PackedBlock<float>&) {}

  __device__ __forceinline__ void include(const PackedBlock<float>& block) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) bounds.include(block.get(i));
  }
  __device__ __forceinline__ Bounds of_lanes(int lanes) const {
    return bounds.of_lanes(lanes);
  }
};

// The bounds of the numbers that are not 0, where none is negative.
template <typename T>
struct PositiveBounds {
  // Two numbers each, by their bits, whose order is that of the numbers; of
  // the smallest one less, so that 0 becomes the largest.
  uint32_t low_less = 0xFFFFFFFFu;
  uint32_t high = 0;

  __device__ __forceinline__ void include(const PackedBlock<T>& block) {
#pragma unroll
    for (int w = 0; w < PackedBlock<T>::kWords; w += 2) {
      const uint32_t a = block.word[w], b = block.word[w + 1];
      low_less = __viaddmin_u16x2(a, 0xFFFFFFFFu, low_less);
      low_less = __viaddmin_u16x2(b, 0xFFFFFFFFu, low_less);
      high = __vimax3_u16x2(a, b, high);
    }
  }
  __device__ __forceinline__ Bounds finish() const {
    const uint32_t less = min(low_less & 0xFFFFu, low_less >> 16);
    const uint32_t most = max(high & 0xFFFFu, high >> 16);
    if (less == 0xFFFFu) return {};
    const auto number = [](uint32_t bits) {
      const PairOf<T> pair = as_pair<T>(bits);
      return Number<T>::load(pair.x);
    };
    const float highest = number(most);
    return {is_nan(highest) ? highest : number(less + 1u), highest};
  }
};

template <>
struct PositiveBounds<float> {
  Bounds bounds;

  __device__ __forceinline__ void include(const PackedBlock<float>& block) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (!(block.get(i) <= 0.0f)) bounds.include(block.get(i));
    }
  }
  __device__ __forceinline__ Bounds finish() const { return bounds; }
};

}  // namespace mmactnn
