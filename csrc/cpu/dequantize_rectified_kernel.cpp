
#include <algorithm>
#include <cstdint>
#include <optional>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/rectified_codec.h"
#include "codes.h"
#include "group.h"
#include "number.h"

namespace mmactnn {
namespace {

// Calls `decoder(group, place, code)` for every element, by its place in its
// row, and writes the result.
template <typename T, typename Decoder>
void decode_elements(const Memory& codes, const Geometry& geometry, int bits,
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

}  // namespace

namespace cpu {

void dequantize_split(const Memory& codes, const Memory& ranges,
                      const Memory& weight, const Memory& bias,
                      const Memory& output, const Geometry& geometry,
                      const Channels& channels, int bits) {
  const auto* weights = static_cast<const float*>(weight.const_data_ptr());
  const auto* biases = static_cast<const float*>(bias.const_data_ptr());
  const auto* words = static_cast<const uint32_t*>(ranges.const_data_ptr());
  const uint32_t max_code = max_split_code(bits);
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    decode_elements(
        codes, geometry, bits, static_cast<T*>(output.mutable_data_ptr()),
        [&](int64_t group, int64_t place, uint32_t code) {
          if (!split_positive(code, bits)) return 0.0f;
          const Range range = Range::unpack(words[2 * group + 1]);
          const uint32_t value_code = split_value_code(code, bits);
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
}

void dequantize_zeroed(const Memory& codes, const Memory& ranges,
                       const Memory& output, const Geometry& geometry,
                       int bits) {
  const auto* words = static_cast<const uint32_t*>(ranges.const_data_ptr());
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    decode_elements(
        codes, geometry, bits, static_cast<T*>(output.mutable_data_ptr()),
        [&](int64_t group, int64_t, uint32_t code) {
          if (code == 0u) return 0.0f;
          const Range range = Range::unpack(words[group]);
          return range.special() ? decode_zeroed_special(code - 1u, range)
                                 : clamp_finite(decode(code - 1u, range),
                                                Largest<T>::value);
        });
  });
}

}  // namespace cpu
}  // namespace mmactnn
