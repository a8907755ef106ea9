#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/allocate.h"
#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/norm_act_checks.h"
#include "../common/philox.h"
#include "../common/rectified_codec.h"
#include "../common/stats_checks.h"
#include "../common/tensor_checks.h"
#include "codes.h"
#include "group.h"
#include "kinds.h"
#include "number.h"

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

// What is known of a group before it is coded.
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

// The input, mean and invstd have been checked.
NormActCodes run(const NormActArguments& arguments, const Channels& channels,
                 Tensor& output, bool in_place) {
  check_norm_act(arguments, channels, in_place);
  const Tensor& input = arguments.input;
  const Geometry geometry = geometry_of(channels, arguments.group_size);
  NormActCodes result = empty_norm_act_codes(arguments, geometry);
  if (channels.numel() == 0) return result;
  const NormActPayload payload = arguments.payload();
  const Parameters parameters{
      static_cast<const float*>(arguments.mean.const_data_ptr()),
      static_cast<const float*>(arguments.invstd.const_data_ptr()),
      static_cast<const float*>(data_or_null(arguments.weight)),
      static_cast<const float*>(data_or_null(arguments.bias))};
  const PhiloxStream stream = arguments.random.current();
  const PhiloxStream zeroed_stream{stream.seed, stream.offset ^ kZeroedStream};
  const int bits = static_cast<int>(arguments.bits);
  const int act_bits = static_cast<int>(arguments.act_bits);
  auto* codes = static_cast<uint8_t*>(result.codes.mutable_data_ptr());
  auto* ranges = static_cast<uint32_t*>(result.ranges.mutable_data_ptr());
  auto* act_codes =
      static_cast<uint8_t*>(mutable_data_or_null(result.act_codes));
  auto* act_ranges =
      static_cast<uint32_t*>(mutable_data_or_null(result.act_ranges));
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    const T* residual = static_cast<const T*>(data_or_null(arguments.residual));
    T* target = static_cast<T*>(output.mutable_data_ptr());
    torch::stable::parallel_for(
        0, geometry.groups(), kGrainElements / geometry.group_size,
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
            random_bits(stream, block, blocks, geometry.group_size, random);
            if (payload == NormActPayload::kSplit) {
              encode_split(values, bits, random, unpacked, ranges + 2 * index);
            } else {
              ranges[index] =
                  encode_plain(values, bits, random, unpacked).pack();
            }
            store_group(unpacked, geometry, group, bits, codes);
            if (payload != NormActPayload::kPlainAndZeroed) continue;
            random_bits(zeroed_stream, block, blocks, geometry.group_size,
                        random);
            act_ranges[index] =
                encode_zeroed(values.output, values.positive, values.count,
                              act_bits, random, unpacked)
                    .pack();
            store_group(unpacked, geometry, group, act_bits, act_codes);
          }
        });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act(
    Tensor input, std::optional<Tensor> residual, Tensor mean, Tensor invstd,
    std::optional<Tensor> weight, std::optional<Tensor> bias, bool relu,
    int64_t bits, int64_t act_bits, int64_t group_size, int64_t seed,
    int64_t offset, std::optional<Tensor> count) {
  const Channels channels = channels_of("input", input);
  check_per_channel("mean", mean, channels, input);
  check_per_channel("invstd", invstd, channels, input);
  Tensor output = empty_dense_like(input);
  const NormActCodes codes =
      run({input, residual, mean, invstd, weight, bias, relu, bits, act_bits,
           group_size, checked_stream(seed, offset, count, input)},
          channels, output, false);
  return norm_act_results(output, codes);
}

struct Statistics {
  Channels channels;
  Tensor mean;
  Tensor invstd;
};

Statistics statistics(const Tensor& input, const BatchNorm& norm) {
  const Channels channels = check_stats(input, norm.running);
  check_batch_norm(norm);
  const std::optional<Tensor>& running = norm.running.mean;
  StatsOutputs stats{std::nullopt, std::nullopt, empty_stats(input, channels)};
  // A running mean is normalised with where it is, if its dtype allows.
  const bool copies =
      norm.of_batch || running->scalar_type() != ScalarType::Float;
  if (copies) stats.mean = empty_stats(input, channels);
  if (norm.of_batch) {
    cpu::batch_stats(input, channels, norm.eps, norm.running, stats);
  } else {
    cpu::running_stats(norm.running, norm.eps, stats);
  }
  return {channels, copies ? *stats.mean : *running, stats.invstd};
}

std::vector<Tensor> batch_norm_act(
    Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var,
    std::optional<Tensor> num_batches_tracked, bool of_batch, double momentum,
    double eps, bool relu, int64_t bits, int64_t act_bits, int64_t group_size,
    int64_t seed, int64_t offset, std::optional<Tensor> count) {
  const auto [channels, mean, invstd] = statistics(
      input, {{running_mean, running_var, num_batches_tracked, momentum},
              of_batch,
              eps});
  Tensor output = empty_dense_like(input);
  const NormActCodes codes =
      run({input, residual, mean, invstd, weight, bias, relu, bits, act_bits,
           group_size, checked_stream(seed, offset, count, input)},
          channels, output, false);
  return codes.after({output, invstd});
}

std::vector<Tensor> batch_norm_act_(
    Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var,
    std::optional<Tensor> num_batches_tracked, bool of_batch, double momentum,
    double eps, bool relu, int64_t bits, int64_t act_bits, int64_t group_size,
    int64_t seed, int64_t offset, std::optional<Tensor> count) {
  const auto [channels, mean, invstd] = statistics(
      input, {{running_mean, running_var, num_batches_tracked, momentum},
              of_batch,
              eps});
  const NormActCodes codes =
      run({input, residual, mean, invstd, weight, bias, relu, bits, act_bits,
           group_size, checked_stream(seed, offset, count, input)},
          channels, input, true);
  return codes.after({invstd});
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&mmactnn::norm_act));
  m.impl("batch_norm_act", TORCH_BOX(&mmactnn::batch_norm_act));
  m.impl("batch_norm_act_", TORCH_BOX(&mmactnn::batch_norm_act_));
}
