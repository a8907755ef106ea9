// Argument checks that several ops share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/random_bits.h"
#include "../common/rotation.h"

namespace mmactnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dtype(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  name,
                  " must be float32, float16 or bfloat16, got scalar type ",
                  static_cast<int>(dtype));
}

inline void check_same_device(const char* name, const Tensor& tensor,
                              const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name,
                  " must be on the device of the other tensors");
}

inline void check_rotated_group(bool rotated, int64_t group_size) {
  STD_TORCH_CHECK(!rotated || group_size == kRotation, "group_size must be ",
                  kRotation, " for rotated codes, got ", group_size);
}

// The random stream of an op on `input`.
inline CountedStream checked_stream(int64_t seed, int64_t offset,
                                    const std::optional<Tensor>& offset_tensor,
                                    const Tensor& input) {
  const PhiloxStream first{static_cast<uint64_t>(seed),
                           static_cast<uint64_t>(offset)};
  if (!offset_tensor) return {first, nullptr};
  STD_TORCH_CHECK(offset_tensor->scalar_type() == ScalarType::Long &&
                      offset_tensor->numel() == 1,
                  "offset_tensor must be an int64 tensor of one element");
  check_same_device("offset_tensor", *offset_tensor, input);
  return {first, static_cast<const int64_t*>(offset_tensor->const_data_ptr())};
}

// The rounding of an op on `input`.
inline Rounding checked_rounding(int64_t seed, int64_t offset,
                                 const std::optional<Tensor>& offset_tensor,
                                 bool rotated, int64_t group_size,
                                 const Tensor& input) {
  check_rotated_group(rotated, group_size);
  return {checked_stream(seed, offset, offset_tensor, input), rotated};
}

// The random bits of codes that are decoded to or for a tensor like `like`:
// `numbers` are none, where codes alone are decoded, or else seed, offset, the
// first row, and 1 where codes are rotated, 0 where not.
inline DrawnBits checked_drawn(const std::vector<int64_t>& numbers,
                               const std::optional<Tensor>& offset_tensor,
                               const Tensor& like) {
  if (numbers.empty()) return {};
  STD_TORCH_CHECK(numbers.size() == 4 && numbers[2] >= 0 &&
                      (numbers[3] == 0 || numbers[3] == 1),
                  "drawn must be empty, or seed, offset, first row and 1 for "
                  "rotated codes or 0, got ",
                  numbers.size(), " numbers");
  return {true, checked_stream(numbers[0], numbers[1], offset_tensor, like),
          numbers[2], numbers[3] != 0};
}

// True if the elements fill one piece of memory without gaps or overlaps.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<int64_t> order;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline void check_dense(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(is_dense(tensor), name,
                  " must be dense in memory (contiguous, channels_last or a "
                  "permutation of it)");
}

inline void check_bits(int64_t bits) {
  STD_TORCH_CHECK(bits >= 1 && bits <= kMaxBits,
                  "bits must be an integer from 1 to 8, got ", bits);
}

inline void check_group_size(int64_t group_size) {
  STD_TORCH_CHECK(group_size == 64 || group_size == 128 || group_size == 256 ||
                      group_size == 512,
                  "group_size must be 64, 128, 256 or 512, got ", group_size);
}

inline Geometry make_geometry(int64_t rows, int64_t numel, int64_t group_size) {
  check_group_size(group_size);
  return {rows, rows == 0 ? 0 : numel / rows, group_size};
}

// A tensor that is read row by row.
inline void check_rows(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor);
  check_dense(name, tensor);
  STD_TORCH_CHECK(tensor.dim() >= 1, name,
                  " must have at least one dimension, got 0");
  const int64_t rows = tensor.size(0);
  if (tensor.numel() == 0 || rows == 1) return;
  const int64_t row_numel = tensor.numel() / rows;
  STD_TORCH_CHECK(tensor.stride(0) == row_numel, name,
                  "'s dimension 0 must be the outermost in memory, got stride ",
                  tensor.stride(0), " where ", row_numel, " was expected");
}

inline Geometry input_geometry(const Tensor& input, int64_t group_size) {
  check_rows("input", input);
  return make_geometry(input.size(0), input.numel(), group_size);
}

// The geometry of a tensor of `sizes`.
inline Geometry geometry_of_size(const std::vector<int64_t>& sizes,
                                 int64_t group_size) {
  STD_TORCH_CHECK(!sizes.empty(),
                  "size must have at least one dimension, got 0");
  const int64_t numel = std::accumulate(sizes.begin(), sizes.end(), int64_t{1},
                                        std::multiplies<>());
  return make_geometry(sizes[0], numel, group_size);
}

// The same of an output that has these ranges.
inline Geometry output_geometry(const Tensor& ranges,
                                const std::vector<int64_t>& sizes,
                                int64_t group_size) {
  const Geometry geometry = geometry_of_size(sizes, group_size);
  STD_TORCH_CHECK(ranges.scalar_type() == ScalarType::BFloat16,
                  "ranges must be bfloat16, got scalar type ",
                  static_cast<int>(ranges.scalar_type()));
  STD_TORCH_CHECK(ranges.is_contiguous(), "ranges must be contiguous");
  STD_TORCH_CHECK(
      ranges.dim() == 3 && ranges.size(0) == geometry.rows &&
          ranges.size(1) == geometry.groups_per_row() && ranges.size(2) == 2,
      "ranges must be of shape [", geometry.rows, ", ",
      geometry.groups_per_row(), ", 2] for this size and group_size");
  return geometry;
}

inline void check_code_bytes(const Tensor& codes) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte,
                  "codes must be uint8, got scalar type ",
                  static_cast<int>(codes.scalar_type()));
  STD_TORCH_CHECK(codes.is_contiguous(), "codes must be contiguous");
}

// The layout of codes of one width.
inline CodeLayout checked_layout(const Tensor& codes, const Geometry& geometry,
                                 int64_t bits) {
  check_bits(bits);
  check_code_bytes(codes);
  const int64_t row_bytes = geometry.blocks_per_row() * bits;
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) == geometry.rows &&
                      codes.size(1) == row_bytes,
                  "codes must be of shape [", geometry.rows, ", ", row_bytes,
                  "] for this size and bits");
  return uniform_layout(geometry, bits);
}

}  // namespace mmactnn
