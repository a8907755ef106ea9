// Output tensors, by the C functions beneath the stable API. Its own factories
// look an operator up by name and box its arguments, which takes longer on the
// host than many a kernel on the device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "geometry.h"

namespace mmactnn {

// Uninitialised, on the device of `like`.
inline torch::stable::Tensor allocate_strided(
    const torch::stable::Tensor& like, int64_t dims, const int64_t* sizes,
    const int64_t* strides, torch::headeronly::ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, to<int32_t>(from(dtype)),
                               device_type, like.get_device_index(), &made));
  return torch::stable::Tensor(made);
}

// The same of sizes and strides that a caller gives.
inline torch::stable::Tensor allocate_strided(
    const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides, torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(sizes.size() == strides.size(),
                  "stride must have a number for each dimension, got ",
                  strides.size(), " for ", sizes.size());
  return allocate_strided(like, static_cast<int64_t>(sizes.size()),
                          sizes.data(), strides.data(), dtype);
}

// The same, contiguous, of at most three dimensions.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like,
                                      std::initializer_list<int64_t> sizes,
                                      torch::headeronly::ScalarType dtype) {
  std::array<int64_t, 3> strides{};
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes.begin()[d];
  }
  return allocate_strided(like, static_cast<int64_t>(sizes.size()),
                          sizes.begin(), strides.data(), dtype);
}

// Of the shape, strides and dtype of a dense tensor.
inline torch::stable::Tensor allocate_like(
    const torch::stable::Tensor& tensor) {
  return allocate_strided(tensor, tensor.dim(), tensor.sizes().data(),
                          tensor.strides().data(), tensor.scalar_type());
}

inline torch::stable::Tensor empty_codes(const torch::stable::Tensor& like,
                                         const Geometry& geometry,
                                         int64_t bits) {
  return allocate(like, {geometry.rows, geometry.blocks_per_row() * bits},
                  torch::headeronly::ScalarType::Byte);
}

inline torch::stable::Tensor empty_row_codes(const torch::stable::Tensor& like,
                                             const Geometry& geometry,
                                             int64_t total_bits) {
  return allocate(like, {total_bits * geometry.padded_blocks_per_row()},
                  torch::headeronly::ScalarType::Byte);
}

inline torch::stable::Tensor empty_ranges(const torch::stable::Tensor& like,
                                          const Geometry& geometry) {
  return allocate(like, {geometry.rows, geometry.groups_per_row(), 2},
                  torch::headeronly::ScalarType::BFloat16);
}

// Bits and starts of each row, as quantize_rows() takes them.
inline std::tuple<torch::stable::Tensor, torch::stable::Tensor>
empty_row_widths(const torch::stable::Tensor& like) {
  using torch::headeronly::ScalarType;
  return {allocate(like, {like.size(0)}, ScalarType::Byte),
          allocate(like, {like.size(0)}, ScalarType::Int)};
}

inline torch::stable::Tensor empty_mask(const torch::stable::Tensor& like) {
  return allocate(like, {(like.numel() + kBlock - 1) / kBlock},
                  torch::headeronly::ScalarType::Byte);
}

}  // namespace mmactnn
