// Inputs and outputs of the kernels of a normalisation's gradients.
#pragma once

#include <cstdint>

#include "channels.h"
#include "geometry.h"
#include "memory.h"
#include "norm.h"
#include "random_bits.h"
#include "rectified_codec.h"
#include "rotation.h"

namespace mmactnn {

struct NormArguments {
  NormCodes kind;
  Channels channels;
  Geometry geometry;
  const uint8_t* codes;
  const void* ranges;
  const uint8_t* act_codes;  // null if there are none
  int64_t bits;
  int64_t act_bits;  // `bits` if there are none
  DrawnBits drawn;   // of `codes`

  int value_bits() const {
    return static_cast<int>(bits) - (kind == NormCodes::kSplit ? 1 : 0);
  }
  bool rotated() const {
    return drawn.rotated && rotates(geometry, value_bits());
  }
  // See passing_bits(), of `act_codes`.
  uint32_t act_passing_bits() const {
    const int width = static_cast<int>(act_bits);
    return passing_bits(width,
                        drawn.rotated && rotates_zeroed(geometry, width));
  }
};

// Sums over channels, and factors computed from them.
struct NormSums {
  // Gradients that pass; only with NormCodes::kMask.
  Memory grad;
  float* gradients;  // [C]
  float* products;   // [C], of the gradients with the normalised input
  // Scale and means for norm_grad_input(), [3, C]. Null if not wanted, and the
  // fields below are unused then.
  Memory factors;
  const float* weight;  // null: none
  const float* invstd;
  bool use_batch_stats;  // whether the means are subtracted
};

// Scale [C], and means [2, C] of the gradient and of its product.
struct NormFactors {
  const float* scale;
  const float* means;
};

}  // namespace mmactnn
