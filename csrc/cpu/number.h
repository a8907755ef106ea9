// The dtypes as C++ types of the host.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cfloat>

#include "../common/dispatch.h"

namespace mmactnn {

// The largest finite number of a dtype.
template <typename T>
struct Largest;
template <>
struct Largest<float> {
  static constexpr float value = FLT_MAX;
};
template <>
struct Largest<c10::Half> {
  static constexpr float value = 65504.0f;
};
template <>
struct Largest<c10::BFloat16> {
  static constexpr float value = 0x1.FEp127f;
};

// To float and back, as the device's Number.
template <typename T>
struct HostNumber {
  static float load(T x) { return static_cast<float>(x); }
  static T store(float x) { return static_cast<T>(x); }
};

template <typename Body>
void dispatch_dtype(Dtype dtype, const Body& body) {
  dispatch_types<float, c10::Half, c10::BFloat16>(dtype, body);
}

}  // namespace mmactnn
