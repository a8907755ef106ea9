#include <cstdint>

#include "../common/channel_stats.h"
#include "../common/channels.h"
#include "../common/dispatch.h"
#include "../common/norm.h"
#include "block.h"
#include "channel_walk.h"
#include "launch.h"
#include "packed.h"
#include "workspace.h"

namespace mmactnn {
namespace {

// Thread blocks of a multiprocessor that registers must suffice for.
constexpr int kColumnBlocks = 3;

// Pieces whose loads a thread issues together.
template <typename T, int kItems>
constexpr int kPiecesAtOnce = kItems == kBlock ? 16 / sizeof(T) : 8;

// Each thread sums differences from the first element that it reads, and
// their squares, so that a mean far from zero costs no accuracy. Threads and
// then splits are merged about a common mean.
struct Moments {
  float mean;
  float squares;  // of the differences from the mean
};

// Moments from sums of `count` differences from `shift` and of their squares.
__device__ __forceinline__ Moments make_moments(float count, float shift,
                                                float sum, float squares) {
  if (count == 0.0f) return {0.0f, 0.0f};
  const float mean = sum / count;
  return {shift + mean, squares - sum * mean};
}

// Sum of squares about another mean.
__device__ __forceinline__ float squares_about(float mean, float count,
                                               Moments moments) {
  const float distance = moments.mean - mean;
  return fmaf(count * distance, distance, moments.squares);
}

// Squares about a mean that is only roughly right, about the right one: `drift`
// is the sum of all differences from the rough one.
__device__ __forceinline__ Moments move_to_mean(float count, float rough,
                                                float drift, float squares) {
  if (count == 0.0f) return {0.0f, 0.0f};
  const float distance = drift / count;
  return {rough + distance, fmaf(-drift, distance, squares)};
}

// [splits, 3, C]: counts, means, squares.
struct Partials {
  float* data;
  int64_t channels;

  __device__ __forceinline__ float& at(uint32_t split, int which,
                                       int64_t channel) const {
    return data[(int64_t{3} * split + which) * channels + channel];
  }
};

struct Outputs {
  float* mean;  // null if not wanted
  float* var;   // null if not wanted
  float* invstd;
};

// Running averages of batch statistics.
struct Running {
  void* mean;  // null if there are none
  void* var;
  Dtype dtype;
  int64_t* batches;  // null if not counted
  double momentum;

  template <typename R>
  __device__ __forceinline__ void update(void* data, int64_t channel,
                                         double batch) const {
    R& value = static_cast<R*>(data)[channel];
    value = Number<R>::store(static_cast<float>(
        update_running(Number<R>::load(value), batch, momentum)));
  }
  __device__ __forceinline__ void update(void* data, int64_t channel,
                                         double batch) const {
    if (dtype == Dtype::kFloat) {
      update<float>(data, channel, batch);
    } else if (dtype == Dtype::kHalf) {
      update<__half>(data, channel, batch);
    } else {
      update<__nv_bfloat16>(data, channel, batch);
    }
  }
};

// Makes the outputs from moments of a channel over all splits.
struct Finish {
  Outputs outputs;
  Running running;
  double eps;

