// Encoding of rotated groups, of which a thread holds a block each.
#pragma once

#include <cstdint>

#include "../common/codec.h"
#include "../common/rotation.h"
#include "launch.h"
#include "rotation.h"

namespace mmactnn {

// Kinds of elements that a group has means of and codes for.
enum class RotatedKinds {
  kOne,      // all alike
  kPassing,  // those that pass a rectifier
  kBoth,     // those, and the others
};

struct GroupRange {
  float mean;     // of the elements that do not pass, of kBoth
  float passing;  // of those that do, or of all
  float scale;

  // As Range, of kOne and kPassing.
  __device__ __forceinline__ uint32_t pack() const {
    return Range{passing, scale}.pack();
  }
  // As three bfloat16 numbers, of kBoth.
  __device__ __forceinline__ void store_split(uint16_t* target) const {
    target[0] = static_cast<uint16_t>(float_bits(mean) >> 16);
    target[1] = static_cast<uint16_t>(float_bits(passing) >> 16);
    target[2] = static_cast<uint16_t>(float_bits(scale) >> 16);
  }
};

// Puts 8 bits to where codes of `stride` bits begin.
class FlagSpread {
 public:
  explicit __device__ __forceinline__ FlagSpread(int stride)
      : shift_(stride - 1) {
    const uint32_t twice = 1u + (1u << stride);
    const uint32_t fourfold = twice * (1u + (1u << (2 * stride)));
    fours_ = 0xFu * (1u + (1u << (4 * stride)));
    twos_ = 0x3u * (1u + (1u << (2 * stride))) * (1u + (1u << (4 * stride)));
    ones_ = fourfold * (1u + (1u << (4 * stride)));
  }
  __device__ __forceinline__ uint32_t of(uint32_t flags) const {
    flags = (flags | flags << (4 * shift_)) & fours_;
    flags = (flags | flags << (2 * shift_)) & twos_;
    return (flags | flags << shift_) & ones_;
  }

 private:
  int shift_;
  uint32_t fours_;
  uint32_t twos_;
  uint32_t ones_;
};

__device__ __forceinline__ int32_t warp_integer_total(int32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  }
  return value;
#else
  return __reduce_add_sync(0xFFFFFFFFu, value);
#endif
}

__device__ __forceinline__ uint32_t warp_largest(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
  }
  return value;
#else
  return __reduce_max_sync(0xFFFFFFFFu, value);
#endif
}

__device__ __forceinline__ float block_total(const float (&values)[kBlock]) {
  return add(add(add(values[0], values[1]), add(values[2], values[3])),
             add(add(values[4], values[5]), add(values[6], values[7])));
}

// Sums over a warp of a number for each of kCount groups; a thread gets that
// of own_group(). From the highest bit of a block's place to the lowest, as in
// the specification.
template <int kCount>
__device__ __forceinline__ int own_group() {
  return static_cast<int>(threadIdx.x % kWarp) / (kWarp / kCount);
}

// By value: a reference to one of two elements would put both into memory.
template <typename T>
__device__ __forceinline__ T choose(bool second, T a, T b) {
  return second ? b : a;
}

template <int kCount, int kStep = kWarp / 2>
__device__ __forceinline__ float own_total(const float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    float total = values[0];
#pragma unroll
    for (int step = kStep; step > 0; step /= 2) {
      total += __shfl_xor_sync(0xFFFFFFFFu, total, step);
    }
    return total;
  } else {
    // Either half of the threads keeps half of the groups.
    const bool upper = (threadIdx.x & kStep) != 0u;
    float kept[kCount / 2];
#pragma unroll
    for (int u = 0; u < kCount / 2; ++u) {
      const float a = values[u], b = values[u + kCount / 2];
      kept[u] = choose(upper, a, b) +
                __shfl_xor_sync(0xFFFFFFFFu, choose(upper, b, a), kStep);
    }
    return own_total<kCount / 2, kStep / 2>(kept);
  }
}

// Numbers of all groups, from the threads whose own they are. Arithmetic that
// is done once a group is done by these threads alone.
template <int kCount>
__device__ __forceinline__ void share_own(float own, float (&results)[kCount]) {
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    results[u] = __shfl_sync(0xFFFFFFFFu, own, u * (kWarp / kCount));
  }
}

template <typename T, int kCount>
__device__ __forceinline__ T own_of(const T (&values)[kCount]) {
  T value = values[0];
#pragma unroll
  for (int u = 1; u < kCount; ++u) {
    value = choose(own_group<kCount>() == u, value, values[u]);
  }
  return value;
}

// The larger one; NaN if one is.
__device__ __forceinline__ float larger(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return b > a || is_nan(b) ? b : a;
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}

