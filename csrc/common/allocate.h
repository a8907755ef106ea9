// Output tensors, through the stable dispatcher.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "geometry.h"

namespace mmactnn {

// Uninitialised, of `sizes` and `strides`, on the device of `like`.
inline torch::stable::Tensor empty_strided(
    const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides, torch::headeronly::ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(sizes),
      from(strides),
      from(std::optional<torch::headeronly::ScalarType>(dtype)),
      from(std::optional<torch::headeronly::Layout>()),
      from(std::optional<torch::stable::Device>(like.device())),
      from(std::optional<bool>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      "aten::empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

inline torch::stable::Tensor empty_codes(const torch::stable::Tensor& like,
                                         const Geometry& geometry,
                                         int64_t bits) {
  return torch::stable::new_empty(
      like, {geometry.rows, geometry.blocks_per_row() * bits},
      torch::headeronly::ScalarType::Byte);
}

inline torch::stable::Tensor empty_row_codes(const torch::stable::Tensor& like,
                                             const Geometry& geometry,
                                             int64_t total_bits) {
  return torch::stable::new_empty(
      like, {total_bits * geometry.padded_blocks_per_row()},
      torch::headeronly::ScalarType::Byte);
}

inline torch::stable::Tensor empty_ranges(const torch::stable::Tensor& like,
                                          const Geometry& geometry) {
  return torch::stable::new_empty(like,
                                  {geometry.rows, geometry.groups_per_row(), 2},
                                  torch::headeronly::ScalarType::BFloat16);
}

// Bits and starts of each row, as quantize_rows() takes them.
inline std::tuple<torch::stable::Tensor, torch::stable::Tensor>
empty_row_widths(const torch::stable::Tensor& like) {
  using torch::headeronly::ScalarType;
  return {torch::stable::new_empty(like, {like.size(0)}, ScalarType::Byte),
          torch::stable::new_empty(like, {like.size(0)}, ScalarType::Int)};
}

inline torch::stable::Tensor empty_mask(const torch::stable::Tensor& like) {
  return torch::stable::new_empty(like, {(like.numel() + kBlock - 1) / kBlock},
                                  torch::headeronly::ScalarType::Byte);
}

}  // namespace mmactnn
