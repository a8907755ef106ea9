// Codes of a whole group on their way to memory.
#pragma once

#include <cstdint>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "group.h"
#include "launch.h"
#include "packed_block.h"

namespace mmactnn {

// Whether the blocks of a whole group are no words of memory. They would be
// written byte by byte, and parts of the same sector again and again: they
// meet in shared memory first.
template <int kBits>
constexpr bool kMeet = (kBits & (kBits - 1)) != 0;

// Writes all blocks of such a group, `words` being those of one thread and
// `codes` where the group's are.
template <int kBits>
__device__ __forceinline__ void store_whole_group(const CodeWord<kBits>* words,
                                                  int lane, int lanes,
                                                  uint8_t* codes) {
  if (!is_aligned(codes, sizeof(uint32_t))) {
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
      store_word<kBits>(words[b], kBits, kBlock,
                        codes + (b * lanes + lane) * kBits);
    }
    return;
  }
  // A thread has kBlocksPerThread blocks of as many bytes as a code has bits.
  static_assert(kBlocksPerThread == sizeof(uint32_t));
  __shared__ uint32_t staged[kThreads * (kMaxBits - 1)];
  const uint32_t first = (threadIdx.x - lane) * (kMaxBits - 1);
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    store_word<kBits>(words[b], kBits, kBlock,
                      reinterpret_cast<uint8_t*>(staged + first) +
                          (b * lanes + lane) * kBits);
  }
  __syncwarp(((1u << lanes) - 1u) << (threadIdx.x % kWarp - lane));
  auto* target = reinterpret_cast<uint32_t*>(codes);
#pragma unroll
  for (int w = 0; w < kBits; ++w) {
    target[w * lanes + lane] = staged[first + w * lanes + lane];
  }
}

}  // namespace mmactnn
