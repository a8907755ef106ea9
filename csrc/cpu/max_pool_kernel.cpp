#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/pool.h"
#include "../common/pool_checks.h"
#include "../common/tensor_checks.h"
#include "number.h"

namespace mmactnn {
namespace {

constexpr int64_t kGrainElements = 8192;

// Where an element lies in a tensor [outer, height, width, inner].
struct Place {
  int64_t outer;
  int32_t row;
  int32_t column;
  int64_t inner;

  Place(int64_t index, int32_t height, int32_t width, int64_t channels) {
    inner = index % channels;
    index /= channels;
    column = static_cast<int32_t>(index % width);
    index /= width;
    row = static_cast<int32_t>(index % height);
    outer = index / height;
  }
};

template <typename T>
void pool_bytes(const T* input, T* output, uint8_t* indices, const Pool& pool,
                int64_t numel, int64_t begin, int64_t end) {
  for (int64_t byte = begin; byte < end; ++byte) {
    uint32_t taps = 0;
    const int64_t count = std::min<int64_t>(2, numel - 2 * byte);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = 2 * byte + i;
      const Place at(index, pool.height.output, pool.width.output, pool.inner);
      const auto maximum = find_maximum<T, HostNumber<T>, int64_t>(
          input + at.outer * pool.input_plane() + at.inner, pool, at.row,
          at.column);
      output[index] = maximum.value;
      taps |= maximum.tap << (4 * i);
    }
    indices[byte] = static_cast<uint8_t>(taps);
  }
}

std::tuple<Tensor, Tensor> max_pool2d(
    Tensor input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation,
    std::vector<int64_t> output_size, bool channels_last) {
  const PoolWindow window{kernel_size, stride, padding, dilation};
  check_pooled("input", input, window, output_size, channels_last);
  Tensor output = empty_pooled(input, output_size, channels_last);
  Tensor indices = empty_indices(output);
  const int64_t numel = output.numel();
  if (numel == 0) return {output, indices};
  const Pool pool =
      make_pool(input, window, plane_size(input), output_size, channels_last);
  auto* index_bytes = static_cast<uint8_t*>(indices.mutable_data_ptr());
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    torch::stable::parallel_for(0, indices.numel(), kGrainElements / 2,
                                [&](int64_t begin, int64_t end) {
                                  pool_bytes(source, target, index_bytes, pool,
                                             numel, begin, end);
                                });
  });
  return {output, indices};
}

template <typename T>
void gather_elements(const T* grad_output, const uint8_t* indices,
                     T* grad_input, const Pool& pool, int64_t begin,
                     int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Place at(index, pool.height.input, pool.width.input, pool.inner);
    grad_input[index] = gather_gradient<T, HostNumber<T>, int64_t>(
        grad_output, indices, pool, at.outer * pool.output_plane() + at.inner,
        at.row, at.column);
  }
}

Tensor max_pool2d_backward(Tensor grad_output, Tensor indices,
                           std::vector<int64_t> kernel_size,
                           std::vector<int64_t> stride,
                           std::vector<int64_t> padding,
                           std::vector<int64_t> dilation,
                           std::vector<int64_t> input_size,
                           bool channels_last) {
  const PoolWindow window{kernel_size, stride, padding, dilation};
  check_pooled("grad_output", grad_output, window, input_size, channels_last);
  check_indices(indices, grad_output);
  Tensor grad_input = empty_pooled(grad_output, input_size, channels_last);
  const int64_t numel = grad_input.numel();
  if (numel == 0) return grad_input;
  const Pool pool = make_pool(grad_output, window, input_size,
                              plane_size(grad_output), channels_last);
  const auto* index_bytes =
      static_cast<const uint8_t*>(indices.const_data_ptr());
  dispatch_dtype(grad_output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    torch::stable::parallel_for(
        0, numel, kGrainElements, [&](int64_t begin, int64_t end) {
          gather_elements(source, index_bytes, target, pool, begin, end);
        });
  });
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&mmactnn::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&mmactnn::max_pool2d_backward));
}
