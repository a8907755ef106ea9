// Sums over a thread block, always in the same order. Every thread calls them.
#pragma once

#include <cstdint>

#include "launch.h"

namespace mmactnn {

constexpr int kWarpsPerBlock = kThreads / kWarp;

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  }
  return value;
}

// The sum, in every thread.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T sums[kWarpsPerBlock];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int w = 0; w < kWarpsPerBlock; ++w) total += sums[w];
  __syncthreads();  // the next call writes again
  return total;
}

// The sum over all threads before this one; `total` is that over all.
__device__ __forceinline__ int block_exclusive_sum(int value, int* total) {
  __shared__ int sums[kWarpsPerBlock];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  if (lane == kWarp - 1) sums[warp] = inclusive;
  __syncthreads();
  int before = 0;
  *total = 0;
#pragma unroll
  for (int w = 0; w < kWarpsPerBlock; ++w) {
    if (w < warp) before += sums[w];
    *total += sums[w];
  }
  __syncthreads();  // the next call writes again
  return before + inclusive - value;
}

}  // namespace mmactnn
