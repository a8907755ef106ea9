// Output tensors.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "../common/geometry.h"
#include "errors.h"

namespace mmactnn {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// An uninitialised tensor of `sizes` and `strides`. Calls of the stable
// dispatcher instead would take the host several times as long.
inline torch::stable::Tensor allocate(Sizes sizes, Sizes strides,
                                      torch::headeronly::ScalarType dtype,
                                      int32_t device_type,
                                      int32_t device_index) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  STD_TORCH_CHECK(sizes.size() == strides.size(),
                  "size and stride must be of one length, got ", sizes.size(),
                  " and ", strides.size());
  AtenTensorHandle tensor = nullptr;
  STD_TORCH_CHECK(aoti_torch_empty_strided(
                      static_cast<int64_t>(sizes.size()), sizes.data(),
                      strides.data(), to<int32_t>(from(dtype)), device_type,
                      device_index, &tensor) == TORCH_SUCCESS,
                  "a tensor cannot be allocated: ", last_error());
  return torch::stable::Tensor(tensor);
}

// The same on the device of `like`.
inline torch::stable::Tensor empty_strided(
    const torch::stable::Tensor& like, Sizes sizes, Sizes strides,
    torch::headeronly::ScalarType dtype) {
  int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  return allocate(sizes, strides, dtype, type, index);
}

// The numbers as a tensor of the host.
inline torch::stable::Tensor on_host(const std::vector<int64_t>& numbers) {
  const auto count = static_cast<int64_t>(numbers.size());
  const int64_t stride = 1;
  const torch::stable::Tensor tensor =
      allocate({&count, 1}, {&stride, 1}, torch::headeronly::ScalarType::Long,
               aoti_torch_device_type_cpu(), 0);
  std::copy(numbers.begin(), numbers.end(),
            static_cast<int64_t*>(tensor.mutable_data_ptr()));
  return tensor;
}

// The same, contiguous, of up to four dimensions.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like,
                                   std::initializer_list<int64_t> sizes,
                                   torch::headeronly::ScalarType dtype) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  return empty_strided(like, {sizes.begin(), sizes.size()},
                       {strides.data(), sizes.size()}, dtype);
}

// A tensor with the shape, strides and dtype of a dense one.
inline torch::stable::Tensor empty_dense_like(
    const torch::stable::Tensor& like) {
  return empty_strided(like, like.sizes(), like.strides(), like.scalar_type());
}

inline torch::stable::Tensor empty_codes(const torch::stable::Tensor& like,
                                         const Geometry& geometry,
                                         int64_t bits) {
  return empty(like, {geometry.rows, geometry.blocks_per_row() * bits},
               torch::headeronly::ScalarType::Byte);
}

inline torch::stable::Tensor empty_row_codes(const torch::stable::Tensor& like,
                                             const Geometry& geometry,
                                             int64_t total_bits) {
  return empty(like, {total_bits * geometry.padded_blocks_per_row()},
               torch::headeronly::ScalarType::Byte);
}

// Ranges of `width` numbers a group: a pair for each range.
inline torch::stable::Tensor empty_ranges(const torch::stable::Tensor& like,
                                          const Geometry& geometry,
                                          int64_t width = 2) {
  return empty(like, {geometry.rows, geometry.groups_per_row(), width},
               torch::headeronly::ScalarType::BFloat16);
}

inline torch::stable::Tensor empty_mask(const torch::stable::Tensor& like) {
  return empty(like, {(like.numel() + kBlock - 1) / kBlock},
               torch::headeronly::ScalarType::Byte);
}

}  // namespace mmactnn
