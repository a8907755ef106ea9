// Gain of a row by another bit.
//
// Stochastic rounding to b bits has a variance of c / (2^b - 1)^2, c being the
// row's sensitivity. The gain of the next bit falls with every bit, so that
// allocating bits one by one, each to the row that gains most, is optimal.
#pragma once

#include <cfloat>
#include <cstdint>

#include "codec.h"
#include "portability.h"

namespace mmactnn {

constexpr MMACTNN_HOST_DEVICE double variance_factor(int bits) {
  const double levels = max_code_of(bits);
  return 1.0 / (levels * levels);
}

// Decrease of the variance by a bit more than `bits`, at sensitivity 1.
constexpr MMACTNN_HOST_DEVICE float unit_gain(int bits) {
  return static_cast<float>(variance_factor(bits) - variance_factor(bits + 1));
}

// A sensitivity that gains can be computed from, never -0: the bits of gains
// are then in the order of their values.
MMACTNN_HOST_DEVICE float clamp_sensitivity(float value) {
  if (value <= 0.0f) return 0.0f;
  return value < FLT_MAX ? value : FLT_MAX;  // NaN and inf are the largest
}

// Gain of a bit more than `bits`, as an integer of the same order.
MMACTNN_HOST_DEVICE uint32_t gain_key(float sensitivity, int bits) {
  constexpr float kUnitGain[kMaxBits] = {
      0.0f,         unit_gain(1), unit_gain(2), unit_gain(3),
      unit_gain(4), unit_gain(5), unit_gain(6), unit_gain(7)};
  return float_bits(multiply(sensitivity, kUnitGain[bits]));
}

}  // namespace mmactnn
