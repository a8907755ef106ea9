// Activations that are the identity on a range and constant or linear
// outside of it: their backward needs one bit an element.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "codec.h"
#include "portability.h"

namespace mmactnn {

// ReLU, capped at `max` (ReLU6) or with a slope below 0 (LeakyReLU).
struct Rectifier {
  float max;    // NaN, to which nothing compares: no cap
  float slope;  // below 0, if `leaky`
  bool leaky;

  // Whether the gradient of an element passes as it is. That of NaN does,
  // unless leaky, as in torch.
  MMACTNN_HOST_DEVICE bool keep(float value) const {
    return leaky ? value > 0.0f : !(value <= 0.0f || value >= max);
  }

  // The output for an element that keep() is false for.
  MMACTNN_HOST_DEVICE float rest(float value) const {
    if (leaky) return multiply(value, slope);
    return value >= max ? max : 0.0f;
  }

  // The gradient of such an element from that of its output.
  MMACTNN_HOST_DEVICE float rest_gradient(float grad) const {
    return leaky ? multiply(grad, slope) : 0.0f;
  }
};

inline Rectifier make_rectifier(std::optional<double> max,
                                std::optional<double> slope) {
  STD_TORCH_CHECK(!(max && slope), "max and slope exclude each other");
  return {max ? static_cast<float>(*max) : bits_float(0x7FC00000u),
          static_cast<float>(slope.value_or(0.0)), slope.has_value()};
}

}  // namespace mmactnn
