// The arguments of what decodes rectified values, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "norm_act.h"

namespace mmactnn {

struct RectifiedCodes {
  Channels channels;
  Geometry geometry;
  int bits;
  const uint8_t* codes;
  const void* ranges;   // a pair or, of split codes, two of a group
  const float* weight;  // of split codes; may be null
  const float* bias;    // likewise
};

// `output` is of the size and strides of the result, not yet written.
inline RectifiedCodes check_rectified(const Tensor& output, const Tensor& codes,
                                      const Tensor& ranges,
                                      const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias,
                                      int64_t bits, int64_t group_size,
                                      bool split) {
  const Channels channels = channels_of("the output", output);
  STD_TORCH_CHECK(channels.row_numel() <= INT32_MAX,
                  "a sample may have at most ", INT32_MAX, " elements, got ",
                  channels.row_numel());
  const Geometry geometry =
      code_geometry("codes", codes, channels, group_size, bits, true, codes);
  check_code_ranges(ranges, geometry, split, codes);
  return {channels,
          geometry,
          static_cast<int>(bits),
          static_cast<const uint8_t*>(codes.const_data_ptr()),
          ranges.const_data_ptr(),
          checked_parameter("weight", weight, channels, codes),
          checked_parameter("bias", bias, channels, codes)};
}

// The value of a split code; 0 where the rectifier was closed.
MMACTNN_HOST_DEVICE float decode_split(uint32_t code, int bits, Range positive,
                                       float weight, float bias,
                                       float largest) {
  if (!split_positive(code, bits)) return 0.0f;
  const uint32_t value = split_value_code(code, bits);
  if (positive.special()) {
    const float normal = decode_special(value, positive, max_split_code(bits));
    const float scaled = add(multiply(normal, weight), bias);
    return is_finite(scaled) ? clamp_finite(scaled, largest) : scaled;
  }
  const float scaled = add(multiply(decode(value, positive), weight), bias);
  return clamp_finite(scaled, largest);
}

// The value of a zeroed code.
MMACTNN_HOST_DEVICE float decode_zeroed(uint32_t code, Range range,
                                        float largest) {
  if (code == 0u) return 0.0f;
  return range.special() ? decode_zeroed_special(code - 1u, range)
                         : clamp_finite(decode(code - 1u, range), largest);
}

}  // namespace mmactnn
