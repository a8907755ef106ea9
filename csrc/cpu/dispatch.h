// From runtime dtypes and bit widths to template arguments, on the host.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

namespace mmactnn {

template <typename T>
struct TypeTag {
  using type = T;
};

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

// Calls `body` with a TypeTag; dtypes have been checked by check_dtype().
template <typename Body>
void dispatch_dtype(torch::headeronly::ScalarType dtype, const Body& body) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Float) {
    body(TypeTag<float>{});
  } else if (dtype == ScalarType::Half) {
    body(TypeTag<c10::Half>{});
  } else {
    body(TypeTag<c10::BFloat16>{});
  }
}

// Calls `body` with an integral_constant; checked by check_bits().
template <typename Body>
void dispatch_bits(int64_t bits, const Body& body) {
  if (bits == 1) {
    body(std::integral_constant<int, 1>{});
  } else if (bits == 2) {
    body(std::integral_constant<int, 2>{});
  } else if (bits == 4) {
    body(std::integral_constant<int, 4>{});
  } else {
    body(std::integral_constant<int, 8>{});
  }
}

}  // namespace mmactnn
