// Inputs and outputs of the kernels of a normalisation's gradients.
#pragma once

#include <cstdint>

#include "channels.h"
#include "dither.h"
#include "geometry.h"
#include "memory.h"
#include "norm.h"

namespace mmactnn {

struct NormArguments {
  NormCodes kind;
  Channels channels;
  Geometry geometry;
  const uint8_t* codes;
  const uint32_t* ranges;
  const uint8_t* act_codes;  // null if there are none
  int64_t bits;
  int64_t act_bits;  // `bits` if there are none
  Dither dither;     // of `codes`
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
