// Iteration of kernels over the channels of a tensor: by pieces of kItems
// adjacent elements, a block of codes where all blocks are aligned, else one
// element. A thread block takes a split of the pieces of some channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/channels.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "launch.h"

namespace mmactnn {

// Pieces of a split; the pieces of a row may be as many, and the sum of both
// is still an index that a Divider takes.
constexpr int64_t kMaxPieces = INT64_C(1) << 30;

// Elements within a row are counted in 31 bits and blocks in 32.
inline void check_indexable(const Channels& channels) {
  STD_TORCH_CHECK(channels.row_numel() <= kMaxIndex,
                  "a sample may have at most ", kMaxIndex, " elements, got ",
                  channels.row_numel());
  constexpr int64_t kMaxBlocks = INT64_C(0xFFFFFFFF);
  const int64_t row_blocks = (channels.row_numel() + kBlock - 1) / kBlock;
  STD_TORCH_CHECK(channels.rows <= kMaxBlocks / row_blocks,
                  "there may be at most ", kMaxBlocks / row_blocks,
                  " samples of this size, got ", channels.rows);
}

struct Splits {
  uint32_t count;
  int64_t size;   // pieces of each split but the last
  int64_t total;  // of all splits

  __device__ __forceinline__ int64_t begin() const { return blockIdx.y * size; }
  __device__ __forceinline__ uint32_t pieces() const {
    const int64_t left = total - begin();
    return static_cast<uint32_t>(left < size ? left : size);
  }
};

// `step` is the number of pieces that a thread block reads at a time, `across`
// the number of thread blocks side by side, `blocks` that for each
// multiprocessor in all.
inline Splits make_splits(int64_t total, int64_t step, int64_t across,
                          int blocks) {
  const int64_t steps = (total + step - 1) / step;
  const int64_t wanted =
      std::max(int64_t{blocks} * processor_count() / across, INT64_C(1));
  const int64_t per_split =
      std::min((steps + wanted - 1) / wanted, kMaxPieces / step);
  const int64_t size = per_split * step;
  const int64_t count = (total + size - 1) / size;
  STD_TORCH_CHECK(count <= 65535, "a tensor of ", total,
                  " pieces a channel is too large");
  return {static_cast<uint32_t>(count), size, total};
}

// Location of the pieces of a split; `local` counts from its begin.
struct PieceIndex {
  uint32_t row;
  uint32_t piece;  // within the row's part
};

// The row and the place in it of the first piece of this thread block.
__device__ __forceinline__ PieceIndex first_piece(const Splits& splits,
                                                  Divider by_pieces) {
  const int64_t begin = splits.begin();
  const uint32_t row = begin <= kMaxIndex
                           ? by_pieces.quotient(static_cast<uint32_t>(begin))
                           : static_cast<uint32_t>(begin / by_pieces.divisor);
  return {row, static_cast<uint32_t>(begin - static_cast<int64_t>(row) *
                                                 by_pieces.divisor)};
}

__device__ __forceinline__ PieceIndex advance(PieceIndex from, uint32_t local,
                                              Divider by_pieces) {
  const uint32_t piece = from.piece + local;
  const uint32_t rows = by_pieces.quotient(piece);
  return {from.row + rows, piece - rows * by_pieces.divisor};
}

// Channel after channel: a thread block takes one channel, blockIdx.x. A piece
// may hold elements of its neighbours, too.
struct Planes {
  uint32_t plane;
  Splits splits;
  Divider by_pieces;  // pieces that can hold elements of a channel of a row

  dim3 grid(int64_t channels) const {
    return dim3(static_cast<unsigned int>(channels), splits.count);
  }
};

template <int kItems>
Planes make_planes(const Channels& channels) {
  // Twice the resident blocks, as there may be slightly more channels than
  // those.
  constexpr int kBlocks = 8;
  check_indexable(channels);
  const int64_t plane = channels.plane;
  const int64_t pieces = plane % kItems == 0
                             ? plane / kItems
                             : (plane + 2 * (kItems - 1)) / kItems;
  STD_TORCH_CHECK(pieces <= kMaxPieces, "a channel may have at most ",
                  kMaxPieces, " elements a sample, got ", plane);
  return {
      static_cast<uint32_t>(plane),
      make_splits(channels.rows * pieces, kThreads, channels.count, kBlocks),
      Divider(static_cast<uint32_t>(pieces))};
}

// One piece of a channel. It can be read even where it has no elements of it.
struct PlanePiece {
  uint32_t row;
  uint32_t piece;  // within the row
  int first;       // element of the channel that it begins with, or before it
};

template <int kItems>
struct PlaneCursor {
  uint32_t plane;
  uint32_t begin;   // of the channel in the row
  uint32_t last;    // piece of the row that the channel ends in
  uint32_t pieces;  // of the split
  PieceIndex start;
  Divider by_pieces;

  explicit __device__ __forceinline__ PlaneCursor(const Planes& planes)
      : plane(planes.plane),
        begin(blockIdx.x * plane),
        last((begin + plane - 1) / kItems),
        pieces(planes.splits.pieces()),
        start(first_piece(planes.splits, planes.by_pieces)),
        by_pieces(planes.by_pieces) {}

