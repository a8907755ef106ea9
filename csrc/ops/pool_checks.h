// Arguments of pooling ops, checked and turned into a Pool.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "../common/pool.h"
#include "allocate.h"
#include "tensor_checks.h"

namespace mmactnn {

// The arguments that forward and backward share, two numbers each.
struct PoolWindow {
  const std::vector<int64_t>& kernel_size;
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
};

inline PoolAxis make_pool_axis(const PoolWindow& window, size_t axis,
                               int64_t input, int64_t output) {
  const int64_t kernel = window.kernel_size[axis];
  const int64_t stride = window.stride[axis];
  const int64_t padding = window.padding[axis];
  const int64_t dilation = window.dilation[axis];
  STD_TORCH_CHECK(kernel > 0 && stride > 0 && dilation > 0,
                  "kernel_size, stride and dilation must be positive");
  // So that no position overflows, be it outside of the input.
  constexpr int64_t kLimit = INT64_C(1) << 26;
  STD_TORCH_CHECK(input > 0 && input < kLimit && stride < kLimit &&
                      dilation < kLimit && padding >= 0 && padding < kLimit,
                  "sizes, stride, padding and dilation must be below ", kLimit);
  STD_TORCH_CHECK(output > 0 && (output - 1) * stride - padding < input,
                  "every window must begin inside of the padded input");
  return {static_cast<int32_t>(input),
          static_cast<int32_t>(output),
          static_cast<int32_t>(kernel),
          static_cast<int32_t>(padding),
          Divider(static_cast<uint32_t>(stride)),
          Divider(static_cast<uint32_t>(dilation))};
}

inline std::vector<int64_t> with_plane(const Tensor& tensor,
                                       const std::vector<int64_t>& plane) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end() - 2);
  result.insert(result.end(), plane.begin(), plane.end());
  return result;
}

// A tensor as `like`, but of other height and width.
inline Tensor empty_pooled(const Tensor& like,
                           const std::vector<int64_t>& plane,
                           bool channels_last) {
  const std::vector<int64_t> sizes = with_plane(like, plane);
  std::vector<int64_t> order{3, 2, 1, 0};
  if (channels_last) {
    order = {1, 3, 2, 0};
  } else if (sizes.size() == 3) {
    order = {2, 1, 0};
  }
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (const int64_t d : order) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(like, sizes, strides, like.scalar_type());
}

// Checks `tensor`, which is the input or the gradient of the output.
inline void check_pooled(const char* name, const Tensor& tensor,
                         const PoolWindow& window,
                         const std::vector<int64_t>& other_size,
                         bool channels_last) {
  check_dtype(name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 4 || (tensor.dim() == 3 && !channels_last),
                  name, " must have 4 dimensions, or 3 if not channels_last");
  STD_TORCH_CHECK(window.kernel_size.size() == 2 && window.stride.size() == 2 &&
                      window.padding.size() == 2 &&
                      window.dilation.size() == 2 && other_size.size() == 2,
                  "windows and sizes must be given by two numbers each");
  STD_TORCH_CHECK(window.kernel_size[0] * window.kernel_size[1] <= kMaxTaps,
                  "a window may have at most ", kMaxTaps, " taps, got ",
                  window.kernel_size[0] * window.kernel_size[1]);
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t expected = 1;
  const auto check_dimension = [&](int64_t d) {
    STD_TORCH_CHECK(
        tensor.numel() == 0 || sizes[d] == 1 || strides[d] == expected, name,
        " must be contiguous in the given memory format");
    expected *= sizes[d];
  };
  const int64_t last = tensor.dim() - 1;
  if (channels_last) check_dimension(1);
  for (int64_t d = last; d > last - 2; --d) check_dimension(d);
  for (int64_t d = last - 2; d >= 0; --d) {
    if (!(channels_last && d == 1)) check_dimension(d);
  }
}

// The pool of a tensor with elements; `tensor` is the one that is not empty.
inline Pool make_pool(const Tensor& tensor, const PoolWindow& window,
                      const std::vector<int64_t>& input_size,
                      const std::vector<int64_t>& output_size,
                      bool channels_last) {
  const int64_t channels = tensor.size(tensor.dim() - 3);
  const int64_t samples = tensor.dim() == 4 ? tensor.size(0) : 1;
  return {channels_last ? samples : samples * channels,
          channels_last ? channels : 1,
          make_pool_axis(window, 0, input_size[0], output_size[0]),
          make_pool_axis(window, 1, input_size[1], output_size[1])};
}

inline std::vector<int64_t> plane_size(const Tensor& tensor) {
  return {tensor.size(tensor.dim() - 2), tensor.size(tensor.dim() - 1)};
}

inline int64_t index_bytes(int64_t numel) { return (numel + 1) / 2; }

inline void check_indices(const Tensor& indices, const Tensor& grad_output) {
  const int64_t bytes = index_bytes(grad_output.numel());
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Byte && indices.dim() == 1 &&
          indices.is_contiguous() && indices.size(0) == bytes,
      "indices must be a contiguous uint8 tensor of ", bytes, " bytes");
}

}  // namespace mmactnn
