// What the kernels of a normalisation's gradients get, and where they write.
#pragma once

#include <cstdint>

#include "channels.h"
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
};

// Sums over the channels, and what is computed from them.
struct NormSums {
  // The gradients that pass; of NormCodes::kMask only.
  Memory grad;
  float* gradients;  // [C]
  float* products;   // [C], of the gradients with the normalised input
  // What norm_grad_input() multiplies with and subtracts, [3, C]: scale, then
  // means. Nothing if nobody wants them, and then of no use is what follows.
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
