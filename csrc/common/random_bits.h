// Random bits as arguments of kernels: those to round with, and to decode.
#pragma once

#include <cstdint>

#include "philox.h"

namespace mmactnn {

// How values become codes.
struct Rounding {
  CountedStream random;
  bool rotated;  // where there are rotated codes, see rotation.h
};

// Random bits of the codes that an op decodes.
struct DrawnBits {
  bool enabled;  // else codes alone are decoded, and the rest is unused
  CountedStream random;
  int64_t first_row;  // of the tensor that was rounded
  bool rotated;       // as in Rounding
};

}  // namespace mmactnn