  __device__ __forceinline__ PlanePiece at(uint32_t local) const {
    const PieceIndex index = advance(start, min(local, pieces - 1), by_pieces);
    const uint32_t piece = begin / kItems + index.piece;
    const uint32_t first = local < pieces ? piece * kItems - begin : plane;
    return {index.row, min(piece, last), static_cast<int>(first)};
  }
  // An element of the channel in the piece or close by.
  __device__ __forceinline__ uint32_t nearest(const PlanePiece& place) const {
    return min(static_cast<uint32_t>(max(place.first, 0)), plane - 1);
  }
  // Whether any element, element `i` and all are of the channel.
  __device__ __forceinline__ bool any(const PlanePiece& place) const {
    return place.first < static_cast<int>(plane);
  }
  __device__ __forceinline__ bool holds(const PlanePiece& place, int i) const {
    return static_cast<uint32_t>(place.first) + i < plane;
  }
  __device__ __forceinline__ bool whole(const PlanePiece& place) const {
    return place.first >= 0 && holds(place, kItems - 1);
  }
};

// Channels innermost: a thread takes kItems of them, a column, and walks over
// the pixels; a thread block has `columns` side by side.
struct Columns {
  uint32_t total;  // columns of the tensor
  uint32_t columns;
  uint32_t pixels;  // that a thread block reads side by side
  Splits splits;    // of pixels
  bool one_row;     // whether all rows may be taken for one
  Divider by_columns;
  Divider by_plane;

  dim3 grid() const {
    return dim3((total + columns - 1) / columns, splits.count);
  }
};

// `blocks` thread blocks for each multiprocessor, as many as are resident: all
// end at about the same time. `one_row` is of blocks only.
template <int kItems>
Columns make_columns(const Channels& channels, bool one_row, int blocks) {
  check_indexable(channels);
  const int64_t total = channels.count / kItems;
  const int64_t across = (total + kWarp - 1) / kWarp;
  const int64_t columns = (total + across - 1) / across;
  const int64_t pixels = kThreads / columns;
  STD_TORCH_CHECK(channels.plane <= kMaxPieces, "a channel may have at most ",
                  kMaxPieces, " elements a sample, got ", channels.plane);
  return {static_cast<uint32_t>(total),
          static_cast<uint32_t>(columns),
          static_cast<uint32_t>(pixels),
          make_splits(channels.channel_numel(), pixels,
                      (total + columns - 1) / columns, blocks),
          kItems == kBlock && one_row,
          Divider(static_cast<uint32_t>(columns)),
          Divider(static_cast<uint32_t>(channels.plane))};
}

// Pixels that a thread reads: `count` of the split, one every `step`.
struct ColumnCursor {
  uint32_t lane;    // column within the thread block
  uint32_t pixel;   // first that this thread reads
  uint32_t column;  // of the tensor
  uint32_t total;
  uint32_t step;
  uint32_t count;
  int64_t begin;  // pixel of the tensor that the split begins with
  PieceIndex start;
  bool one_row;
  Divider by_plane;

  explicit __device__ __forceinline__ ColumnCursor(const Columns& columns)
      : pixel(columns.by_columns.quotient(threadIdx.x)),
        total(columns.total),
        step(columns.pixels),
        count(0),
        begin(columns.splits.begin()),
        start{0, 0},
        one_row(columns.one_row),
        by_plane(columns.by_plane) {
    lane = threadIdx.x - pixel * columns.columns;
    column = blockIdx.x * columns.columns + lane;
    const uint32_t pixels = columns.splits.pieces();
    if (pixel < step && column < total && pixel < pixels) {
      count = (pixels - 1 - pixel) / step + 1;
    }
    if (!one_row) start = first_piece(columns.splits, by_plane);
  }

  // Row and piece of the row of pixel `k`, of the last one beyond.
  __device__ __forceinline__ PieceIndex at(uint32_t k) const {
    const uint32_t local = pixel + min(k, count - 1) * step;
    if (one_row) {
      return {0, (static_cast<uint32_t>(begin) + local) * total + column};
    }
    const PieceIndex index = advance(start, local, by_plane);
    return {index.row, index.piece * total + column};
  }
};

// Sums over splits: a thread block takes 8 of the `width` columns of
// [splits, width] numbers.
constexpr int kFinishColumns = 8;
constexpr int kFinishThreads = 1024;
constexpr int kFinishRows = kFinishThreads / kFinishColumns;
// Rows whose loads a thread issues together.
constexpr int kFinishAtOnce = 8;

inline unsigned int finish_grid(int64_t width) {
  return static_cast<unsigned int>((width + kFinishColumns - 1) /
                                   kFinishColumns);
}

// Calls `load(u, split)` for kFinishAtOnce splits of a thread after one
// another, then `merge(u)` for those of them that there are.
template <typename Load, typename Merge>
__device__ __forceinline__ void for_each_split(uint32_t splits,
                                               const Load& load,
                                               const Merge& merge) {
  for (uint32_t s = threadIdx.x / kFinishColumns; s < splits;
       s += kFinishRows * kFinishAtOnce) {
#pragma unroll
    for (int u = 0; u < kFinishAtOnce; ++u) {
      load(u, min(s + u * kFinishRows, splits - 1));
    }
#pragma unroll
    for (int u = 0; u < kFinishAtOnce; ++u) {
      if (s + u * kFinishRows < splits) merge(u);
    }
  }
}

// Sums over the thread block's threads of the same column, in the first warp.
template <int kCount>
__device__ __forceinline__ void column_sums(double (&values)[kCount]) {
  constexpr int kWarps = kFinishThreads / kWarp;
  __shared__ double sums[kCount][kWarps][kFinishColumns];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const auto sum_lanes = [&](double& value) {
#pragma unroll
    for (int step = kFinishColumns; step < kWarp; step *= 2) {
      value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
    }
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sum_lanes(values[i]);
    if (lane < kFinishColumns) sums[i][warp][lane] = values[i];
  }
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; w += kWarp / kFinishColumns) {
      values[i] += sums[i][w + lane / kFinishColumns][lane % kFinishColumns];
    }
    sum_lanes(values[i]);
  }
}

}  // namespace mmactnn
