// The arguments of channel_stats, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "channels.h"

namespace mmactnn {

inline void check_running(const char* name, const Tensor& tensor,
                          const Channels& channels, const Tensor& like) {
  check_dtype(name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == channels.count &&
                      tensor.is_contiguous(),
                  name, " must be a contiguous tensor of shape [",
                  channels.count, "]");
  check_same_device(name, tensor, like);
}

// Both or none; of one dtype.
inline Channels check_stats(const Tensor& input,
                            const std::optional<Tensor>& running_mean,
                            const std::optional<Tensor>& running_var) {
  const Channels channels = channels_of("input", input);
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
                  "running_mean and running_var must both be given or both be "
                  "None");
  if (running_mean.has_value()) {
    check_running("running_mean", *running_mean, channels, input);
    check_running("running_var", *running_var, channels, input);
    STD_TORCH_CHECK(
        running_mean->scalar_type() == running_var->scalar_type(),
        "running_mean and running_var must be of one dtype, got scalar types ",
        static_cast<int>(running_mean->scalar_type()), " and ",
        static_cast<int>(running_var->scalar_type()));
  }
  return channels;
}

}  // namespace mmactnn
