// Statistics of channels, for the ops that need them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../common/channel_stats.h"
#include "allocate.h"
#include "channel_checks.h"
#include "registration.h"

namespace mmactnn {

// Statistics of the batch; updates the running ones, too.
MMACTNN_KERNEL(batch_stats, const Memory&, const Channels&, double,
               const RunningStats&, const StatsOutputs&);
// The running ones in place of the batch's.
MMACTNN_KERNEL(running_stats, const RunningStats&, double, const StatsOutputs&);

inline void check_running(const char* name, const Tensor& tensor,
                          const Channels& channels, const Tensor& like) {
  check_dtype(name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == channels.count &&
                      tensor.is_contiguous(),
                  name, " must be a contiguous tensor of shape [",
                  channels.count, "]");
  check_same_device(name, tensor, like);
}

// The tensors of RunningStats.
struct RunningTensors {
  const std::optional<Tensor>& mean;
  const std::optional<Tensor>& var;
  const std::optional<Tensor>& batches;
};

// Both or none; of one dtype.
inline Channels check_stats(const Tensor& input,
                            const RunningTensors& running) {
  const Channels channels = channels_of("input", input);
  STD_TORCH_CHECK(running.mean.has_value() == running.var.has_value(),
                  "running_mean and running_var must both be given or both be "
                  "None");
  if (running.mean.has_value()) {
    check_running("running_mean", *running.mean, channels, input);
    check_running("running_var", *running.var, channels, input);
    STD_TORCH_CHECK(
        running.mean->scalar_type() == running.var->scalar_type(),
        "running_mean and running_var must be of one dtype, got scalar types ",
        static_cast<int>(running.mean->scalar_type()), " and ",
        static_cast<int>(running.var->scalar_type()));
  }
  if (running.batches.has_value()) {
    STD_TORCH_CHECK(running.batches->scalar_type() == ScalarType::Long &&
                        running.batches->numel() == 1,
                    "num_batches_tracked must be an int64 tensor of one "
                    "element");
    check_same_device("num_batches_tracked", *running.batches, input);
  }
  return channels;
}

inline Tensor empty_stats(const Tensor& input, const Channels& channels) {
  return empty(input, {channels.count}, ScalarType::Float);
}

}  // namespace mmactnn
