// Check of the residual that is added to a normalised tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "tensor_checks.h"

namespace mmactnn {

inline void check_residual(const Tensor& residual, const Tensor& input) {
  STD_TORCH_CHECK(residual.scalar_type() == input.scalar_type(),
                  "residual must be of the dtype of input");
  bool same_shape = residual.dim() == input.dim();
  bool same_strides = same_shape;
  for (int64_t d = 0; same_shape && d < input.dim(); ++d) {
    same_shape = residual.size(d) == input.size(d);
    same_strides = same_strides && (input.size(d) == 1 ||
                                    residual.stride(d) == input.stride(d));
  }
  STD_TORCH_CHECK(same_shape, "residual must be of the shape of input");
  STD_TORCH_CHECK(same_strides || input.numel() == 0,
                  "residual must have the strides of input");
  check_same_device("residual", residual, input);
}

}  // namespace mmactnn
