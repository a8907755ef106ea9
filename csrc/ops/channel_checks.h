// Argument checks of the ops of a fused normalisation.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "../common/channels.h"
#include "../common/geometry.h"
#include "../common/rectified_codec.h"
#include "tensor_checks.h"

namespace mmactnn {

inline Channels channels_of(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor);
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const auto dim = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dim >= 2 && dim <= 5, name,
                  " must have 2 to 5 dimensions, got ", dim);
  int64_t plane = 1;
  for (int64_t d = 2; d < dim; ++d) plane *= sizes[d];
  Channels channels{sizes[0], sizes[1], plane, false};
  if (channels.numel() == 0) return channels;
  // Whether the inner dimensions and the samples lie in memory in their order,
  // the channels outside of a sample's planes or inside.
  const auto has_order = [&](bool last) {
    int64_t expected = last ? channels.count : 1;
    const auto follows = [&](int64_t d, int64_t stride) {
      return sizes[d] == 1 || strides[d] == stride;
    };
    for (int64_t d = dim - 1; d >= 2; --d) {
      if (!follows(d, expected)) return false;
      expected *= sizes[d];
    }
    return follows(1, last ? 1 : plane) && follows(0, channels.row_numel());
  };
  if (has_order(false)) {
    // Planes of one element are both, and channels innermost are faster then.
    channels.last = plane == 1;
  } else if (has_order(true)) {
    channels.last = true;
  } else {
    std::string text;
    for (int64_t d = 0; d < dim; ++d) {
      text += (d == 0 ? "" : ", ") + std::to_string(strides[d]);
    }
    STD_TORCH_CHECK(false, name,
                    " must be contiguous or channels_last and dense, got "
                    "strides [",
                    text, "]");
  }
  return channels;
}

// The groups of a tensor with these channels.
inline Geometry geometry_of(const Channels& channels, int64_t group_size) {
  check_group_size(group_size);
  return {channels.rows, channels.rows == 0 ? 0 : channels.row_numel(),
          group_size};
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
  const Geometry geometry = geometry_of(channels, group_size);
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

// Numbers a range: two for each kind of elements, or, rotated, the mean of each
// and a scale.
inline int64_t range_width(bool split, bool rotated) {
  if (!split) return 2;
  return rotated ? 3 : 4;
}

inline void check_code_ranges(const Tensor& ranges, const Geometry& geometry,
                              int64_t width, const Tensor& like) {
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
