// Inputs and outputs of the kernels of norm_act().
#pragma once

#include <cstdint>

#include "geometry.h"
#include "memory.h"
#include "norm_act.h"
#include "random_bits.h"
#include "rotation.h"

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
  Rounding rounding;

  NormActPayload payload() const {
    if (!relu) return NormActPayload::kPlain;
    return residual ? NormActPayload::kPlainAndZeroed : NormActPayload::kSplit;
  }
  // Whether codes are rotated.
  bool rotated(const Geometry& geometry) const {
    const bool split = payload() == NormActPayload::kSplit;
    return rounding.rotated &&
           rotates(geometry, static_cast<int>(bits) - (split ? 1 : 0));
  }
  // The same of the codes of the output.
  bool act_rotated(const Geometry& geometry) const {
    return payload() == NormActPayload::kPlainAndZeroed && rounding.rotated &&
           rotates_zeroed(geometry, static_cast<int>(act_bits));
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
