// How kernels go over the channels of a tensor: by pieces of kItems elements
// that lie side by side, a block of codes where all blocks are aligned and one
// element else; a thread block takes a split of the pieces of some channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/channels.h"
#include "../common/divider.h"
#include "launch.h"

namespace mmactnn {

// Thread blocks that a kernel is cut into for each multiprocessor: a few times
// what is resident, so that the last ones do not leave it idle for long.
constexpr int kGridBlocksPerProcessor = 16;
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
// the number of thread blocks side by side.
inline Splits make_splits(int64_t total, int64_t step, int64_t across,
                          int device) {
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(
      &processors, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(error == cudaSuccess, "mmactnn: ", cudaGetErrorString(error));
  const int64_t steps = (total + step - 1) / step;
  const int64_t wanted =
      (int64_t{kGridBlocksPerProcessor} * processors + across - 1) / across;
  const int64_t per_split =
      std::min((steps + wanted - 1) / wanted, kMaxPieces / step);
  const int64_t size = per_split * step;
  const int64_t count = (total + size - 1) / size;
  STD_TORCH_CHECK(count <= 65535, "a tensor of ", total,
                  " pieces a channel is too large");
  return {static_cast<uint32_t>(count), size, total};
}

// Where the pieces of a split are: `local` counts from its begin.
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

// `at_once` is the number of pieces whose loads a thread issues together.
template <int kItems>
Planes make_planes(const Channels& channels, int at_once, int device) {
  check_indexable(channels);
  const int64_t plane = channels.plane;
  const int64_t pieces = plane % kItems == 0
                             ? plane / kItems
                             : (plane + 2 * (kItems - 1)) / kItems;
  STD_TORCH_CHECK(pieces <= kMaxPieces, "a channel may have at most ",
                  kMaxPieces, " elements a sample, got ", plane);
  return {static_cast<uint32_t>(plane),
          make_splits(channels.rows * pieces, int64_t{kThreads} * at_once,
                      channels.count, device),
          Divider(static_cast<uint32_t>(pieces))};
}

// One piece of a channel, and which of its elements belong to it.
struct PlanePiece {
  uint32_t row;
  uint32_t piece;  // within the row
  int begin;
  int end;  // not positive: none

  __device__ __forceinline__ bool holds(int i) const {
    return i >= begin && i < end;
  }
};

template <int kItems>
struct PlaneCursor {
  uint32_t plane_begin;
  uint32_t plane_end;
  uint32_t first;  // piece of the row that the channel begins in
  PieceIndex start;
  Divider by_pieces;

  explicit __device__ __forceinline__ PlaneCursor(const Planes& planes)
      : plane_begin(blockIdx.x * planes.plane),
        plane_end(plane_begin + planes.plane),
        first(plane_begin / kItems),
        start(first_piece(planes.splits, planes.by_pieces)),
        by_pieces(planes.by_pieces) {}

  __device__ __forceinline__ PlanePiece at(uint32_t local) const {
    const PieceIndex index = advance(start, local, by_pieces);
    const uint32_t piece = first + index.piece;
    const int before = static_cast<int>(plane_begin - piece * kItems);
    const int left = static_cast<int>(plane_end - piece * kItems);
    return {index.row, piece, max(before, 0), min(left, kItems)};
  }
};

// Channels innermost: a thread takes kItems of them, a column, and walks over
// the pixels; a thread block has `columns` side by side.
struct Columns {
  uint32_t total;  // columns of the tensor
  uint32_t columns;
  uint32_t pixels;  // that a thread block reads side by side
  Splits splits;    // of pixels
  Divider by_columns;
  Divider by_plane;

  dim3 grid() const {
    return dim3((total + columns - 1) / columns, splits.count);
  }
};

template <int kItems>
Columns make_columns(const Channels& channels, int at_once, int device) {
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
          make_splits(channels.channel_numel(), pixels * at_once,
                      (total + columns - 1) / columns, device),
          Divider(static_cast<uint32_t>(columns)),
          Divider(static_cast<uint32_t>(channels.plane))};
}

struct ColumnCursor {
  uint32_t lane;    // column within the thread block
  uint32_t pixel;   // first that this thread reads
  uint32_t column;  // of the tensor
  uint32_t total;
  bool active;
  PieceIndex start;
  Divider by_plane;

  explicit __device__ __forceinline__ ColumnCursor(const Columns& columns)
      : pixel(columns.by_columns.quotient(threadIdx.x)),
        total(columns.total),
        start(first_piece(columns.splits, columns.by_plane)),
        by_plane(columns.by_plane) {
    lane = threadIdx.x - pixel * columns.columns;
    column = blockIdx.x * columns.columns + lane;
    active = pixel < columns.pixels && column < total;
  }

  // Row and piece of the row.
  __device__ __forceinline__ PieceIndex at(uint32_t local) const {
    const PieceIndex index = advance(start, local, by_plane);
    return {index.row, index.piece * total + column};
  }
};

// Sums over splits: a thread block takes 8 of the `width` columns of
// [splits, width] numbers, a warp's worth of threads for each.
constexpr int kFinishColumns = kThreads / kWarp;

inline unsigned int finish_grid(int64_t width) {
  return static_cast<unsigned int>((width + kFinishColumns - 1) /
                                   kFinishColumns);
}

// The sum over the thread block's threads of the same column, in each of them.
__device__ __forceinline__ double column_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int i = 0; i < kWarp; ++i) {
    total += sums[i * kFinishColumns + threadIdx.x % kFinishColumns];
  }
  __syncthreads();  // the next call writes again
  return total;
}

}  // namespace mmactnn
