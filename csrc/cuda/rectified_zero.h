// The sums that a rectifier makes zero.
#pragma once

#include "launch.h"

namespace mmactnn {

// The largest number that becomes a zero of the dtype: half of the smallest
// one, a tie.
template <typename T>
constexpr float kLargestZero = 0.0f;
template <>
constexpr float kLargestZero<__half> = 0x1p-25f;
template <>
constexpr float kLargestZero<__nv_bfloat16> = 0x1p-134f;

}  // namespace mmactnn
