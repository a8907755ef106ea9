// Where the channels of a tensor are, and what the ops of a fused
// normalisation check of their arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "geometry.h"
#include "rectified_codec.h"
#include "tensor_checks.h"

namespace mmactnn {

// A tensor [N, C, *] in memory: rows (samples) of `count` channels of `plane`
// elements each, either channel after channel or, where `last` is set,
// element by element with the channels innermost.
struct Channels {
  int64_t rows;
  int64_t count;
  int64_t plane;
  bool last;

  int64_t row_numel() const { return count * plane; }
  int64_t numel() const { return rows * row_numel(); }
  // Elements of each channel.
  int64_t channel_numel() const { return rows * plane; }
};

// Whether the dimensions lie in memory in this order, the innermost first.
inline bool has_order(const Tensor& tensor, const std::vector<int64_t>& order) {
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

inline Channels channels_of(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor);
  const int64_t dim = tensor.dim();
  STD_TORCH_CHECK(dim >= 2 && dim <= 5, name,
                  " must have 2 to 5 dimensions, got ", dim);
  std::vector<int64_t> contiguous, last{1};
  int64_t plane = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    contiguous.push_back(d);
    if (d != 1) last.push_back(d);
    if (d >= 2) plane *= tensor.size(d);
  }
  const Channels channels{tensor.size(0), tensor.size(1), plane, false};
  if (tensor.numel() == 0) return channels;
  if (has_order(tensor, contiguous)) {
    // Planes of one element are both, and channels innermost are faster then.
    return {channels.rows, channels.count, plane, plane == 1};
  }
  std::string strides;
  for (int64_t d = 0; d < dim; ++d) {
    strides += (d == 0 ? "" : ", ") + std::to_string(tensor.stride(d));
  }
  STD_TORCH_CHECK(has_order(tensor, last), name,
                  " must be contiguous or channels_last and dense, got "
                  "strides [",
                  strides, "]");
  return {channels.rows, channels.count, plane, true};
}

// A parameter or statistic: `numel` numbers for each channel.
inline void check_per_channel(const char* name, const Tensor& tensor,
                              const Channels& channels, const Tensor& like,
                              bool pair = false) {
  const bool shape =
      pair ? tensor.dim() == 2 && tensor.size(0) == 2 &&
                 tensor.size(1) == channels.count
           : tensor.dim() == 1 && tensor.size(0) == channels.count;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && shape &&
                      tensor.is_contiguous(),
                  name, " must be a contiguous float32 tensor of shape [",
                  pair ? "2, " : "", channels.count, "]");
  check_same_device(name, tensor, like);
}

// The codes of one width of a tensor with these channels.
inline Geometry code_geometry(const char* name, const Tensor& codes,
                              const Channels& channels, int64_t group_size,
                              int64_t bits, bool rectified,
                              const Tensor& like) {
  const int64_t min_bits = rectified ? kMinRectifiedBits : 1;
  STD_TORCH_CHECK(bits >= min_bits && bits <= kMaxBits, "the bits of ", name,
                  " must be an integer from ", min_bits, " to 8, got ", bits);
  check_group_size(group_size);
  const Geometry geometry{
      channels.rows, channels.rows == 0 ? 0 : channels.row_numel(), group_size};
  const int64_t row_bytes = geometry.blocks_per_row() * bits;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte &&
                      codes.is_contiguous() && codes.dim() == 2 &&
                      codes.size(0) == geometry.rows &&
                      codes.size(1) == row_bytes,
                  name, " must be a contiguous uint8 tensor of shape [",
                  geometry.rows, ", ", row_bytes, "] for this size and bits");
  check_same_device(name, codes, like);
  return geometry;
}

// The ranges of plain codes, or of split ones: two for each group.
inline void check_code_ranges(const Tensor& ranges, const Geometry& geometry,
                              bool split, const Tensor& like) {
  const int64_t width = split ? 4 : 2;
  STD_TORCH_CHECK(ranges.scalar_type() == ScalarType::BFloat16 &&
                      ranges.is_contiguous() && ranges.dim() == 3 &&
                      ranges.size(0) == geometry.rows &&
                      ranges.size(1) == geometry.groups_per_row() &&
                      ranges.size(2) == width,
                  "ranges must be a contiguous bfloat16 tensor of shape [",
                  geometry.rows, ", ", geometry.groups_per_row(), ", ", width,
                  "] for this size and group_size");
  check_same_device("ranges", ranges, like);
}

}  // namespace mmactnn
