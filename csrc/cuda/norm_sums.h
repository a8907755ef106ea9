// Results of sums over channels, and factors of channels for the gradient of an
// input.
#pragma once

#include <cstdint>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/norm_codes.h"
#include "launch.h"

namespace mmactnn {

// Makes the outputs from sums of a channel over all splits.
struct SumsOutputs {
  float* gradients;  // [C]
  float* products;   // [C], of the gradients with the normalised input
  // Scale and means for grad_input(), [3, C]; null if not wanted.
  float* factors;
  const float* weight;  // null: none
  const float* invstd;
  float count;           // elements of each channel
  bool use_batch_stats;  // whether the means are subtracted
  int64_t channels;

  SumsOutputs(const Channels& of, const NormSums& sums)
      : gradients(sums.gradients),
        products(sums.products),
        factors(static_cast<float*>(sums.factors.mutable_data_ptr())),
        weight(sums.weight),
        invstd(sums.invstd),
        count(static_cast<float>(of.channel_numel())),
        use_batch_stats(sums.use_batch_stats),
        channels(of.count) {}

  // `which`: 0 for the gradients, 1 for their products.
  __device__ __forceinline__ void write(int64_t channel, int which,
                                        float sum) const {
    (which == 0 ? gradients : products)[channel] = sum;
    if (factors == nullptr) return;
    factors[(1 + which) * channels + channel] =
        use_batch_stats ? __fdiv_rn(sum, count) : 0.0f;
    if (which != 0) return;
    const float scale = weight == nullptr ? 1.0f : weight[channel];
    factors[channel] = multiply(invstd[channel], scale);
  }
};

struct NormVectors {
  const float* scale;
  const float* means;  // of the gradient, then of its product
  int64_t channels;
};

struct ChannelFactors {
  float scale;
  float mean_grad;
  float mean_product;
};

__device__ __forceinline__ ChannelFactors
load_factors(const NormVectors& vectors, int64_t channel) {
  return {vectors.scale[channel], vectors.means[channel],
          vectors.means[vectors.channels + channel]};
}

}  // namespace mmactnn
