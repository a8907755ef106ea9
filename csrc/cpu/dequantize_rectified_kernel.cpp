#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/allocate.h"
#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/norm_act_checks.h"
#include "../common/rectified_codec.h"
#include "../common/tensor_checks.h"
#include "codes.h"
#include "group.h"
#include "number.h"

namespace mmactnn {
namespace {

// Calls `decoder(group, place, code)` for every element, by its place in its
// row, and writes what it returns.
template <typename T, typename Decoder>
void decode_elements(const Tensor& codes, const Geometry& geometry, int bits,
                     T* output, const Decoder& decoder) {
  for_each_group(
      static_cast<const uint8_t*>(codes.const_data_ptr()), geometry, bits,
      [&](int64_t index, const Group& group, const uint8_t* unpacked) {
        T* target = output + group.row * geometry.row_numel + group.start;
        for (int64_t i = 0; i < group.count; ++i) {
          target[i] =
              static_cast<T>(decoder(index, group.start + i, unpacked[i]));
        }
      });
}

Tensor dequantize_split(Tensor codes, Tensor ranges,
                        std::optional<Tensor> weight,
                        std::optional<Tensor> bias, std::vector<int64_t> size,
                        std::vector<int64_t> stride, ScalarType dtype,
                        int64_t bits, int64_t group_size) {
  const Geometry geometry =
      checked_rectified(codes, ranges, size, bits, group_size, true);
  Tensor output = empty_strided(codes, size, stride, dtype);
  const Channels channels = channels_of("the output", output);
  if (weight) check_per_channel("weight", *weight, channels, codes);
  if (bias) check_per_channel("bias", *bias, channels, codes);
  if (output.numel() == 0) return output;
  const auto* weights = static_cast<const float*>(data_or_null(weight));
  const auto* biases = static_cast<const float*>(data_or_null(bias));
  const auto* words = static_cast<const uint32_t*>(ranges.const_data_ptr());
  const int width = static_cast<int>(bits);
  const uint32_t max_code = max_split_code(width);
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    decode_elements(
        codes, geometry, width, static_cast<T*>(output.mutable_data_ptr()),
        [&](int64_t group, int64_t place, uint32_t code) {
          if (!split_positive(code, width)) return 0.0f;
          const Range range = Range::unpack(words[2 * group + 1]);
          const uint32_t value_code = split_value_code(code, width);
          const float normal = range.special()
                                   ? decode_special(value_code, range, max_code)
                                   : decode(value_code, range);
          const int64_t channel =
              channels.last ? place % channels.count : place / channels.plane;
          const ChannelNorm norm{
              0.0f, 1.0f, weights == nullptr ? kNoWeight : weights[channel],
              biases == nullptr ? kNoBias : biases[channel]};
          const float value = norm.scale(normal);
          return is_finite(value) ? clamp_finite(value, Largest<T>::value)
                                  : value;
        });
  });
  return output;
}

Tensor dequantize_zeroed(Tensor codes, Tensor ranges, std::vector<int64_t> size,
                         std::vector<int64_t> stride, ScalarType dtype,
                         int64_t bits, int64_t group_size) {
  const Geometry geometry =
      checked_rectified(codes, ranges, size, bits, group_size, false);
  Tensor output = empty_strided(codes, size, stride, dtype);
  check_dtype("dtype", output);
  check_dense("the output", output);
  if (output.numel() == 0) return output;
  const auto* words = static_cast<const uint32_t*>(ranges.const_data_ptr());
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    decode_elements(codes, geometry, static_cast<int>(bits),
                    static_cast<T*>(output.mutable_data_ptr()),
                    [&](int64_t group, int64_t, uint32_t code) {
                      if (code == 0u) return 0.0f;
                      const Range range = Range::unpack(words[group]);
                      return range.special()
                                 ? decode_zeroed_special(code - 1u, range)
                                 : clamp_finite(decode(code - 1u, range),
                                                Largest<T>::value);
                    });
  });
  return output;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("dequantize_split", TORCH_BOX(&mmactnn::dequantize_split));
  m.impl("dequantize_zeroed", TORCH_BOX(&mmactnn::dequantize_zeroed));
}
