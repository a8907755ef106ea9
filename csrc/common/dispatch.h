// From runtime dtypes and bit widths to template arguments.
#pragma once

#include <cstdint>
#include <type_traits>

#include "memory.h"
#include "portability.h"

namespace mmactnn {

template <typename T>
struct TypeTag {
  using type = T;
};

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls `body` with a TypeTag of the C++ type that stands for a dtype on the
// device at hand; dtypes have been checked by check_dtype().
template <typename Float, typename Half, typename BFloat16, typename Body>
void dispatch_types(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat) {
    body(TypeTag<Float>{});
  } else if (dtype == Dtype::kHalf) {
    body(TypeTag<Half>{});
  } else {
    body(TypeTag<BFloat16>{});
  }
}

// Calls `body` with a Constant; for widths from 1 to 8.
template <typename Body>
MMACTNN_HOST_DEVICE void dispatch_bits(int bits, const Body& body) {
  switch (bits) {
    case 1:
      return body(Constant<1>{});
    case 2:
      return body(Constant<2>{});
    case 3:
      return body(Constant<3>{});
    case 4:
      return body(Constant<4>{});
    case 5:
      return body(Constant<5>{});
    case 6:
      return body(Constant<6>{});
    case 7:
      return body(Constant<7>{});
    default:
      return body(Constant<8>{});
  }
}

}  // namespace mmactnn
