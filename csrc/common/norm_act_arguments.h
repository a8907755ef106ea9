// Inputs and outputs of the kernels of norm_act().
#pragma once

#include <cstdint>

#include "memory.h"
#include "norm_act.h"
#include "philox.h"

namespace mmactnn {

struct NormActArguments {
  Memory input;
  Memory residual;
  Memory mean;
  Memory invstd;
  Memory weight;
  Memory bias;
  bool relu;
  int64_t bits;
  int64_t act_bits;
  int64_t group_size;
  CountedStream random;

  NormActPayload payload() const {
    if (!relu) return NormActPayload::kPlain;
    return residual ? NormActPayload::kPlainAndZeroed : NormActPayload::kSplit;
  }
};

// The output, which may be the input, codes and ranges. Those of the output
// are without elements unless they are part of the payload.
struct NormActOutputs {
  Memory output;
  Memory codes;
  Memory ranges;
  Memory act_codes;
  Memory act_ranges;
};

}  // namespace mmactnn
