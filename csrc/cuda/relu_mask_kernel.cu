#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../common/allocate.h"
#include "../common/rectifier.h"
#include "../common/tensor_checks.h"
#include "blocks.h"
#include "launch.h"

namespace mmactnn {
namespace {

template <typename T>
struct Forward {
  Rectifier rectifier;
  uint8_t* mask;

  __device__ __forceinline__ void operator()(int64_t block, T* values) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float value = Number<T>::load(values[i]);
      const bool keep = rectifier.keep(value);
      bits |= static_cast<uint32_t>(keep) << i;
      if (!keep) values[i] = Number<T>::store(rectifier.rest(value));
    }
    // Elements past the end are 0, which no rectifier keeps.
    mask[block] = static_cast<uint8_t>(bits);
  }
};

template <typename T>
struct Backward {
  Rectifier rectifier;
  const uint8_t* mask;

  __device__ __forceinline__ void operator()(int64_t block, T* values) const {
    const uint32_t bits = mask[block];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (!((bits >> i) & 1u)) {
        const float grad = Number<T>::load(values[i]);
        values[i] = Number<T>::store(rectifier.rest_gradient(grad));
      }
    }
  }
};

Tensor forward(const Tensor& input, Tensor& output,
               const Rectifier& rectifier) {
  check_dtype("input", input);
  check_dense("input", input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor mask = empty_mask(input);
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    map_blocks(
        static_cast<const T*>(input.const_data_ptr()),
        static_cast<T*>(output.mutable_data_ptr()), input.numel(),
        Forward<T>{rectifier, static_cast<uint8_t*>(mask.mutable_data_ptr())},
        current_stream(input.get_device_index()));
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
  const torch::stable::accelerator::DeviceGuard guard(
      grad_output.get_device_index());
  Tensor grad_input = empty_dense_like(grad_output);
  dispatch_dtype(grad_output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    map_blocks(static_cast<const T*>(grad_output.const_data_ptr()),
               static_cast<T*>(grad_input.mutable_data_ptr()),
               grad_output.numel(),
               Backward<T>{rectifier,
                           static_cast<const uint8_t*>(mask.const_data_ptr())},
               current_stream(grad_output.get_device_index()));
  });
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("relu_mask", TORCH_BOX(&mmactnn::relu_mask));
  m.impl("relu_mask_", TORCH_BOX(&mmactnn::relu_mask_));
  m.impl("relu_mask_backward", TORCH_BOX(&mmactnn::relu_mask_backward));
}
