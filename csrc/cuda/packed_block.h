// Blocks of 8 numbers in registers as they lie in memory, and their codes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "launch.h"
#include "words.h"

namespace mmactnn {

// Two numbers of a 16-bit dtype share a register until they are used.
template <typename T, int kItems = kBlock>
struct PackedBlock {
  static constexpr int kPerWord = 4 / sizeof(T);
  static constexpr int kWords = kItems / kPerWord;
  static constexpr int kPerVector = 16 / sizeof(T);

  uint32_t word[kWords];

  __device__ __forceinline__ float get(int i) const {
    const uint32_t bits = word[i / kPerWord];
    if constexpr (std::is_same_v<T, float>) {
      return bits_float(bits);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return bits_float(i % 2 == 0 ? bits << 16 : bits & 0xFFFF0000u);
    } else {
      const auto pair = *reinterpret_cast<const __half2*>(&bits);
      return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
    }
  }

  __device__ __forceinline__ void set(const float* values) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (std::is_same_v<T, float>) {
        word[w] = float_bits(values[w]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const auto pair =
            __floats2bfloat162_rn(values[2 * w], values[2 * w + 1]);
        word[w] = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const auto pair = __floats2half2_rn(values[2 * w], values[2 * w + 1]);
        word[w] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }

  // Takes the numbers from `begin` on from another block; of a 16-bit dtype.
  __device__ __forceinline__ void replace(int begin, const PackedBlock& other) {
    static_assert(kPerWord == 2);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t mask = begin <= 2 * w       ? 0xFFFFFFFFu
                            : begin == 2 * w + 1 ? 0xFFFF0000u
                                                 : 0u;
      word[w] = (word[w] & ~mask) | (other.word[w] & mask);
    }
  }

  __device__ __forceinline__ void load(const T* source) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const auto vector =
          reinterpret_cast<const Vector<uint32_t, 4>*>(source)[w / 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[w + i] = vector.item[i];
    }
  }
  // The numbers from `begin` on; in place of those from `count` on the first.
  __device__ __forceinline__ void load(const T* source, int begin, int count) {
    float values[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      values[i] = Number<T>::load(source[begin + i < count ? begin + i : 0]);
    }
    set(values);
  }

  // In assembly for the reason of store_16_bytes().
  __device__ __forceinline__ void store(T* target) const {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(
                       target + w * kPerWord),
                   "r"(word[w]), "r"(word[w + 1]), "r"(word[w + 2]),
                   "r"(word[w + 3])
                   : "memory");
    }
  }
  __device__ __forceinline__ void store(T* target, int count) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i < count) target[i] = Number<T>::store(get(i));
    }
  }
};

// A whole block of memory, which is `vectorized` if it starts on a 16-byte
// boundary.
template <typename T>
__device__ __forceinline__ void load_block(PackedBlock<T>& block,
                                           const T* source, bool vectorized) {
  if (vectorized) {
    block.load(source);
  } else {
    block.load(source, 0, kBlock);
  }
}
template <typename T>
__device__ __forceinline__ void store_block(const PackedBlock<T>& block,
                                            T* target, bool vectorized) {
  if (vectorized) {
    block.store(target);
  } else {
    block.store(target, kBlock);
  }
}

// The codes of a block, the first in the lowest bits.
template <int kBits>
using CodeWord =
    std::conditional_t<kBits == kAnyBits || (kBits > 4), uint64_t, uint32_t>;

