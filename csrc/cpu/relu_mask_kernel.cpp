#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/allocate.h"
#include "../common/rectifier.h"
#include "../common/tensor_checks.h"
#include "blocks.h"
#include "number.h"

namespace mmactnn {
namespace {

Tensor forward(const Tensor& input, Tensor& output,
               const Rectifier& rectifier) {
  check_dtype("input", input);
  check_dense("input", input);
  Tensor mask = empty_mask(input);
  auto* mask_bytes = static_cast<uint8_t*>(mask.mutable_data_ptr());
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_block(
        static_cast<const T*>(input.const_data_ptr()),
        static_cast<T*>(output.mutable_data_ptr()), input.numel(),
        [&](int64_t block, const T* source, T* target, int64_t count) {
          uint32_t bits = 0;
          for (int64_t i = 0; i < count; ++i) {
            const float value = static_cast<float>(source[i]);
            const bool keep = rectifier.keep(value);
            bits |= static_cast<uint32_t>(keep) << i;
            target[i] = keep ? source[i] : T(rectifier.rest(value));
          }
          mask_bytes[block] = static_cast<uint8_t>(bits);
        });
  });
  return mask;
}

std::tuple<Tensor, Tensor> relu_mask(Tensor input, std::optional<double> max,
                                     std::optional<double> slope) {
  Tensor output = empty_dense_like(input);
  Tensor mask = forward(input, output, make_rectifier(max, slope));
  return {output, mask};
}

Tensor relu_mask_(Tensor input, std::optional<double> max,
                  std::optional<double> slope) {
  return forward(input, input, make_rectifier(max, slope));
}

Tensor relu_mask_backward(Tensor grad_output, Tensor mask,
                          std::optional<double> slope) {
  check_dtype("grad_output", grad_output);
  check_dense("grad_output", grad_output);
  check_mask(mask, grad_output.numel());
  const Rectifier rectifier = make_rectifier(std::nullopt, slope);
  Tensor grad_input = empty_dense_like(grad_output);
  const auto* mask_bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
  dispatch_dtype(grad_output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_block(
        static_cast<const T*>(grad_output.const_data_ptr()),
        static_cast<T*>(grad_input.mutable_data_ptr()), grad_output.numel(),
        [&](int64_t block, const T* source, T* target, int64_t count) {
          for (int64_t i = 0; i < count; ++i) {
            const bool keep = (mask_bytes[block] >> i) & 1u;
            target[i] =
                keep
                    ? source[i]
                    : T(rectifier.rest_gradient(static_cast<float>(source[i])));
          }
        });
  });
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("relu_mask", TORCH_BOX(&mmactnn::relu_mask));
  m.impl("relu_mask_", TORCH_BOX(&mmactnn::relu_mask_));
  m.impl("relu_mask_backward", TORCH_BOX(&mmactnn::relu_mask_backward));
}