// Encodes kCount groups. Bit i of `flags` is set if element i passes; `values`
// become rests. `words` are the codes of the thread's blocks.
template <RotatedKinds kKinds, int kCount>
__device__ __forceinline__ void encode_rotated(const RotatedCodes& codes,
                                               const Hadamard& hadamard,
                                               const BlockSigns<kCount>& signs,
                                               float (&values)[kCount][kBlock],
                                               const uint32_t (&flags)[kCount],
                                               uint32_t (&words)[kCount],
                                               GroupRange (&ranges)[kCount]) {
  constexpr bool kFlags = kKinds != RotatedKinds::kOne;
  const auto passes = [&](int u, int i) {
    return !kFlags || (flags[u] >> i & 1u) != 0u;
  };

  float passing[kCount], total[kCount];
  int32_t count[kCount];
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    float kept[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      kept[i] = passes(u, i) ? values[u][i] : 0.0f;
    }
    passing[u] = block_total(kept);
    if constexpr (kKinds == RotatedKinds::kBoth) {
      total[u] = block_total(values[u]);
    }
    count[u] = kRotation;
    if constexpr (kFlags) {
      count[u] = warp_integer_total(__popc(flags[u] & 0xFFu));
    }
  }
  float mean[kCount], passing_mean[kCount];
  const float own_passing = own_total(passing);
  const int32_t own_count = own_of(count);
  share_own(kind_mean(own_passing, static_cast<float>(own_count)),
            passing_mean);
  if constexpr (kKinds == RotatedKinds::kBoth) {
    share_own(kind_mean(add(own_total(total), -own_passing),
                        static_cast<float>(kRotation - own_count)),
              mean);
  }

  BlockPairs integers[kCount];
  float energy[kCount], unit[kCount];
  bool finite[kCount];
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    float block_largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      float rest = add(values[u][i], -passing_mean[u]);
      if constexpr (kKinds == RotatedKinds::kPassing) {
        rest = passes(u, i) ? rest : 0.0f;
      } else if constexpr (kKinds == RotatedKinds::kBoth) {
        const float other = add(values[u][i], -mean[u]);
        rest = passes(u, i) ? rest : other;
      }
      values[u][i] = rest;
      block_largest = larger(block_largest, fabsf(rest));
    }
    const uint32_t largest = warp_largest(float_bits(block_largest));
    finite[u] = largest < 0x7F800000u;
    const RotationUnit power(bits_float(largest));
    unit[u] = power.inverse();
    const float offset = signs.offset(u);
    // Integers n as float16 of 1536 + n, which are the lower halves of floats.
    constexpr float kWhole = 8388608.0f + 0x6600;
    constexpr uint32_t kOffset = 0x66006600u;
    uint32_t whole[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      // The product is exact, or too small to matter.
      const auto integer = [&](int k) {
        return float_bits(
            add(fmaf(values[u][k], power.factor(), offset), kWhole));
      };
      whole[i] = __byte_perm(integer(i), integer(i + kPairs), 0x5410);
    }
    int32_t squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; i += 2) {
      // Their lower bytes are the integers.
      const auto bytes =
          static_cast<int32_t>(__byte_perm(whole[i], whole[i + 1], 0x6420));
      squares = __dp4a(bytes, bytes, squares);
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const __half2 number =
          __hsub2(*reinterpret_cast<const __half2*>(&whole[i]),
                  *reinterpret_cast<const __half2*>(&kOffset));
      integers[u].pair[i] = *reinterpret_cast<const uint32_t*>(&number);
    }
    if (!finite[u]) {
      squares = 0;
      integers[u] = BlockPairs{};
    }
    energy[u] = static_cast<float>(warp_integer_total(squares));
    const PairSigns outer = signs.outer(u);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      integers[u].pair[i] = outer.flip(i, integers[u].pair[i]);
    }
  }

  float factor[kCount];
  const float own_energy = own_of(energy);
  share_own(rotation_factor(own_energy, codes.bits), factor);
  float product[kCount];
  const FlagSpread spread(codes.stride);
  const auto largest_code = static_cast<float>(max_code_of(codes.bits));
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    float y[kBlock];
    hadamard.transform(integers[u], signs.inner(u), y);
    uint32_t whole[kBlock];
    float of_codes = 0.0f, of_all = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float code = rotation_code(y[i], factor[u], codes.bits);
      whole[i] = float_bits(code);
      // All sums are integers of less than 2^24.
      of_codes = fmaf(y[i], add(code, -bits_float(kIntegerFloat)), of_codes);
      of_all += y[i];
    }
    uint32_t halves = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t two = __byte_perm(whole[i], whole[i + kPairs], 0x5410);
      halves += two * (1u << (i * codes.stride));
    }
    words[u] = (halves & 0xFFFFu) | halves >> 16 << (4 * codes.stride);
    if constexpr (kFlags) words[u] |= spread.of(flags[u]) << codes.bits;
    // The odd numbers that codes stand for.
    const float sum = 2.0f * of_codes - largest_code * of_all;
    product[u] =
        static_cast<float>(warp_integer_total(static_cast<int32_t>(sum)));
  }
  float scale[kCount];
  share_own(own_of(finite)
                ? rotation_scale(own_energy, own_of(product), own_of(unit))
                : bits_float(0x7FC00000u),
            scale);
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    ranges[u] = {kKinds == RotatedKinds::kBoth ? mean[u] : 0.0f,
                 passing_mean[u], scale[u]};
  }
}

}  // namespace mmactnn
