// Statistics of channels, for the ops that need them: either side has the same
// functions. Arguments have been checked, see check_stats(), and the device is
// the current one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "channels.h"
#include "tensor_checks.h"

namespace mmactnn {

// What the statistics of batches are averaged in. Mean and variance are both
// there or both not, and of one dtype.
struct RunningStats {
  std::optional<Tensor> mean;
  std::optional<Tensor> var;
  // int64, of one element: counts the batches.
  std::optional<Tensor> batches;
  double momentum;
};

// Where statistics go, float32 [C]; what nobody wants is left out.
struct StatsOutputs {
  std::optional<Tensor> mean;
  std::optional<Tensor> var;  // biased
  Tensor invstd;
};

namespace cpu {

// Statistics of the batch, which are averaged in `running`, too.
void batch_stats(const Tensor& input, const Channels& channels, double eps,
                 const RunningStats& running, const StatsOutputs& outputs);
// The running statistics in place of the batch's.
void running_stats(const RunningStats& running, double eps,
                   const StatsOutputs& outputs);

}  // namespace cpu

namespace cuda {

void batch_stats(const Tensor& input, const Channels& channels, double eps,
                 const RunningStats& running, const StatsOutputs& outputs);
void running_stats(const RunningStats& running, double eps,
                   const StatsOutputs& outputs);

}  // namespace cuda

}  // namespace mmactnn
