// Codes as floats without the slow conversion of integers.
#pragma once

#include <cfloat>
#include <cstdint>

#include "../common/codec.h"
#include "launch.h"

namespace mmactnn {

// kIntegerFloat in a register, for a `count` that is not negative. The compiler
// must not know: it would make a constant of it, of which an instruction takes
// only one, and spend another instruction on the other for every element.
__device__ __forceinline__ uint32_t opaque_integer_float(uint32_t count) {
  return kIntegerFloat ^ (count & 0x80000000u);
}

// Whether no code of a group is special or decodes to more than `largest`,
// with half a step of dither, so that no clamp is needed.
__device__ __forceinline__ bool decodes_plainly(Range range, uint32_t max_code,
                                                float largest) {
  const float product = multiply(static_cast<float>(max_code + 1u), range.step);
  // False for NaN.
  return product <= FLT_MAX && add(range.low, -range.step) >= -largest &&
         add(product, range.low) <= largest;
}

}  // namespace mmactnn
