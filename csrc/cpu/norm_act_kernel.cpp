
#include <algorithm>
#include <cstdint>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/norm_act_arguments.h"
#include "../common/philox.h"
#include "../common/rectified_codec.h"
#include "codes.h"
#include "group.h"
#include "kinds.h"
#include "number.h"
#include "parallel.h"
#include "rotation.h"

namespace mmactnn {
namespace {

// The parameters of all channels; weight and bias may be null.
struct Parameters {
  const float* mean;
  const float* invstd;
  const float* weight;
  const float* bias;

  ChannelNorm of(int64_t channel) const {
    return {mean[channel], invstd[channel],
            weight == nullptr ? kNoWeight : weight[channel],
            bias == nullptr ? kNoBias : bias[channel]};
  }
};

// Values of a group before encoding.
struct GroupValues {
  int64_t count;
  float normal[kMaxGroup];
  float output[kMaxGroup];  // as it is stored
  bool positive[kMaxGroup];
};

template <typename T>
void normalise_group(const T* input, const T* residual, T* output,
                     const Channels& channels, const Parameters& parameters,
                     bool relu, const Group& group, GroupValues& values) {
  const int64_t base = group.row * channels.row_numel() + group.start;
  values.count = group.count;
  for (int64_t i = 0; i < group.count; ++i) {
    const int64_t place = group.start + i;
    const ChannelNorm norm = parameters.of(
        channels.last ? place % channels.count : place / channels.plane);
    const float normal = norm.normalise(static_cast<float>(input[base + i]));
    float total = norm.scale(normal);
    if (residual != nullptr) {
      total = add(total, static_cast<float>(residual[base + i]));
    }
    T rounded = static_cast<T>(total);
    const bool positive = is_positive(static_cast<float>(rounded));
    if (relu && !positive) rounded = static_cast<T>(0.0f);
    output[base + i] = rounded;
    values.normal[i] = normal;
    values.output[i] = static_cast<float>(rounded);
    values.positive[i] = positive;
  }
}

void encode_split_rotated(const GroupValues& values, PairStream stream,
                          uint64_t group, int bits, uint8_t* codes,
                          uint16_t* range) {
  encode_rotated(values.normal, values.positive, Blocked::kValue, stream, group,
                 bits - 1, codes)
      .store(range);
  for (int i = 0; i < kRotation; ++i) {
    codes[i] =
        static_cast<uint8_t>(join_split(codes[i], values.positive[i], bits));
  }
}

Range encode_plain(const GroupValues& values, int bits, const uint16_t* random,
                   uint8_t* codes) {
  const uint32_t max_code = max_code_of(bits);
  return encode_kind(
      values.normal, values.count, max_code, random,
      [](int64_t) { return true; },
      [&](float value, Range range) {
        return encode_special(value, range, max_code);
      },
      codes);
}

void encode_split(const GroupValues& values, int bits, const uint16_t* random,
                  uint8_t* codes, uint32_t* ranges) {
  const uint32_t max_code = max_split_code(bits);
  for (const bool positive : {false, true}) {
    ranges[positive] =
        encode_kind(
            values.normal, values.count, max_code, random,
            [&](int64_t i) { return values.positive[i] == positive; },
            [&](float value, Range range) {
              return encode_special(value, range, max_code);
            },
            codes)
            .pack();
  }
  for (int64_t i = 0; i < values.count; ++i) {
    codes[i] =
        static_cast<uint8_t>(join_split(codes[i], values.positive[i], bits));
  }
}

}  // namespace

namespace cpu {

void norm_act(const NormActArguments& arguments, const Channels& channels,
              const Geometry& geometry, const NormActOutputs& outputs) {
  const Memory& input = arguments.input;
  const NormActPayload payload = arguments.payload();
  const Parameters parameters{
      static_cast<const float*>(arguments.mean.const_data_ptr()),
      static_cast<const float*>(arguments.invstd.const_data_ptr()),
      static_cast<const float*>(arguments.weight.const_data_ptr()),
      static_cast<const float*>(arguments.bias.const_data_ptr())};
  const PairStream stream = arguments.rounding.random.current_pair();
  const PairStream zeroed_stream =
      arguments.rounding.random.second().current_pair();
  const bool rotated = arguments.rotated(geometry);
  const bool act_rotated = arguments.act_rotated(geometry);
  const int bits = static_cast<int>(arguments.bits);
  const int act_bits = static_cast<int>(arguments.act_bits);
  auto* codes = static_cast<uint8_t*>(outputs.codes.mutable_data_ptr());
  auto* ranges = static_cast<uint32_t*>(outputs.ranges.mutable_data_ptr());
  auto* act_codes = static_cast<uint8_t*>(outputs.act_codes.mutable_data_ptr());
  auto* act_ranges =
      static_cast<uint32_t*>(outputs.act_ranges.mutable_data_ptr());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    const T* residual =
        static_cast<const T*>(arguments.residual.const_data_ptr());
    T* target = static_cast<T*>(outputs.output.mutable_data_ptr());
    parallel_for(
        geometry.groups(), kGrainElements / geometry.group_size,
        [&](int64_t begin, int64_t end) {
          GroupValues values;
          uint16_t random[kMaxGroup];
          uint8_t unpacked[kMaxGroup];
          for (int64_t index = begin; index < end; ++index) {
            const Group group = locate(geometry, index);
            const auto block =
                static_cast<uint64_t>(first_block(geometry, group));
            const int64_t blocks = (group.count + kBlock - 1) / kBlock;
            normalise_group(source, residual, target, channels, parameters,
                            arguments.relu, group, values);
            const auto place = static_cast<uint64_t>(index);
            if (!rotated) random_bits(stream, block, blocks, random);
            if (payload == NormActPayload::kSplit) {
              if (rotated) {
                encode_split_rotated(
                    values, stream, place, bits, unpacked,
                    reinterpret_cast<uint16_t*>(ranges) + 3 * index);
              } else {
                encode_split(values, bits, random, unpacked,
                             ranges + 2 * index);
              }
            } else {
              const Range range =
                  rotated
                      ? encode_rotated(values.normal, nullptr, Blocked::kValue,
                                       stream, place, bits, unpacked)
                            .one_kind()
                      : encode_plain(values, bits, random, unpacked);
              ranges[index] = range.pack();
            }
            store_group(unpacked, geometry, group, bits, codes);
            if (payload != NormActPayload::kPlainAndZeroed) continue;
            if (act_rotated) {
              act_ranges[index] = encode_zeroed_rotated(
                                      values.output, values.positive,
                                      zeroed_stream, place, act_bits, unpacked)
                                      .pack();
            } else {
              random_bits(zeroed_stream, block, blocks, random);
              act_ranges[index] =
                  encode_zeroed(values.output, values.positive, values.count,
                                act_bits, random, unpacked)
                      .pack();
            }
            store_group(unpacked, geometry, group, act_bits, act_codes);
          }
        });
  });
}

}  // namespace cpu
}  // namespace mmactnn
