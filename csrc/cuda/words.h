// Words of numbers and of codes, as they move between registers and memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/codec.h"
#include "launch.h"

namespace mmactnn {

// The smallest unsigned integer of at least `kBytes` bytes.
template <int kBytes>
using UnsignedInt = std::conditional_t<
    kBytes == 1, uint8_t,
    std::conditional_t<kBytes == 2, uint16_t,
                       std::conditional_t<kBytes <= 4, uint32_t, uint64_t>>>;

// The largest integer that starts on its own boundary wherever pieces of
// `kBytes` bytes follow one another.
template <int kBytes>
using UnitOf = UnsignedInt<(kBytes & -kBytes)>;

// Writes 16 bytes of numbers at once. In assembly, because the compiler
// merges an ordinary store with the scalar ones of a ragged end, and then
// writes two bytes at a time.
template <typename T>
__device__ __forceinline__ void store_16_bytes(T* target, const float* values) {
  uint32_t word[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      word[w] = float_bits(values[w]);
    } else {
      const Vector<T, 2> pair{Number<T>::store(values[2 * w]),
                              Number<T>::store(values[2 * w + 1])};
      word[w] = __builtin_bit_cast(uint32_t, pair);
    }
  }
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

}  // namespace mmactnn
