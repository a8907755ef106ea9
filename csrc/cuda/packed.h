// Numbers that a thread reads together, in registers as they lie in memory.
#pragma once

#include <cstdint>

#include "../common/codec.h"
#include "launch.h"
#include "packed_block.h"

namespace mmactnn {

// kItems of them: a block, or a single one that may lie anywhere.
template <typename T, int kItems>
struct Packed {
  T item[1];

  __device__ __forceinline__ void load(const T* source) { item[0] = source[0]; }
  __device__ __forceinline__ float value(int) const {
    return Number<T>::load(item[0]);
  }
  // Writes the numbers for which `keep(i)`, and 0 for the others.
  template <typename Keep>
  __device__ __forceinline__ void store(T* target, const Keep& keep) const {
    target[0] = keep(0) ? item[0] : Number<T>::store(0.0f);
  }
};

template <typename T>
struct Packed<T, kBlock> {
  PackedBlock<T> block;

  __device__ __forceinline__ void load(const T* source) { block.load(source); }
  __device__ __forceinline__ float value(int i) const { return block.get(i); }
  // The numbers for which `keep(i)`, and 0 for the others.
  template <typename Keep>
  __device__ __forceinline__ PackedBlock<T> kept(const Keep& keep) const {
    constexpr int kPerWord = PackedBlock<T>::kPerWord;
    PackedBlock<T> kept;
#pragma unroll
    for (int w = 0; w < PackedBlock<T>::kWords; ++w) {
      uint32_t mask = 0;
#pragma unroll
      for (int k = 0; k < kPerWord; ++k) {
        const uint32_t item = kPerWord == 1 ? 0xFFFFFFFFu : 0xFFFFu << (16 * k);
        mask |= keep(w * kPerWord + k) ? item : 0u;
      }
      kept.word[w] = block.word[w] & mask;
    }
    return kept;
  }
  template <typename Keep>
  __device__ __forceinline__ void store(T* target, const Keep& keep) const {
    kept(keep).store(target);
  }
};

}  // namespace mmactnn
