// Statistics of channels, as kernels get and return them.
#pragma once

#include "memory.h"

namespace mmactnn {

// What the statistics of batches are averaged in. Mean and variance are both
// there or both not, and of one dtype.
struct RunningStats {
  Memory mean;
  Memory var;
  // int64, of one element: counts the batches.
  Memory batches;
  double momentum;
};

// Where statistics go, float32 [C]; what nobody wants is left out.
struct StatsOutputs {
  Memory mean;
  Memory var;  // biased
  Memory invstd;
};

}  // namespace mmactnn
