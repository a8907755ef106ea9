// Access of GPU kernels to a tensor: group by group, each by a warp or a part
// of one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "bounds.h"
#include "launch.h"
#include "packed_block.h"

namespace mmactnn {

// One launch covers `groups` consecutive groups from the first of a row.
struct Launch {
  int64_t row_numel;
  int64_t row_blocks;
  uint32_t groups;
  uint32_t groups_per_row;
  Divider by_groups_per_row;
  int group_shift;  // binary logarithm of the elements of a group
  bool vectorized;  // every full block starts on a 16-byte boundary
};

// A group size that is known at run time only.
constexpr int kAnyGroup = 0;

// The elements of a group: kGroup, or 2^shift with kAnyGroup.
template <int kGroup>
class GroupSize {
 public:
  explicit __device__ __forceinline__ GroupSize(const Launch& launch)
      : shift_(launch.group_shift) {}

  __device__ __forceinline__ int elements() const {
    return kGroup == kAnyGroup ? 1 << shift_ : kGroup;
  }
  // Threads that share a group, kItems elements each.
  template <int kItems>
  __device__ __forceinline__ int lanes() const {
    return elements() / kItems;
  }
  template <int kItems>
  __device__ __forceinline__ uint32_t group_of(uint32_t thread) const {
    if constexpr (kGroup != kAnyGroup) return thread / (kGroup / kItems);
    return thread >> (shift_ - (31 - __builtin_clz(kItems)));
  }

 private:
  int shift_;
};

struct Group {
  uint32_t row;
  int64_t start;  // its first element within the row
  int count;      // its elements: group_size, or fewer at the end of a row
};

__device__ __forceinline__ Group locate(const Launch& launch, uint32_t index,
                                        int elements) {
  const uint32_t row = launch.by_groups_per_row.quotient(index);
  const int64_t start =
      static_cast<int64_t>(index - row * launch.groups_per_row) * elements;
  const int64_t left = launch.row_numel - start;
  return {row, start, left < elements ? static_cast<int>(left) : elements};
}

// The blocks of a group that one thread holds: the more, the less the work
// that is done once a group and thread costs each element.
constexpr int kBlocksPerThread = 4;
constexpr int kSharedItems = kBlock * kBlocksPerThread;

// Share of a group that one thread holds: blocks `lane`, `lane` + `lanes` and
// so on. Elements past the end of the group repeat its first one, so that they
// cannot widen the range.
template <typename T>
struct Share {
  PackedBlock<T> blocks[kBlocksPerThread];
};

// Begins to read a group; nothing waits for it here.
template <typename T>
__device__ __forceinline__ void load_group(const T* source, int count, int lane,
                                           int lanes, bool vectorized,
                                           Share<T>& share) {
  if (vectorized && count == lanes * kSharedItems) {
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
      share.blocks[b].load(source + (b * lanes + lane) * kBlock);
    }
  } else {
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
      share.blocks[b].load(source, (b * lanes + lane) * kBlock, count);
    }
  }
}

// The extent of a group. All threads of a warp call it together.
template <typename T>
__device__ __forceinline__ Extent find_extent(const Share<T>& share,
                                              int lanes) {
  PackedBounds<T> packed(share.blocks[0]);
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) packed.include(share.blocks[b]);
  Bounds bounds = packed.of_lanes(lanes);
  const bool all_finite = bounds.all_finite();
  // Warps with several groups take the slow path together when one of their
  // groups needs it.
  if (__any_sync(0xFFFFFFFFu, !all_finite)) {
    // Once more, without NaN and inf.
    bounds = Bounds();
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const float value = share.blocks[b].get(i);
        if (is_finite(value)) bounds.include(value);
      }
    }
    bounds = bounds.of_lanes(lanes);
  }
  return {bounds.low, bounds.high, all_finite};
}

// Calls `body` with the group size as a Constant: that of all levels has
// kernels of its own, and one kernel serves the others.
template <typename Body>
void dispatch_group_size(int64_t group_size, const Body& body) {
  constexpr int kDefault = 256;
  if (group_size == kDefault) {
    body(Constant<kDefault>{});
  } else {
    body(Constant<kAnyGroup>{});
  }
}

// The threads of a launch, kItems elements of a group each.
template <int kItems>
unsigned int grid_size(const Launch& launch) {
  const int64_t lanes = (int64_t{1} << launch.group_shift) / kItems;
  return static_cast<unsigned int>((launch.groups * lanes + kThreads - 1) /
                                   kThreads);
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
  int group_shift = 0;
  while ((int64_t{1} << group_shift) < geometry.group_size) ++group_shift;
  for (int64_t row = 0; row < geometry.rows; row += max_rows) {
    const int64_t rows = std::min(max_rows, geometry.rows - row);
    const bool vectorized =
        is_aligned(data, 16) && geometry.row_numel * sizeof(T) % 16 == 0;
    body(Launch{geometry.row_numel, geometry.blocks_per_row(),
                static_cast<uint32_t>(rows * groups_per_row),
                static_cast<uint32_t>(groups_per_row),
                Divider(static_cast<uint32_t>(groups_per_row)), group_shift,
                vectorized},
         row);
  }
}

}  // namespace mmactnn