// Puts the codes of a block into a word, from the sums of encode_sum() with
// `fraction` bits below the code.
template <int kBits>
__device__ __forceinline__ CodeWord<kBits> pack_sums(const uint32_t* sums,
                                                     int bits, int fraction) {
  if constexpr (kBits != kAnyBits && kBits <= 4) {
    // Codes i and i + 4 go into the halves of a register, with the bits of
    // kIntegerFloat above its fraction; these are subtracted once for all.
    constexpr uint32_t kAbove = kIntegerFloat >> 16;
    uint32_t halves = 0, excess = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      halves += __byte_perm(sums[i], sums[i + 4], 0x7632) * (1u << (i * kBits));
      excess += kAbove * 0x10001u << (i * kBits);
    }
    halves -= excess;
    if constexpr (kBits == 4) return halves;
    if constexpr (kBits == 2) return __byte_perm(halves, 0, 0x4420);
    return (halves & 0xFFFFu) | (halves >> 16 << (4 * kBits));
  } else if constexpr (kBits == kMaxBits) {
    // A code becomes the third byte, where codes of 7 bits and a flag are.
    const int shift = 16 - fraction;
    uint32_t words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t* four = sums + 4 * w;
      words[w] = __byte_perm(
          __byte_perm(four[0] << shift, four[1] << shift, 0x0062),
          __byte_perm(four[2] << shift, four[3] << shift, 0x0062), 0x5410);
    }
    return words[0] | static_cast<uint64_t>(words[1]) << 32;
  } else {
    // As up to 4 bits, with two codes in each half, which may lie lower than 16
    // bits up.
    const int shift = 16 - fraction;
    const uint32_t above = kIntegerFloat << shift >> 16;
    const uint32_t excess = above * 0x10001u * (1u + (1u << bits));
    uint32_t pairs[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t* two = sums + 2 * w;
      const uint32_t first =
          __byte_perm(two[0] << shift, two[4] << shift, 0x7632);
      const uint32_t second =
          __byte_perm(two[1] << shift, two[5] << shift, 0x7632);
      pairs[w] = first + (second << bits) - excess;
    }
    const uint32_t low = (pairs[0] & 0xFFFFu) | (pairs[1] & 0xFFFFu)
                                                    << (2 * bits);
    const uint32_t high = pairs[0] >> 16 | pairs[1] >> 16 << (2 * bits);
    return low | static_cast<uint64_t>(high) << (4 * bits);
  }
}

// The 8 bits of `flags` where the codes of a block begin.
template <int kBits>
__device__ __forceinline__ uint32_t spread_flags(uint32_t flags) {
  static_assert(kBits >= 2 && kBits <= 4);
  // Ones of 4, 2 and 1 bits at the distance of as many codes.
  constexpr uint32_t kFours = 0xFu * (1u + (1u << (4 * kBits)));
  constexpr uint32_t kTwos =
      0x3u * (1u + (1u << (2 * kBits))) * (1u + (1u << (4 * kBits)));
  constexpr uint32_t kOnes = (1u + (1u << kBits)) * (1u + (1u << (2 * kBits))) *
                             (1u + (1u << (4 * kBits)));
  flags = (flags | flags << (4 * (kBits - 1))) & kFours;
  flags = (flags | flags << (2 * (kBits - 1))) & kTwos;
  return (flags | flags << (kBits - 1)) & kOnes;
}

// Writes the codes of a block; those from `count` on become 0.
template <int kBits>
__device__ __forceinline__ void store_word(CodeWord<kBits> word, int bits,
                                           int count, uint8_t* target) {
  if (count < kBlock) {
    word &= (CodeWord<kBits>{1} << (max(count, 0) * bits)) - 1u;
  }
  if constexpr (kBits != kAnyBits) {
    using Unit = UnitOf<kBits>;
#pragma unroll
    for (int byte = 0; byte < kBits; byte += sizeof(Unit)) {
      *reinterpret_cast<Unit*>(target + byte) =
          static_cast<Unit>(word >> (8 * byte));
    }
  } else {
    for (int byte = 0; byte < bits; ++byte) {
      target[byte] = static_cast<uint8_t>(word >> (8 * byte));
    }
  }
}

template <int kBits>
__device__ __forceinline__ CodeWord<kBits> load_word(const uint8_t* source,
                                                     int bits) {
  CodeWord<kBits> word = 0;
  if constexpr (kBits != kAnyBits) {
    using Unit = UnitOf<kBits>;
#pragma unroll
    for (int byte = 0; byte < kBits; byte += sizeof(Unit)) {
      const Unit unit = *reinterpret_cast<const Unit*>(source + byte);
      word |= static_cast<CodeWord<kBits>>(unit) << (8 * byte);
    }
  } else {
    for (int byte = 0; byte < bits; ++byte) {
      word |= static_cast<uint64_t>(source[byte]) << (8 * byte);
    }
  }
  return word;
}

}  // namespace mmactnn
