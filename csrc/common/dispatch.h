// From runtime dtypes and bit widths to template arguments.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <type_traits>

namespace mmactnn {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls `body` with a TypeTag of the C++ type that stands for a dtype on the
// device at hand; dtypes have been checked by check_dtype().
template <typename Float, typename Half, typename BFloat16, typename Body>
void dispatch_types(torch::headeronly::ScalarType dtype, const Body& body) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Float) {
    body(TypeTag<Float>{});
  } else if (dtype == ScalarType::Half) {
    body(TypeTag<Half>{});
  } else {
    body(TypeTag<BFloat16>{});
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
