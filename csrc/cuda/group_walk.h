// Iteration of kernels over whole groups, by a warp each, whose elements are
// at the same places of a matrix in every step: a tensor of any number of
// dimensions is rows of `period` groups, chosen so that a place belongs to one
// channel. Sums and parameters of channels then stay in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../common/channels.h"
#include "../common/rotation.h"
#include "launch.h"

namespace mmactnn {

// A thread block takes `across` groups side by side, of `depth` rows at a time.
struct GroupWalk {
  int64_t rows;
  int64_t split_rows;  // of each split but the last
  uint32_t period;
  uint32_t across;
  uint32_t depth;
  uint32_t splits;

  dim3 grid() const { return dim3((period + across - 1) / across, splits); }
  unsigned int threads() const { return across * depth * kWarp; }
};

// `blocks` thread blocks for each multiprocessor.
inline GroupWalk make_walk(int64_t period, int64_t rows, int blocks) {
  constexpr int64_t kWarps = kThreads / kWarp;
  const int64_t across = std::min(period, kWarps);
  const int64_t depth = kWarps / across;
  const int64_t sets = (period + across - 1) / across;
  STD_TORCH_CHECK(sets <= kMaxIndex, "a sample may have at most ", kMaxIndex,
                  " sets of groups, got ", sets);
  constexpr int64_t kMaxSplits = 65535;
  const int64_t wanted = std::clamp(int64_t{blocks} * processor_count() / sets,
                                    INT64_C(1), kMaxSplits);
  const int64_t per_split = (rows + wanted - 1) / wanted;
  const int64_t split_rows = (per_split + depth - 1) / depth * depth;
  return {rows,
          split_rows,
          static_cast<uint32_t>(period),
          static_cast<uint32_t>(across),
          static_cast<uint32_t>(depth),
          static_cast<uint32_t>((rows + split_rows - 1) / split_rows)};
}

// All groups of a tensor whose places mean nothing.
inline GroupWalk make_walk(const Geometry& geometry, int blocks) {
  return make_walk(1, geometry.groups(), blocks);
}

// Groups of a tensor with channels.
inline GroupWalk make_walk(const Channels& channels, int blocks) {
  STD_TORCH_CHECK(channels.row_numel() <= kMaxIndex,
                  "a sample may have at most ", kMaxIndex, " elements, got ",
                  channels.row_numel());
  const int64_t width = channels.last
                            ? std::lcm(channels.count, int64_t{kRotation})
                            : channels.row_numel();
  return make_walk(width / kRotation, channels.numel() / width, blocks);
}

// The groups that a warp takes.
class GroupCursor {
 public:
  explicit __device__ __forceinline__ GroupCursor(const GroupWalk& walk)
      : period_(walk.period), depth_(walk.depth), count_(0) {
    const uint32_t warp = threadIdx.x / kWarp;
    const uint32_t row = warp / walk.across;
    lane_ = threadIdx.x % kWarp;
    position_ = blockIdx.x * walk.across + warp % walk.across;
    first_ = blockIdx.y * walk.split_rows + row;
    const int64_t end = min(walk.rows, (blockIdx.y + 1) * walk.split_rows);
    if (position_ < period_ && first_ < end) {
      count_ = static_cast<uint32_t>((end - 1 - first_) / depth_) + 1;
    }
  }

  // Number of groups.
  __device__ __forceinline__ uint32_t count() const { return count_; }
  // The first element of the thread's block, by its place in a row.
  __device__ __forceinline__ uint32_t place() const {
    return position_ * kRotation + lane_ * kBlock;
  }
  // Number of the k-th group, the last one beyond.
  __device__ __forceinline__ int64_t group(uint32_t k) const {
    const int64_t row =
        first_ + static_cast<int64_t>(min(k, count_ - 1)) * depth_;
    return row * period_ + position_;
  }
  // The thread's block, of the tensor.
  __device__ __forceinline__ int64_t block(int64_t group) const {
    return group * (kRotation / kBlock) + lane_;
  }

 private:
  uint32_t period_;
  uint32_t depth_;
  uint32_t count_;
  uint32_t lane_;
  uint32_t position_;
  int64_t first_;
};

}  // namespace mmactnn
