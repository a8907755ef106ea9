#include <algorithm>
#include <cstdint>

#include "../common/channels.h"
#include "../common/dither.h"
#include "../common/geometry.h"
#include "../common/random_bits.h"
#include "../common/smooth.h"
#include "codes.h"
#include "group.h"
#include "number.h"
#include "parallel.h"

namespace mmactnn {
namespace {

// Elements that share a flag.
constexpr int64_t kFlagged = int64_t{kFlagBlocks} * kBlock;

// Calls `body(index, start, count)` for every piece of elements with one flag.
template <typename Body>
void for_each_flag(int64_t numel, const Body& body) {
  parallel_for((numel + kFlagged - 1) / kFlagged, kGrainElements / kFlagged,
               [&](int64_t begin, int64_t end) {
                 for (int64_t index = begin; index < end; ++index) {
                   const int64_t start = index * kFlagged;
                   body(index, start, std::min(kFlagged, numel - start));
                 }
               });
}

int64_t blocks_of(int64_t numel) { return (numel + kBlock - 1) / kBlock; }

// Decoded values of a group, and half of their variance.
struct Decoded {
  float values[kMaxGroup];
  float half_variance;
};

void decode_group(const uint8_t* codes, int64_t count, uint32_t max_code,
                  Range range, const uint16_t* random, Decoded& decoded) {
  decoded.half_variance = 0.0f;
  if (range.special()) {
    for (int64_t i = 0; i < count; ++i) {
      decoded.values[i] = decode_special(codes[i], range, max_code);
    }
    return;
  }
  decoded.half_variance = half_variance(range, random != nullptr);
  const int fraction = fraction_bits(max_code);
  for (int64_t i = 0; i < count; ++i) {
    decoded.values[i] = random != nullptr ? decode_dithered(codes[i], random[i],
                                                            range, fraction)
                                          : decode(codes[i], range);
  }
}

// A normalisation before the function: value * weight + bias.
class Affine {
 public:
  Affine(const Memory& weight, const Memory& bias, const Channels& channels)
      : weight_(static_cast<const float*>(weight.const_data_ptr())),
        bias_(static_cast<const float*>(bias.const_data_ptr())),
        channels_(channels) {}

  bool enabled() const { return weight_ != nullptr || bias_ != nullptr; }
  int64_t channel(int64_t place) const {
    return channels_.last ? place % channels_.count : place / channels_.plane;
  }
  float scale(int64_t channel) const {
    return weight_ == nullptr ? 1.0f : weight_[channel];
  }
  float shift(int64_t channel) const {
    return bias_ == nullptr ? 0.0f : bias_[channel];
  }

 private:
  const float* weight_;
  const float* bias_;
  Channels channels_;
};

// Calls `body(index, value, half_variance)` with the decoded argument of every
// element.
template <typename Body>
void for_each_argument(const Memory& codes, const Memory& ranges,
                       const Affine& affine, const Geometry& geometry, int bits,
                       const DrawnBits& drawn, const Body& body) {
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* range_words =
      static_cast<const uint32_t*>(ranges.const_data_ptr());
  const GroupDither draw(drawn, geometry);
  for_each_group(
      code_bytes, geometry, bits,
      [&](int64_t index, const Group& group, const uint8_t* own) {
        uint16_t random[kMaxGroup];
        const bool dithered = draw(group, random);
        Decoded decoded;
        decode_group(own, group.count, max_code_of(bits),
                     Range::unpack(range_words[index]),
                     dithered ? random : nullptr, decoded);
        const int64_t start = group.row * geometry.row_numel + group.start;
        for (int64_t i = 0; i < group.count; ++i) {
          float value = decoded.values[i], half = decoded.half_variance;
          if (affine.enabled()) {
            const int64_t channel = affine.channel(group.start + i);
            const float scale = affine.scale(channel);
            value = value * scale + affine.shift(channel);
            half *= scale * scale;
          }
          body(start + i, value, half);
        }
      });
}

}  // namespace

namespace cpu {

void smooth_derivative(const Memory& input, const Memory& codes,
                       const Smooth& smooth, const DerivativeCodes& format,
                       const CountedStream& random) {
  auto* packed = static_cast<uint8_t*>(codes.mutable_data_ptr());
  uint8_t* flags = packed + blocks_of(input.numel()) * format.bits;
  const PairStream stream = random.current_pair();
  const float scale =
      encode_scale({format.low, format.step}, format.max_code());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    dispatch_smooth(smooth.function, [&](auto function) {
      for_each_flag(input.numel(), [&](int64_t flag, int64_t start,
                                       int64_t count) {
        uint16_t bits[kFlagged];
        uint8_t unpacked[kFlagged];
        const int64_t block = start / kBlock, blocks = blocks_of(count);
        random_bits(stream, static_cast<uint64_t>(block), blocks, bits);
        bool all_finite = true;
        for (int64_t i = 0; i < count; ++i) {
          const float derivative = function.derivative(
              static_cast<float>(source[start + i]), smooth);
          all_finite = all_finite && is_finite(derivative);
          unpacked[i] =
              static_cast<uint8_t>(format.encode(derivative, scale, bits[i]));
        }
        std::fill(unpacked + count, unpacked + blocks * kBlock, uint8_t{0});
        pack_codes(unpacked, blocks, format.bits, packed + block * format.bits);
        flags[flag] = all_finite ? 0 : 1;
      });
    });
  });
}

