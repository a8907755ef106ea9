// Argument checks that the CPU and the CUDA side of every op share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "geometry.h"

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

// True if the elements fill one piece of memory without gaps or overlaps.
inline bool is_dense(const Tensor& tensor) {
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
  STD_TORCH_CHECK(bits == 1 || bits == 2 || bits == 4 || bits == 8,
                  "bits must be 1, 2, 4 or 8, got ", bits);
}

inline void check_group_size(int64_t group_size) {
  STD_TORCH_CHECK(group_size == 64 || group_size == 128 || group_size == 256 ||
                      group_size == 512,
                  "group_size must be 64, 128, 256 or 512, got ", group_size);
}

inline Geometry make_geometry(int64_t rows, int64_t numel, int64_t bits,
                              int64_t group_size) {
  check_bits(bits);
  check_group_size(group_size);
  return {rows, rows == 0 ? 0 : numel / rows, group_size, bits};
}

// The geometry of a tensor that is to be quantised.
inline Geometry quantize_geometry(const Tensor& input, int64_t bits,
                                  int64_t group_size) {
  check_dtype("input", input);
  check_dense("input", input);
  STD_TORCH_CHECK(input.dim() >= 1,
                  "input must have at least one dimension, got 0");
  const Geometry geometry =
      make_geometry(input.size(0), input.numel(), bits, group_size);
  STD_TORCH_CHECK(input.numel() == 0 || geometry.rows == 1 ||
                      input.stride(0) == geometry.row_numel,
                  "input's dimension 0 must be the outermost in memory, got "
                  "stride ",
                  input.stride(0), " where ", geometry.row_numel,
                  " was expected");
  return geometry;
}

// The geometry of codes and ranges for an output of `sizes`.
inline Geometry dequantize_geometry(const Tensor& codes, const Tensor& ranges,
                                    const std::vector<int64_t>& sizes,
                                    int64_t bits, int64_t group_size) {
  STD_TORCH_CHECK(!sizes.empty(),
                  "size must have at least one dimension, got 0");
  const int64_t numel = std::accumulate(sizes.begin(), sizes.end(), int64_t{1},
                                        std::multiplies<>());
  const Geometry geometry = make_geometry(sizes[0], numel, bits, group_size);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte,
                  "codes must be uint8, got scalar type ",
                  static_cast<int>(codes.scalar_type()));
  STD_TORCH_CHECK(ranges.scalar_type() == ScalarType::BFloat16,
                  "ranges must be bfloat16, got scalar type ",
                  static_cast<int>(ranges.scalar_type()));
  STD_TORCH_CHECK(codes.is_contiguous() && ranges.is_contiguous(),
                  "codes and ranges must be contiguous");
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) == geometry.rows &&
                      codes.size(1) == geometry.row_bytes(),
                  "codes must be of shape [", geometry.rows, ", ",
                  geometry.row_bytes(), "] for this size and bits");
  STD_TORCH_CHECK(
      ranges.dim() == 3 && ranges.size(0) == geometry.rows &&
          ranges.size(1) == geometry.groups_per_row() && ranges.size(2) == 2,
      "ranges must be of shape [", geometry.rows, ", ",
      geometry.groups_per_row(), ", 2] for this size and group_size");
  return geometry;
}

inline void check_mask(const Tensor& mask, int64_t numel) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.dim() == 1 &&
                      mask.is_contiguous() &&
                      mask.size(0) == (numel + kBlock - 1) / kBlock,
                  "mask must be a contiguous uint8 tensor of ",
                  (numel + kBlock - 1) / kBlock, " bytes");
}

}  // namespace mmactnn
