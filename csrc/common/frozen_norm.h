// A normalisation whose numbers are constants, with what follows it, of one
// element; nothing is kept of it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>

#include "channels.h"
#include "codec.h"
#include "norm_act.h"
#include "norm_act_checks.h"
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

// NaN stays.
MMACTNN_HOST_DEVICE float rectify(float value) {
  return value <= 0.0f ? 0.0f : value;
}

inline Channels check_frozen_norm(const Tensor& input,
                                  const std::optional<Tensor>& residual,
                                  const Tensor& mean, const Tensor& var,
                                  const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& bias) {
  const Channels channels = channels_of("input", input);
  if (residual) check_residual(*residual, input);
  check_per_channel("mean", mean, channels, input);
  check_per_channel("var", var, channels, input);
  if (weight) check_per_channel("weight", *weight, channels, input);
  if (bias) check_per_channel("bias", *bias, channels, input);
  return channels;
}

}  // namespace mmactnn
