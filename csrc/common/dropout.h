// Choice of the elements that dropout keeps, by random bits of their place.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "codec.h"
#include "philox.h"
#include "portability.h"

namespace mmactnn {

struct Dropout {
  CountedStream stream;
  uint32_t threshold;  // elements whose 16 random bits are below are dropped
  float scale;         // of the others, so that the expectation stays

  MMACTNN_HOST_DEVICE float factor(uint32_t random16) const {
    return random16 < threshold ? 0.0f : scale;
  }
};

// `p` is rounded to a multiple of 2^-16 below 1, and the scale is that of the
// rounded probability.
inline Dropout make_dropout(double p, const CountedStream& stream) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "p must be in [0, 1), got ", p);
  const double numbers = static_cast<double>(kRandomScale);
  const double threshold = std::min(std::nearbyint(p * numbers), numbers - 1);
  return {stream, static_cast<uint32_t>(threshold),
          static_cast<float>(numbers / (numbers - threshold))};
}

}  // namespace mmactnn