void smooth_derivative_backward(const Memory& grad_output, const Memory& codes,
                                const Memory& grad_input,
                                const DerivativeCodes& format,
                                const CountedStream& random) {
  const auto* packed = static_cast<const uint8_t*>(codes.const_data_ptr());
  const uint8_t* flags = packed + blocks_of(grad_output.numel()) * format.bits;
  const PairStream stream = random.current_pair();
  const Range range{format.low, format.step};
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    for_each_flag(grad_output.numel(), [&](int64_t flag, int64_t start,
                                           int64_t count) {
      uint16_t bits[kFlagged];
      uint8_t unpacked[kFlagged];
      const int64_t block = start / kBlock, blocks = blocks_of(count);
      if (format.dithered) {
        random_bits(stream, static_cast<uint64_t>(block), blocks, bits);
      }
      unpack_codes(packed + block * format.bits, blocks, format.bits, unpacked);
      const float nan = bits_float(0x7FC00000u);
      for (int64_t i = 0; i < count; ++i) {
        const float derivative =
            flags[flag] != 0 ? nan
            : format.dithered
                ? decode_dithered(unpacked[i], bits[i], range, format.fraction)
                : decode(unpacked[i], range);
        target[start + i] = static_cast<T>(
            multiply(static_cast<float>(source[start + i]), derivative));
      }
    });
  });
}

void smooth_decode(const Memory& codes, const Memory& ranges,
                   const Memory& output, const Memory& weight,
                   const Memory& bias, const Channels& channels,
                   const Geometry& geometry, int bits, const Smooth& smooth,
                   const DrawnBits& drawn) {
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    dispatch_smooth(smooth.function, [&](auto function) {
      for_each_argument(codes, ranges, {weight, bias, channels}, geometry, bits,
                        drawn, [&](int64_t index, float argument, float half) {
                          const Jet jet = function.jet(argument, smooth);
                          target[index] = static_cast<T>(
                              corrected(jet.value, half, jet.second));
                        });
    });
  });
}

void smooth_decode_backward(const Memory& grad_output, const Memory& codes,
                            const Memory& ranges, const Memory& grad_input,
                            const Memory& weight, const Memory& bias,
                            const Channels& channels, const Geometry& geometry,
                            int bits, const Smooth& smooth,
                            const DrawnBits& drawn) {
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    dispatch_smooth(smooth.function, [&](auto function) {
      for_each_argument(codes, ranges, {weight, bias, channels}, geometry, bits,
                        drawn, [&](int64_t index, float argument, float half) {
                          const Jet jet = function.jet(argument, smooth);
                          target[index] = static_cast<T>(
                              static_cast<float>(source[index]) *
                              corrected(jet.derivative, half, jet.third));
                        });
    });
  });
}

}  // namespace cpu
}  // namespace mmactnn
