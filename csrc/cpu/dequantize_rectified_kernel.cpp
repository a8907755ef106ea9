
#include <algorithm>
#include <cstdint>
#include <optional>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dither.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/rectified_codec.h"
#include "codes.h"
#include "group.h"
#include "number.h"
#include "rotation.h"

namespace mmactnn {
namespace {

// Values of a group of elements of one kind, by their places there.
class Decoder {
 public:
  Decoder(Range range, uint32_t max_code, const uint16_t* random,
          const int32_t* multiples)
      : range_(range),
        fraction_(fraction_bits(max_code)),
        random_(random),
        multiples_(multiples) {}

  Range range() const { return range_; }
  // Whether codes are of type Special.
  bool special() const { return multiples_ == nullptr && range_.special(); }
  float operator()(uint32_t code, int64_t i) const {
    if (multiples_ != nullptr) {
      return rotated_value(multiples_[i], range_.step, range_.low);
    }
    return random_ == nullptr
               ? decode(code, range_)
               : decode_dithered(code, random_[i], range_, fraction_);
  }

 private:
  Range range_;
  int fraction_;
  const uint16_t* random_;    // null: no dither
  const int32_t* multiples_;  // null: not rotated
};

// The range of the elements of a group that pass, of `kKinds` kinds.
template <int kKinds>
Range passing_range(const Memory& ranges, int64_t index, bool rotated) {
  if constexpr (kKinds == 2) {
    if (rotated) {
      const auto* numbers =
          static_cast<const uint16_t*>(ranges.const_data_ptr());
      return RotatedRange::load(numbers + 3 * index).one_kind();
    }
  }
  const auto* words = static_cast<const uint32_t*>(ranges.const_data_ptr());
  return Range::unpack(words[kKinds * index + kKinds - 1]);
}

// Calls `body(decoder, place, i, code)` for every element, by its place in its
// row and in its group, and writes the result.
template <int kKinds, typename T, typename Body>
void decode_elements(const Memory& codes, const Memory& ranges,
                     const Geometry& geometry, int bits, uint32_t max_code,
                     const DrawnBits& drawn, T* output, const Body& body) {
  const GroupDither draw(drawn, geometry);
  const bool rotates_kind = kKinds == 2 ? rotates(geometry, bits - 1)
                                        : rotates_zeroed(geometry, bits);
  const RotatedDecoder rotated(drawn, geometry, bits - 1,
                               drawn.rotated && rotates_kind);
  for_each_group(
      static_cast<const uint8_t*>(codes.const_data_ptr()), geometry, bits,
      [&](int64_t index, const Group& group, const uint8_t* unpacked) {
        uint16_t random[kMaxGroup];
        int32_t multiples[kRotation];
        if (rotated) rotated(index, unpacked, multiples);
        const bool dithered = !rotated && draw(group, random);
        const Decoder decoder(
            passing_range<kKinds>(ranges, index, static_cast<bool>(rotated)),
            max_code, dithered ? random : nullptr,
            rotated ? multiples : nullptr);
        T* target = output + group.row * geometry.row_numel + group.start;
        for (int64_t i = 0; i < group.count; ++i) {
          target[i] = static_cast<T>(
              body(decoder, group.start + i, i, uint32_t{unpacked[i]}));
        }
      });
}

}  // namespace

namespace cpu {

void dequantize_split(const Memory& codes, const Memory& ranges,
                      const Memory& weight, const Memory& bias,
                      const Memory& output, const Geometry& geometry,
                      const Channels& channels, int bits,
                      const DrawnBits& drawn) {
  const auto* weights = static_cast<const float*>(weight.const_data_ptr());
  const auto* biases = static_cast<const float*>(bias.const_data_ptr());
  const uint32_t max_code = max_split_code(bits);
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    decode_elements<2>(
        codes, ranges, geometry, bits, max_code, drawn,
        static_cast<T*>(output.mutable_data_ptr()),
        [&](const Decoder& decode, int64_t place, int64_t i, uint32_t code) {
          if (!split_positive(code, bits)) return 0.0f;
          const Range range = decode.range();
          const uint32_t value_code = split_value_code(code, bits);
          const float normal = decode.special()
                                   ? decode_special(value_code, range, max_code)
                                   : decode(value_code, i);
          const int64_t channel =
              channels.last ? place % channels.count : place / channels.plane;
          const ChannelNorm norm{
              0.0f, 1.0f, weights == nullptr ? kNoWeight : weights[channel],
              biases == nullptr ? kNoBias : biases[channel]};
          const float value = norm.scale(normal);
          return clamp_if_finite(value, Largest<T>::value);
        });
  });
}

void dequantize_zeroed(const Memory& codes, const Memory& ranges,
                       const Memory& output, const Geometry& geometry, int bits,
                       const DrawnBits& drawn) {
  const uint32_t passing =
      passing_bits(bits, drawn.rotated && rotates_zeroed(geometry, bits));
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    decode_elements<1>(
        codes, ranges, geometry, bits, max_zeroed_code(bits), drawn,
        static_cast<T*>(output.mutable_data_ptr()),
        [&](const Decoder& decode, int64_t, int64_t i, uint32_t code) {
          if ((code & passing) == 0u) return 0.0f;
          if (decode.special()) {
            return decode_zeroed_special(code - 1u, decode.range());
          }
          return clamp_finite(decode(code - 1u, i), Largest<T>::value);
        });
  });
}

}  // namespace cpu
}  // namespace mmactnn
