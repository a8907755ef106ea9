// Normalisation by constants with addition and ReLU of one element; nothing is
// kept.
#pragma once

#include <cmath>
#include <cstdint>

#include "codec.h"
#include "norm_act.h"
#include "portability.h"

namespace mmactnn {

// As torch's kernels for the CPU have it: y = x * scale + shift.
struct FrozenChannel {
  float scale;
  float shift;

  static MMACTNN_HOST_DEVICE FrozenChannel of(float mean, float var, float eps,
                                              float weight, float bias) {
    const float scale = multiply(1.0f / sqrtf(add(var, eps)), weight);
    return {scale, add(bias, -multiply(mean, scale))};
  }

  MMACTNN_HOST_DEVICE float apply(float value) const {
    return add(multiply(value, scale), shift);
  }
};

// Parameters of all channels, in memory that kernels read.
struct FrozenParameters {
  const float* mean;
  const float* var;
  const float* weight;  // null: none
  const float* bias;    // null: none
  float eps;

  MMACTNN_HOST_DEVICE FrozenChannel channel(int64_t c) const {
    return FrozenChannel::of(mean[c], var[c], eps,
                             weight == nullptr ? kNoWeight : weight[c],
                             bias == nullptr ? kNoBias : bias[c]);
  }
};

// NaN stays.
MMACTNN_HOST_DEVICE float rectify(float value) {
  return value <= 0.0f ? 0.0f : value;
}

}  // namespace mmactnn
