// Checks of rectified codes, for encoding and decoding.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../common/geometry.h"
#include "../common/rectified_codec.h"
#include "tensor_checks.h"

namespace mmactnn {

inline void check_rectified_bits(const char* name, int64_t bits) {
  STD_TORCH_CHECK(bits >= kMinRectifiedBits && bits <= kMaxBits, name,
                  " must be an integer from 2 to 8 where there is a rectifier, "
                  "got ",
                  bits);
}

// Geometry of a gradient whose rectifier has these zeroed codes. The mask does
// not depend on ranges, so that groups can have any size.
inline Geometry check_zeroed_codes(const Tensor& grad_output,
                                   const Tensor& codes, int64_t bits) {
  constexpr int64_t kAnyGroup = kRotation;
  check_rows("grad_output", grad_output);
  check_rectified_bits("bits", bits);
  const Geometry geometry =
      make_geometry(grad_output.size(0), grad_output.numel(), kAnyGroup);
  checked_layout(codes, geometry, bits);
  check_same_device("codes", codes, grad_output);
  return geometry;
}

}  // namespace mmactnn
