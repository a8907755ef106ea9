// Elementwise kernels that go by blocks of 8 elements in memory order.
#pragma once

#include <cstdint>

#include "../common/codec.h"
#include "launch.h"

namespace mmactnn {

// Reads the up to 8 elements of a block; those past `count` are 0.
template <typename T, bool kFull>
__device__ __forceinline__ void load_block(const T* source, int count,
                                           T* values) {
  constexpr int kPerWord = 16 / sizeof(T);
  if constexpr (kFull) {
#pragma unroll
    for (int w = 0; w < kBlock / kPerWord; ++w) {
      const auto word = reinterpret_cast<const Vector<T, kPerWord>*>(source)[w];
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        values[w * kPerWord + i] = word.item[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      values[i] = i < count ? source[i] : Number<T>::store(0.0f);
    }
  }
}

template <typename T, bool kFull>
__device__ __forceinline__ void store_block(T* target, int count,
                                            const T* values) {
  constexpr int kPerWord = 16 / sizeof(T);
  if constexpr (kFull) {
#pragma unroll
    for (int w = 0; w < kBlock / kPerWord; ++w) {
      Vector<T, kPerWord> word;
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        word.item[i] = values[w * kPerWord + i];
      }
      reinterpret_cast<Vector<T, kPerWord>*>(target)[w] = word;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (i < count) target[i] = values[i];
    }
  }
}

template <typename T, bool kFull, typename Body>
__device__ __forceinline__ void map_block(const T* source, T* target,
                                          int64_t block, int count,
                                          const Body& body) {
  T values[kBlock];
  load_block<T, kFull>(source, count, values);
  body(block, values);
  store_block<T, kFull>(target, count, values);
}

// `target` may be `source`: no pointer is __restrict__.
template <typename T, typename Body>
__global__ void __launch_bounds__(kThreads)
    map_blocks_kernel(const T* source, T* target, int64_t numel,
                      bool vectorized, Body body) {
  const int64_t block =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t start = block * kBlock;
  if (start >= numel) return;
  const int64_t left = numel - start;
  if (vectorized && left >= kBlock) {
    map_block<T, true>(source + start, target + start, block, kBlock, body);
  } else {
    map_block<T, false>(source + start, target + start, block,
                        left < kBlock ? static_cast<int>(left) : kBlock, body);
  }
}

// Calls `body(block, values)`, on the device, with the 8 elements of every
// block, and writes the resulting `values` to `target`, which may be
// `source`.
template <typename T, typename Body>
void map_blocks(const T* source, T* target, int64_t numel, const Body& body,
                cudaStream_t stream) {
  if (numel == 0) return;
  constexpr int64_t kPerGridBlock = int64_t{kThreads} * kBlock;
  const int64_t grid = (numel + kPerGridBlock - 1) / kPerGridBlock;
  STD_TORCH_CHECK(grid <= kMaxIndex, "a tensor may have at most ",
                  kMaxIndex * kPerGridBlock, " elements");
  map_blocks_kernel<<<static_cast<unsigned int>(grid), kThreads, 0, stream>>>(
      source, target, numel, is_aligned(source, 16) && is_aligned(target, 16),
      body);
  check_launch();
}

}  // namespace mmactnn
