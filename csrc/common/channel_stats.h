// Statistics of channels, as kernels get and return them.
#pragma once

#include "memory.h"

namespace mmactnn {

// Running averages of batch statistics. Mean and variance are both set or both
// null, and have the same dtype.
struct RunningStats {
  Memory mean;
  Memory var;
  // int64, of one element: counts the batches.
  Memory batches;
  double momentum;
};

// Outputs of statistics, float32 [C]; null if not wanted.
struct StatsOutputs {
  Memory mean;
  Memory var;  // biased
  Memory invstd;
};

}  // namespace mmactnn
