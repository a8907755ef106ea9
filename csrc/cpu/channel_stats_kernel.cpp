
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/channel_stats.h"
#include "../common/channels.h"
#include "../common/norm.h"
#include "group.h"
#include "number.h"
#include "parallel.h"

namespace mmactnn {
namespace {

// Sums of the differences from each channel's first element, and of their
// squares.
struct ShiftedSums {
  std::vector<double> shift;
  std::vector<double> sum;
  std::vector<double> squares;

  explicit ShiftedSums(int64_t channels)
      : shift(channels), sum(channels), squares(channels) {}

  void add(int64_t channel, double value) {
    const double distance = value - shift[channel];
    sum[channel] += distance;
    squares[channel] += distance * distance;
  }
};

// Statistics of the channels from `begin` to `end`; one thread sums each of
// them, in memory order.
template <typename T>
void sum_channels(const T* input, const Channels& channels, int64_t begin,
                  int64_t end, ShiftedSums& sums) {
  const int64_t step = channels.last ? 1 : channels.plane;
  for (int64_t c = begin; c < end; ++c) {
    sums.shift[c] = static_cast<float>(input[c * step]);
  }
  for (int64_t row = 0; row < channels.rows; ++row) {
    const T* source = input + row * channels.row_numel();
    if (channels.last) {
      for (int64_t pixel = 0; pixel < channels.plane; ++pixel) {
        for (int64_t c = begin; c < end; ++c) {
          sums.add(c, static_cast<float>(source[pixel * channels.count + c]));
        }
      }
    } else {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t pixel = 0; pixel < channels.plane; ++pixel) {
          sums.add(c, static_cast<float>(source[c * channels.plane + pixel]));
        }
      }
    }
  }
}

void update(const Memory& running, int64_t channel, double batch,
            double momentum) {
  if (!running) return;
  dispatch_dtype(running.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    T& value = static_cast<T*>(running.mutable_data_ptr())[channel];
    value = static_cast<T>(static_cast<float>(
        update_running(static_cast<float>(value), batch, momentum)));
  });
}

}  // namespace

namespace cpu {

void batch_stats(const Memory& input, const Channels& channels, double eps,
                 const RunningStats& running, const StatsOutputs& outputs) {
  if (running.batches) {
    ++*static_cast<int64_t*>(running.batches.mutable_data_ptr());
  }
  const double count = static_cast<double>(channels.channel_numel());
  ShiftedSums sums(channels.count);
  if (input.numel() != 0) {
    dispatch_dtype(input.dtype(), [&](auto type) {
      using T = typename decltype(type)::type;
      const T* source = static_cast<const T*>(input.const_data_ptr());
      parallel_for(
          channels.count,
          std::max<int64_t>(kGrainElements / channels.channel_numel(), 1),
          [&](int64_t begin, int64_t end) {
            sum_channels(source, channels, begin, end, sums);
          });
    });
  }
  auto* mean = static_cast<float*>(outputs.mean.mutable_data_ptr());
  auto* invstd = static_cast<float*>(outputs.invstd.mutable_data_ptr());
  auto* var = static_cast<float*>(outputs.var.mutable_data_ptr());
  for (int64_t c = 0; c < channels.count; ++c) {
    double centre = 0.0, squares = 0.0;
    if (input.numel() != 0) {
      const double distance = sums.sum[c] / count;
      centre = sums.shift[c] + distance;
      squares = sums.squares[c] - sums.sum[c] * distance;
      update(running.mean, c, centre, running.momentum);
      update(running.var, c, squares / (count - 1.0), running.momentum);
    }
    const ChannelStats stats = finish_stats(centre, squares, count, eps);
    if (mean != nullptr) mean[c] = stats.mean;
    if (var != nullptr) var[c] = stats.var;
    invstd[c] = stats.invstd;
  }
}

void running_stats(const RunningStats& running, double eps,
                   const StatsOutputs& outputs) {
  dispatch_dtype(running.mean.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* mean = static_cast<const T*>(running.mean.const_data_ptr());
    const T* var = static_cast<const T*>(running.var.const_data_ptr());
    auto* copy = static_cast<float*>(outputs.mean.mutable_data_ptr());
    auto* invstd = static_cast<float*>(outputs.invstd.mutable_data_ptr());
    const int64_t channels = running.mean.numel();
    for (int64_t c = 0; c < channels; ++c) {
      if (copy != nullptr) copy[c] = static_cast<float>(mean[c]);
      invstd[c] = invstd_of(static_cast<float>(var[c]), eps);
    }
  });
}

}  // namespace cpu
}  // namespace mmactnn
