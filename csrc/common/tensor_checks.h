// Argument checks that the CPU and the CUDA side of every op share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "geometry.h"
#include "philox.h"

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

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

inline void* mutable_data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

inline void check_same_device(const char* name, const Tensor& tensor,
                              const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name,
                  " must be on the device of the other tensors");
}

// The random stream of an op on `input`.
inline CountedStream checked_stream(int64_t seed, int64_t offset,
                                    const std::optional<Tensor>& count,
                                    const Tensor& input) {
  const PhiloxStream first{static_cast<uint64_t>(seed),
                           static_cast<uint64_t>(offset)};
  if (!count) return {first, nullptr};
  STD_TORCH_CHECK(
      count->scalar_type() == ScalarType::Long && count->numel() == 1,
      "count must be an int64 tensor of one element");
  check_same_device("count", *count, input);
  return {first, static_cast<const int64_t*>(count->const_data_ptr())};
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

// `total_bits` is the sum of one width for each row; every such sum fits into
// 32 bits.
inline void check_total_bits(int64_t total_bits, int64_t rows) {
  STD_TORCH_CHECK(total_bits >= rows && total_bits <= rows * kMaxBits,
                  "total_bits must be from ", rows, " to ", rows * kMaxBits,
                  " for ", rows, " rows, got ", total_bits);
  STD_TORCH_CHECK(rows <= INT32_MAX / kMaxBits, "there may be at most ",
                  INT32_MAX / kMaxBits, " rows, got ", rows);
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

// The geometry of an output of `sizes` with these ranges.
inline Geometry output_geometry(const Tensor& ranges,
                                const std::vector<int64_t>& sizes,
                                int64_t group_size) {
  STD_TORCH_CHECK(!sizes.empty(),
                  "size must have at least one dimension, got 0");
  const int64_t numel = std::accumulate(sizes.begin(), sizes.end(), int64_t{1},
                                        std::multiplies<>());
  const Geometry geometry = make_geometry(sizes[0], numel, group_size);
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

inline void check_row_integers(const char* name, const Tensor& tensor,
                               ScalarType dtype, const char* dtype_name,
                               const Tensor& like, int64_t rows) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.dim() == 1 &&
                      tensor.is_contiguous() && tensor.size(0) == rows,
                  name, " must be a contiguous ", dtype_name, " tensor of ",
                  rows, " numbers, one a sample");
  check_same_device(name, tensor, like);
}

// The layout of codes of a width for each row, on the device of `like`.
inline CodeLayout checked_row_layout(const Tensor& like,
                                     const Geometry& geometry,
                                     const Tensor& row_bits,
                                     const Tensor& row_starts,
                                     int64_t total_bits) {
  check_row_integers("row_bits", row_bits, ScalarType::Byte, "uint8", like,
                     geometry.rows);
  check_row_integers("row_starts", row_starts, ScalarType::Int, "int32", like,
                     geometry.rows);
  return {geometry.padded_blocks_per_row(),
          0,
          kAnyBits,
          static_cast<const uint8_t*>(row_bits.const_data_ptr()),
          static_cast<const int32_t*>(row_starts.const_data_ptr()),
          total_bits};
}

// The same for codes that are to be decoded, of these or more rows.
inline CodeLayout checked_row_layout_of(const Tensor& codes,
                                        const Geometry& geometry,
                                        const Tensor& row_bits,
                                        const Tensor& row_starts) {
  check_code_bytes(codes);
  const int64_t row_blocks = geometry.padded_blocks_per_row();
  STD_TORCH_CHECK(codes.dim() == 1, "codes must have one dimension, got ",
                  codes.dim());
  STD_TORCH_CHECK(
      row_blocks == 0 ? codes.size(0) == 0 : codes.size(0) % row_blocks == 0,
      "codes must be of a multiple of ", row_blocks, " bytes for this size, ",
      "got ", codes.size(0));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % 8 == 0,
                  "codes must start on an 8-byte boundary");
  return checked_row_layout(codes, geometry, row_bits, row_starts,
                            row_blocks == 0 ? 0 : codes.size(0) / row_blocks);
}

inline void check_sensitivity(const Tensor& sensitivity, int64_t total_bits) {
  STD_TORCH_CHECK(sensitivity.scalar_type() == ScalarType::Float &&
                      sensitivity.dim() == 1 && sensitivity.is_contiguous(),
                  "sensitivity must be a contiguous float32 tensor of one "
                  "dimension");
  check_total_bits(total_bits, sensitivity.size(0));
}

inline void check_mask(const Tensor& mask, int64_t numel) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.dim() == 1 &&
                      mask.is_contiguous() &&
                      mask.size(0) == (numel + kBlock - 1) / kBlock,
                  "mask must be a contiguous uint8 tensor of ",
                  (numel + kBlock - 1) / kBlock, " bytes");
}

}  // namespace mmactnn
