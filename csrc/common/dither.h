// Subtractive dither: decoding with the random bits that a value was rounded
// with.
//
// A value of t steps above `low` has the code floor(t + u), u being uniform on
// [0, 1). Decoded as code - u + 1/2 its error is uniform within half a step
// either way whatever t is: its expectation is 0 and its variance 1/12 of a
// squared step, where code alone has f (1 - f) for a fraction f of a step above
// the code below, 1/6 on average (L. G. Roberts, "Picture coding using
// pseudo-random noise", 1962; L. Schuchman, "Dither signals and their effect on
// quantization noise", 1964).
//
// u is a number of `fraction` bits and stands for the middle of its interval.
#pragma once

#include <cstdint>

#include "codec.h"
#include "portability.h"

namespace mmactnn {

// a * b + c, rounded once; the product must have 53 significant bits or fewer.
MMACTNN_HOST_DEVICE float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}

// Values are number * step + low for a number of dither_number().
struct DitherRange {
  float low;
  float step;
};

MMACTNN_HOST_DEVICE DitherRange dither_range(Range range, int fraction) {
  const float step =
      multiply(range.step, 1.0f / static_cast<float>(1 << fraction));
  return {add(range.low, multiply(step, 0.5f)), step};
}

// (code - u + 1/2) * 2^fraction - 1/2, which has 24 bits.
MMACTNN_HOST_DEVICE int32_t dither_number(uint32_t code, uint32_t random16,
                                          int fraction) {
  const uint32_t ones = (1u << fraction) - 1u;
  const uint32_t rest = ones - (random16 >> (16 - fraction));
  return static_cast<int32_t>(code << fraction | rest) -
         static_cast<int32_t>(1u << (fraction - 1));
}

MMACTNN_HOST_DEVICE float decode_dithered(uint32_t code, uint32_t random16,
                                          Range range, int fraction) {
  const DitherRange scaled = dither_range(range, fraction);
  const auto number =
      static_cast<float>(dither_number(code, random16, fraction));
  return multiply_add(number, scaled.step, scaled.low);
}

// Whether plain codes of a tensor of any values are decoded with dither: not
// where the smallest value is 0, as in the output of a rectifier. Its many
// zeros lie on a code, and are exact without.
MMACTNN_HOST_DEVICE bool has_dither(Range range) { return range.low != 0.0f; }

}  // namespace mmactnn
