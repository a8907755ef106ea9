// Encoding of rotated groups, of which a thread holds a block each.
#pragma once

#include <cstdint>
#include <type_traits>

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

template <RotatedKinds kKinds>
using KindsConstant = std::integral_constant<RotatedKinds, kKinds>;

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

template <typename T>
__device__ __forceinline__ T warp_total(T value) {
  // From the highest bit of a block's place to the lowest, as in the
  // specification.
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  }
  return value;
}

__device__ __forceinline__ int32_t warp_integer_total(int32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return warp_total(value);
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

// Calls `body(u)` for one of kCount groups in each thread, with its number,
// and returns for all groups what it returned in the thread of that number.
// Arithmetic that is done once a group is done once, not by all threads.
template <int kCount, typename Body>
__device__ __forceinline__ void for_own_group(float (&results)[kCount],
                                              const Body& body) {
  const float own = body(static_cast<int>(threadIdx.x) % kCount);
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    results[u] = __shfl_sync(0xFFFFFFFFu, own, u);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ T pick(const T (&values)[kCount], int which) {
  T value = values[0];
#pragma unroll
  for (int u = 1; u < kCount; ++u) {
    if (which == u) value = values[u];
  }
  return value;
}

// Encodes kCount groups. Bit i of `flags` is set if element i passes; `values`
// become rests. `words` are the codes of the thread's blocks.
template <RotatedKinds kKinds, int kCount>
__device__ __forceinline__ void encode_rotated(
    const RotatedCodes& codes, const Hadamard& hadamard,
    const BlockSigns<kCount>& signs, float (&values)[kCount][kBlock],
    const uint32_t (&flags)[kCount], uint32_t (&words)[kCount],
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
    passing[u] = warp_total(block_total(kept));
    total[u] = 0.0f;
    if constexpr (kKinds == RotatedKinds::kBoth) {
      total[u] = warp_total(block_total(values[u]));
    }
    count[u] = kRotation;
    if constexpr (kFlags) {
      count[u] = warp_integer_total(__popc(flags[u] & 0xFFu));
    }
  }
  float mean[kCount], passing_mean[kCount];
  for_own_group(passing_mean, [&](int u) {
    return kind_mean(pick(passing, u), static_cast<float>(pick(count, u)));
  });
  if constexpr (kKinds == RotatedKinds::kBoth) {
    for_own_group(mean, [&](int u) {
      return kind_mean(add(pick(total, u), -pick(passing, u)),
                       static_cast<float>(kRotation - pick(count, u)));
    });
  }

  BlockPairs integers[kCount];
  float energy[kCount], first[kCount], unit[kCount];
  bool finite[kCount];
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    uint32_t largest = 0;
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
      largest = max(largest, float_bits(rest) & 0x7FFFFFFFu);
    }
    largest = warp_largest(largest);
    finite[u] = largest < 0x7F800000u;
    const RotationUnit power(bits_float(largest));
    unit[u] = power.inverse();
    // Integers n as float16 of 1536 + n, which are the lower halves of floats.
    constexpr float kWhole = 8388608.0f + 0x6600;
    constexpr uint32_t kOffset = 0x66006600u;
    uint32_t whole[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const auto integer = [&](int k) {
        return float_bits(add(multiply(values[u][k], power.factor()), kWhole));
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
    signs.flip(u, integers[u]);
    const uint32_t lowest =
        __shfl_sync(0xFFFFFFFFu, integers[u].pair[0], 0) & 0xFFFFu;
    first[u] = __half2float(__ushort_as_half(static_cast<uint16_t>(lowest)));
  }

  float factor[kCount];
  for_own_group(factor, [&](int u) {
    return rotation_factor(pick(energy, u), codes.bits);
  });
  float product[kCount];
  const auto largest_code = static_cast<float>(max_code_of(codes.bits));
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    float y[kBlock];
    hadamard.transform(integers[u], y);
    uint32_t whole[kBlock];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float code = rotation_code(y[i], factor[u], codes.bits);
      whole[i] = float_bits(code);
      // All sums are integers of less than 2^24.
      sum = fmaf(y[i], add(code, -bits_float(kIntegerFloat)), sum);
    }
    uint32_t halves = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      uint32_t two = __byte_perm(whole[i], whole[i + kPairs], 0x5410);
      if constexpr (kFlags) {
        const uint32_t flag = (flags[u] >> i & 1u) |
                              (flags[u] >> (i + kPairs) & 1u) << 16;
        two |= flag << codes.bits;
      }
      halves += two << (i * codes.stride);
    }
    words[u] = (halves & 0xFFFFu) | halves >> 16 << (4 * codes.stride);
    const int32_t of_codes = warp_integer_total(static_cast<int32_t>(sum));
    // The sum of all coefficients is 256 times the first integer.
    product[u] = 2.0f * static_cast<float>(of_codes) -
                 largest_code * (static_cast<float>(kRotation) * first[u]);
  }
  float scale[kCount];
  for_own_group(scale, [&](int u) {
    return pick(finite, u) ? rotation_scale(pick(energy, u), pick(product, u),
                                            pick(unit, u))
                           : bits_float(0x7FC00000u);
  });
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    ranges[u] = {kKinds == RotatedKinds::kBoth ? mean[u] : 0.0f,
                 passing_mean[u], scale[u]};
  }
}

}  // namespace mmactnn