  __device__ __forceinline__ void write(int64_t channel, double mean,
                                        double squares, double count) const {
    if (running.batches != nullptr && channel == 0) ++*running.batches;
    const ChannelStats stats = finish_stats(mean, squares, count, eps);
    if (outputs.mean != nullptr) outputs.mean[channel] = stats.mean;
    if (outputs.var != nullptr) outputs.var[channel] = stats.var;
    outputs.invstd[channel] = stats.invstd;
    if (running.mean == nullptr || count == 0.0) return;
    running.update(running.mean, channel, mean);
    running.update(running.var, channel, squares / (count - 1.0));
  }
};

// The moments of several splits go to `partials`.
template <typename T, int kItems>
__global__ void __launch_bounds__(kThreads, 4)
    plane_stats_kernel(const T* __restrict__ input, Partials partials,
                       Finish finish, int64_t row_numel, Planes planes) {
  constexpr int kAtOnce = kPiecesAtOnce<T, kItems> / 2;
  const PlaneCursor<kItems> cursor(planes);
  const auto address = [&](const PlanePiece& place) {
    return input + place.row * row_numel +
           static_cast<int64_t>(place.piece) * kItems;
  };
  const PlanePiece start = cursor.at(threadIdx.x);
  const float shift = Number<T>::load(
      input[start.row * row_numel + cursor.begin + cursor.nearest(start)]);
  float sum = 0.0f, squares = 0.0f;
  int count = 0;
  for (uint32_t i = threadIdx.x; i < cursor.pieces; i += kThreads * kAtOnce) {
    Packed<T, kItems> numbers[kAtOnce];
    PlanePiece place[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      place[u] = cursor.at(i + u * kThreads);
      numbers[u].load(address(place[u]));
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (!cursor.any(place[u])) continue;
      const auto include = [&](int j) {
        const float distance = numbers[u].value(j) - shift;
        sum += distance;
        squares = fmaf(distance, distance, squares);
      };
      if (cursor.whole(place[u])) {
        count += kItems;
#pragma unroll
        for (int j = 0; j < kItems; ++j) include(j);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (!cursor.holds(place[u], j)) continue;
        ++count;
        include(j);
      }
    }
  }
  const float own_count = static_cast<float>(count);
  const Moments own = make_moments(own_count, shift, sum, squares);
  const float total = block_sum(own_count);
  const float rough = block_sum(own_count * own.mean) / fmaxf(total, 1.0f);
  const float drift = block_sum(own_count * (own.mean - rough));
  const float squares_of_all = block_sum(squares_about(rough, own_count, own));
  const Moments merged = move_to_mean(total, rough, drift, squares_of_all);
  if (threadIdx.x != 0) return;
  if (gridDim.y == 1) {
    finish.write(blockIdx.x, merged.mean, merged.squares, total);
  } else {
    partials.at(blockIdx.y, 0, blockIdx.x) = total;
    partials.at(blockIdx.y, 1, blockIdx.x) = merged.mean;
    partials.at(blockIdx.y, 2, blockIdx.x) = merged.squares;
  }
}

template <typename T, int kItems>
__global__ void __launch_bounds__(kThreads, kColumnBlocks)
    column_stats_kernel(const T* __restrict__ input, Partials partials,
                        Finish finish, Columns columns) {
  constexpr int kAtOnce = kPiecesAtOnce<T, kItems>;
  const ColumnCursor cursor(columns);
  // Rows have no gaps: pixels count through all of them.
  const T* source =
      input +
      ((cursor.begin + cursor.pixel) * cursor.total + cursor.column) * kItems;
  const uint32_t stride = cursor.step * cursor.total;
  float shift[kItems] = {}, sum[kItems] = {}, squares[kItems] = {};
  if (cursor.count != 0) {
    Packed<T, kItems> first;
    first.load(source);
#pragma unroll
    for (int j = 0; j < kItems; ++j) shift[j] = first.value(j);
    for (uint32_t k = 0; k < cursor.count; k += kAtOnce) {
      Packed<T, kItems> numbers[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        // Past the end the first once more, which is at no distance.
        const uint32_t index = k + u < cursor.count ? k + u : 0;
        numbers[u].load(source + uint64_t{index} * stride * kItems);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          const float distance = numbers[u].value(j) - shift[j];
          sum[j] += distance;
          squares[j] = fmaf(distance, distance, squares[j]);
        }
      }
    }
  }
  const auto count = static_cast<float>(cursor.count);
  const uint32_t pixels = columns.splits.pieces();
  __shared__ float counts[kThreads];
  __shared__ Moments moments[kItems][kThreads];
  counts[threadIdx.x] = count;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    moments[j][threadIdx.x] = make_moments(count, shift[j], sum[j], squares[j]);
  }
  __syncthreads();
  const uint32_t outputs = columns.columns * kItems;
  for (uint32_t o = threadIdx.x; o < outputs; o += kThreads) {
    const uint32_t j = columns.by_columns.quotient(o);
    const uint32_t lane = o - j * columns.columns;
    const uint32_t column = blockIdx.x * columns.columns + lane;
    if (column >= columns.total) continue;
    float rough = 0.0f, drift = 0.0f, squares_of_all = 0.0f;
    for (uint32_t p = 0; p < columns.pixels; ++p) {
      const uint32_t thread = p * columns.columns + lane;
      rough = fmaf(counts[thread], moments[j][thread].mean, rough);
    }
    const float total = static_cast<float>(pixels);
    rough /= total;
    for (uint32_t p = 0; p < columns.pixels; ++p) {
      const uint32_t thread = p * columns.columns + lane;
      const Moments own = moments[j][thread];
      drift = fmaf(counts[thread], own.mean - rough, drift);
      squares_of_all += squares_about(rough, counts[thread], own);
    }
    const Moments merged = move_to_mean(total, rough, drift, squares_of_all);
    const int64_t channel = int64_t{column} * kItems + j;
    if (gridDim.y == 1) {
      finish.write(channel, merged.mean, merged.squares, total);
      continue;
    }
    partials.at(blockIdx.y, 0, channel) = total;
    partials.at(blockIdx.y, 1, channel) = merged.mean;
    partials.at(blockIdx.y, 2, channel) = merged.squares;
  }
}

