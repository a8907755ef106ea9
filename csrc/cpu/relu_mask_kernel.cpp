#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../common/allocate.h"
#include "../common/codec.h"
#include "../common/tensor_checks.h"
#include "number.h"

namespace mmactnn {
namespace {

constexpr int64_t kGrainBlocks = 4096;

// `output` may be `input`. As in torch, NaN passes in both directions.
template <typename T>
void forward_blocks(const T* input, T* output, uint8_t* mask, int64_t numel,
                    int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlock;
    const int64_t count = std::min<int64_t>(kBlock, numel - start);
    uint32_t bits = 0;
    for (int64_t i = 0; i < count; ++i) {
      const T value = input[start + i];
      const bool keep = !(static_cast<float>(value) <= 0.0f);
      bits |= static_cast<uint32_t>(keep) << i;
      output[start + i] = keep ? value : T(0.0f);
    }
    mask[block] = static_cast<uint8_t>(bits);
  }
}

template <typename T>
void backward_blocks(const T* grad_output, const uint8_t* mask, T* grad_input,
                     int64_t numel, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlock;
    const int64_t count = std::min<int64_t>(kBlock, numel - start);
    for (int64_t i = 0; i < count; ++i) {
      const bool keep = (mask[block] >> i) & 1u;
      grad_input[start + i] = keep ? grad_output[start + i] : T(0.0f);
    }
  }
}

Tensor forward(const Tensor& input, Tensor& output) {
  check_dtype("input", input);
  check_dense("input", input);
  Tensor mask = empty_mask(input);
  const int64_t numel = input.numel();
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    auto* mask_bytes = static_cast<uint8_t*>(mask.mutable_data_ptr());
    torch::stable::parallel_for(
        0, mask.numel(), kGrainBlocks, [&](int64_t begin, int64_t end) {
          forward_blocks(source, target, mask_bytes, numel, begin, end);
        });
  });
  return mask;
}

std::tuple<Tensor, Tensor> relu_mask(Tensor input) {
  Tensor output = torch::stable::empty_like(input);
  Tensor mask = forward(input, output);
  return {output, mask};
}

Tensor relu_mask_(Tensor input) { return forward(input, input); }

Tensor relu_mask_backward(Tensor grad_output, Tensor mask) {
  check_dtype("grad_output", grad_output);
  check_dense("grad_output", grad_output);
  const int64_t numel = grad_output.numel();
  check_mask(mask, numel);
  Tensor grad_input = torch::stable::empty_like(grad_output);
  dispatch_dtype(grad_output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    const auto* mask_bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
    torch::stable::parallel_for(
        0, mask.numel(), kGrainBlocks, [&](int64_t begin, int64_t end) {
          backward_blocks(source, mask_bytes, target, numel, begin, end);
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
