// How the kernels of the GPU read a tensor: group by group, a group by a warp
// or a part of one.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "launch.h"

namespace mmactnn {

// One launch covers `groups` consecutive groups from the first of a row.
struct Launch {
  int64_t row_numel;
  int64_t row_blocks;
  uint32_t groups;
  uint32_t groups_per_row;
  Divider by_groups_per_row;
  bool vectorized;  // every full block starts on a 16-byte boundary
};

struct Group {
  uint32_t row;
  int64_t start;  // its first element within the row
  int count;      // its elements: group_size, or fewer at the end of a row
};

template <int kGroup>
__device__ __forceinline__ Group locate(const Launch& launch, uint32_t index) {
  const uint32_t row = launch.by_groups_per_row.quotient(index);
  const int64_t start =
      static_cast<int64_t>(index - row * launch.groups_per_row) * kGroup;
  const int64_t left = launch.row_numel - start;
  return {row, start, left < kGroup ? static_cast<int>(left) : kGroup};
}

// Reads the 8 elements of a block; those past `count` repeat the first, so
// that they cannot widen the range.
template <typename T>
__device__ __forceinline__ void load_block(const T* source, int count,
                                           bool vectorized, float* values) {
  constexpr int kPerWord = 16 / sizeof(T);
  if (vectorized && count >= kBlock) {
#pragma unroll
    for (int w = 0; w < kBlock / kPerWord; ++w) {
      const auto word = reinterpret_cast<const Vector<T, kPerWord>*>(source)[w];
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        values[w * kPerWord + i] = Number<T>::load(word.item[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      values[i] = Number<T>::load(source[i < count ? i : 0]);
    }
  }
}

// The blocks of a group that one thread holds: the more, the less the work
// that is done once a group and thread costs each element.
constexpr int kBlocksPerThread = 4;

template <int kGroup>
constexpr int kLanesPerGroup = kGroup / kBlock / kBlocksPerThread;

// What one thread holds of a group.
struct Share {
  float values[kBlocksPerThread][kBlock];
  // Elements from the start of each block to the end of the group; where it
  // is not positive, there is no such block and the values are not set.
  int counts[kBlocksPerThread];
};

// Reads a group and finds its extent. All threads of a warp call it together;
// those that are not `active` read nothing.
template <int kGroup, typename T>
__device__ __forceinline__ Extent load_group(const T* source, int count,
                                             int lane, bool active,
                                             bool vectorized, Share& share) {
  constexpr int kLanes = kLanesPerGroup<kGroup>;
  float low = FLT_MAX, high = -FLT_MAX, poison = 0.0f;
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    const int begin = (b * kLanes + lane) * kBlock;
    share.counts[b] = active ? count - begin : 0;
    if (share.counts[b] <= 0) continue;
    load_block(source + begin, share.counts[b], vectorized, share.values[b]);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      low = fminf(low, share.values[b][i]);
      high = fmaxf(high, share.values[b][i]);
      // NaN if one is not finite.
      poison = fmaf(share.values[b][i], 0.0f, poison);
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, step));
    high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, step));
  }
  // All lanes of the group must agree; warps with sub-warp groups take the
  // slow path together when one of their groups needs it.
  bool all_finite = true;
  if (__any_sync(0xFFFFFFFFu, is_nan(poison))) {
    low = FLT_MAX;
    high = -FLT_MAX;
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
      if (share.counts[b] <= 0) continue;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (is_finite(share.values[b][i])) {
          low = fminf(low, share.values[b][i]);
          high = fmaxf(high, share.values[b][i]);
        }
      }
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, step));
      high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, step));
      poison = add(poison, __shfl_xor_sync(0xFFFFFFFFu, poison, step));
    }
    all_finite = !is_nan(poison);
  }
  return {low, high, all_finite};
}

// Calls `body` with the group size as a Constant; checked by
// check_group_size().
template <typename Body>
void dispatch_group_size(int64_t group_size, const Body& body) {
  if (group_size == 64) {
    body(Constant<64>{});
  } else if (group_size == 128) {
    body(Constant<128>{});
  } else if (group_size == 256) {
    body(Constant<256>{});
  } else {
    body(Constant<512>{});
  }
}

// Calls `body(launch, first_row)` for as many rows at a time as 32-bit
// indices can count.
template <typename T, typename Body>
void for_each_launch(const Geometry& geometry, const T* data,
                     const Body& body) {
  const int64_t groups_per_row = geometry.groups_per_row();
  // kWarp threads serve a group at most.
  const int64_t max_groups = kMaxIndex / kWarp;
  STD_TORCH_CHECK(groups_per_row <= max_groups, "a sample may have at most ",
                  max_groups, " groups of elements, got ", groups_per_row);
  const int64_t max_rows = max_groups / groups_per_row;
  for (int64_t row = 0; row < geometry.rows; row += max_rows) {
    const int64_t rows = std::min(max_rows, geometry.rows - row);
    const bool vectorized =
        is_aligned(data, 16) && geometry.row_numel * sizeof(T) % 16 == 0;
    body(Launch{geometry.row_numel, geometry.blocks_per_row(),
                static_cast<uint32_t>(rows * groups_per_row),
                static_cast<uint32_t>(groups_per_row),
                Divider(static_cast<uint32_t>(groups_per_row)), vectorized},
         row);
  }
}

inline unsigned int grid_size(uint32_t groups, int lanes) {
  return static_cast<unsigned int>(
      (static_cast<int64_t>(groups) * lanes + kThreads - 1) / kThreads);
}

}  // namespace mmactnn