// Merges the splits of 8 channels a thread block.
__global__ void __launch_bounds__(kFinishThreads)
    finish_stats_kernel(Partials partials, uint32_t splits, Finish finish) {
  const int64_t channel =
      int64_t{blockIdx.x} * kFinishColumns + threadIdx.x % kFinishColumns;
  const bool inside = channel < partials.channels;
  // Sums of squares about a mean that is close to that of all: nothing is lost
  // in double when they are moved there.
  const float pivot = inside && splits != 0 ? partials.at(0, 1, channel) : 0.0f;
  double sums[3] = {};  // of counts, distances and squares
  if (inside) {
    float own[kFinishAtOnce][3];
    for_each_split(
        splits,
        [&](int u, uint32_t split) {
#pragma unroll
          for (int i = 0; i < 3; ++i)
            own[u][i] = partials.at(split, i, channel);
        },
        [&](int u) {
          const double count = own[u][0];
          const double distance = static_cast<double>(own[u][1]) - pivot;
          sums[0] += count;
          sums[1] += count * distance;
          sums[2] += own[u][2] + count * distance * distance;
        });
  }
  column_sums(sums);
  if (!inside || threadIdx.x >= kFinishColumns) return;
  const double count = sums[0];
  const double distance = sums[1] / fmax(count, 1.0);
  const double mean = pivot + distance;
  const double squares = sums[2] - count * distance * distance;
  finish.write(channel, mean, squares, count);
}

void launch_finish(const Partials& partials, uint32_t splits,
                   const Finish& finish, cudaStream_t stream) {
  finish_stats_kernel<<<finish_grid(partials.channels), kFinishThreads, 0,
                        stream>>>(partials, splits, finish);
  check_launch();
}

template <typename T>
void reduce(const Memory& input, const Channels& channels, const Finish& finish,
            cudaStream_t stream) {
  const T* source = static_cast<const T*>(input.const_data_ptr());
  const bool blocks = channels.row_numel() % kBlock == 0 &&
                      is_aligned(source, 16) &&
                      (!channels.last || channels.count % kBlock == 0);
  const auto launch = [&](const Splits& splits, const auto& kernel) {
    Partials partials{nullptr, channels.count};
    if (splits.count == 1) {
      kernel(partials);
      check_launch();
      return;
    }
    const Workspace workspace(int64_t{splits.count} * 3 * channels.count);
    partials.data = workspace.data();
    kernel(partials);
    check_launch();
    launch_finish(partials, splits.count, finish, stream);
  };
  const auto with_items = [&](auto items) {
    constexpr int kItems = decltype(items)::value;
    if (channels.last) {
      const Columns columns =
          make_columns<kItems>(channels, true, kColumnBlocks);
      launch(columns.splits, [&](const Partials& partials) {
        column_stats_kernel<T, kItems><<<columns.grid(), kThreads, 0, stream>>>(
            source, partials, finish, columns);
      });
    } else {
      const Planes planes = make_planes<kItems>(channels);
      launch(planes.splits, [&](const Partials& partials) {
        plane_stats_kernel<T, kItems>
            <<<planes.grid(channels.count), kThreads, 0, stream>>>(
                source, partials, finish, channels.row_numel(), planes);
      });
    }
  };
  if (blocks) {
    with_items(Constant<kBlock>{});
  } else {
    with_items(Constant<1>{});
  }
}

// Reads the statistics of 256 channels a thread block.
template <typename R>
__global__ void __launch_bounds__(kThreads)
    running_stats_kernel(const R* mean, const R* var, int64_t channels,
                         double eps, Outputs outputs) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= channels) return;
  if (outputs.mean != nullptr) outputs.mean[c] = Number<R>::load(mean[c]);
  outputs.invstd[c] = invstd_of(Number<R>::load(var[c]), eps);
}

Outputs pointers(const StatsOutputs& outputs) {
  return {static_cast<float*>(outputs.mean.mutable_data_ptr()),
          static_cast<float*>(outputs.var.mutable_data_ptr()),
          static_cast<float*>(outputs.invstd.mutable_data_ptr())};
}

}  // namespace

namespace cuda {

void batch_stats(const Memory& input, const Channels& channels, double eps,
                 const RunningStats& running, const StatsOutputs& outputs) {
  if (channels.count == 0) return;
  const cudaStream_t stream = current_stream();
  const Finish finish{
      pointers(outputs),
      {running.mean.mutable_data_ptr(), running.var.mutable_data_ptr(),
       running.mean.dtype(),
       static_cast<int64_t*>(running.batches.mutable_data_ptr()),
       running.momentum},
      eps};
  if (channels.numel() == 0) {
    // No splits: their sums are 0.
    launch_finish({nullptr, channels.count}, 0, finish, stream);
    return;
  }
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    reduce<T>(input, channels, finish, stream);
  });
}

void running_stats(const RunningStats& running, double eps,
                   const StatsOutputs& outputs) {
  const int64_t channels = running.mean.numel();
  if (channels == 0) return;
  dispatch_dtype(running.mean.dtype(), [&](auto type) {
    using R = typename decltype(type)::type;
    running_stats_kernel<R>
        <<<static_cast<unsigned int>((channels + kThreads - 1) / kThreads),
           kThreads, 0, current_stream()>>>(
            static_cast<const R*>(running.mean.const_data_ptr()),
            static_cast<const R*>(running.var.const_data_ptr()), channels, eps,
            pointers(outputs));
    check_launch();
  });
}

}  // namespace cuda
}  // namespace mmactnn
