#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/geometry.h"
#include "../common/norm_act_arguments.h"
#include "allocate.h"
#include "channel_checks.h"
#include "channel_stats.h"
#include "rectified_checks.h"
#include "registration.h"
#include "residual_check.h"

namespace mmactnn {

// For a tensor with elements.
MMACTNN_KERNEL(norm_act, const NormActArguments&, const Channels&,
               const Geometry&, const NormActOutputs&);

namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Inputs {
  const Tensor& input;
  const std::optional<Tensor>& residual;
  const std::optional<Tensor>& weight;
  const std::optional<Tensor>& bias;
};

struct Format {
  bool relu;
  int64_t bits;
  int64_t act_bits;
  int64_t group_size;
  Rounding rounding;
};

struct Statistics {
  Channels channels;
  Tensor mean;
  Tensor invstd;
};

// A normalisation by the statistics of the batch, or else the running ones.
struct BatchNorm {
  const std::optional<Tensor>& mean;
  const std::optional<Tensor>& var;
  const std::optional<Tensor>& batches;
  bool use_batch_stats;
  double momentum;
  double eps;
};

// Both are dense and of one size.
bool overlap(const Tensor& a, const Tensor& b) {
  const auto first = reinterpret_cast<uintptr_t>(a.const_data_ptr());
  const auto second = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  const auto nbytes =
      static_cast<uintptr_t>(a.numel()) *
      (a.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(uint16_t));
  return first < second + nbytes && second < first + nbytes;
}

// Checks everything but the input and the statistics.
void check(const Inputs& inputs, const Format& format, NormActPayload payload,
           const Channels& channels, bool in_place) {
  const auto& [input, residual, weight, bias] = inputs;
  if (weight) check_per_channel("weight", *weight, channels, input);
  if (bias) check_per_channel("bias", *bias, channels, input);
  if (residual) {
    STD_TORCH_CHECK(format.relu, "relu must be True where there is a residual");
    check_residual(*residual, input);
    STD_TORCH_CHECK(
        !in_place || channels.numel() == 0 || !overlap(input, *residual),
        "residual must not overlap the input that is overwritten");
  }
  if (payload == NormActPayload::kSplit) {
    check_rectified_bits("bits", format.bits);
  } else {
    check_bits(format.bits);
  }
  if (payload == NormActPayload::kPlainAndZeroed) {
    check_rectified_bits("act_bits", format.act_bits);
  }
}

// The output, which is the input or a tensor of its own, codes and ranges, and
// those of the output.
Results normalise(const OnDevice& device, const Inputs& inputs,
                  const Statistics& statistics, const Format& format,
                  bool in_place) {
  const Tensor& input = inputs.input;
  const Channels& channels = statistics.channels;
  const NormActArguments arguments{
      input,           inputs.residual,   statistics.mean, statistics.invstd,
      inputs.weight,   inputs.bias,       format.relu,     format.bits,
      format.act_bits, format.group_size, format.rounding};
  const NormActPayload payload = arguments.payload();
  check(inputs, format, payload, channels, in_place);
  const Geometry geometry = geometry_of(channels, format.group_size);
  const bool zeroed = payload == NormActPayload::kPlainAndZeroed;
  const int64_t width = range_width(payload == NormActPayload::kSplit,
                                    arguments.rotated(geometry));
  const Results results{in_place ? input : empty_dense_like(input),
                        empty_codes(input, geometry, format.bits),
                        empty_ranges(input, geometry, width),
                        zeroed ? empty_codes(input, geometry, format.act_bits)
                               : empty(input, {0}, ScalarType::Byte),
                        zeroed ? empty_ranges(input, geometry)
                               : empty(input, {0}, ScalarType::BFloat16)};
  if (channels.numel() != 0) {
    const auto& [output, codes, ranges, act_codes, act_ranges] = results;
    device.run(norm_act_kernel, arguments, channels, geometry,
               NormActOutputs{output, codes, ranges, act_codes, act_ranges});
  }
  return results;
}

Results norm_act(Tensor input, std::optional<Tensor> residual, Tensor mean,
                 Tensor invstd, std::optional<Tensor> weight,
                 std::optional<Tensor> bias, bool relu, int64_t bits,
                 int64_t act_bits, int64_t group_size, int64_t seed,
                 int64_t offset, std::optional<Tensor> offset_tensor,
                 bool rotated) {
  const OnDevice device(input);
  const Channels channels = channels_of("input", input);
  check_per_channel("mean", mean, channels, input);
  check_per_channel("invstd", invstd, channels, input);
  return normalise(device, {input, residual, weight, bias},
                   {channels, mean, invstd},
                   {relu, bits, act_bits, group_size,
                    checked_rounding(seed, offset, offset_tensor, rotated,
                                     group_size, input)},
                   false);
}

Statistics find_statistics(const OnDevice& device, const Tensor& input,
                           const BatchNorm& norm) {
  const Channels channels =
      check_stats(input, {norm.mean, norm.var, norm.batches});
  STD_TORCH_CHECK(norm.use_batch_stats || norm.mean.has_value(),
                  "running_mean and running_var must be given unless the "
                  "statistics are the batch's");
  // A running mean is normalised with where it is, if its dtype allows.
  const bool copies =
      norm.use_batch_stats || norm.mean->scalar_type() != ScalarType::Float;
  const Tensor mean = copies ? empty_stats(input, channels) : *norm.mean;
  const Tensor invstd = empty_stats(input, channels);
  const RunningStats running{norm.mean, norm.var, norm.batches, norm.momentum};
  const StatsOutputs outputs{copies ? Memory(mean) : Memory(), Memory(),
                             invstd};
  if (norm.use_batch_stats) {
    device.run(batch_stats_kernel, input, channels, norm.eps, running, outputs);
  } else {
    device.run(running_stats_kernel, running, norm.eps, outputs);
  }
  return {channels, mean, invstd};
}

// One over the standard deviations and codes and ranges; before them the
// output, unless the input is overwritten with it.
template <bool kInPlace>
auto batch_norm_act(Tensor input, std::optional<Tensor> residual,
                    std::optional<Tensor> weight, std::optional<Tensor> bias,
                    std::optional<Tensor> running_mean,
                    std::optional<Tensor> running_var,
                    std::optional<Tensor> num_batches_tracked,
                    bool use_batch_stats, double momentum, double eps,
                    bool relu, int64_t bits, int64_t act_bits,
                    int64_t group_size, int64_t seed, int64_t offset,
                    std::optional<Tensor> offset_tensor, bool rotated) {
  const OnDevice device(input);
  const Statistics statistics =
      find_statistics(device, input,
                      {running_mean, running_var, num_batches_tracked,
                       use_batch_stats, momentum, eps});
  const auto [output, codes, ranges, act_codes, act_ranges] =
      normalise(device, {input, residual, weight, bias}, statistics,
                {relu, bits, act_bits, group_size,
                 checked_rounding(seed, offset, offset_tensor, rotated,
                                  group_size, input)},
                kInPlace);
  const std::tuple kept(statistics.invstd, codes, ranges, act_codes,
                        act_ranges);
  if constexpr (kInPlace) {
    return kept;
  } else {
    return std::tuple_cat(std::tuple(output), kept);
  }
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "norm_act(Tensor input, Tensor? residual, Tensor mean, Tensor invstd, "
      "Tensor? weight, Tensor? bias, bool relu, int bits, int act_bits, "
      "int group_size, int seed, int offset, Tensor? offset_tensor=None, "
      "bool rotated=False) -> (Tensor output, Tensor codes, Tensor ranges, "
      "Tensor act_codes, Tensor "
      "act_ranges)");
  m.def(
      "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool use_batch_stats, float momentum, "
      "float eps, bool relu, int bits, int act_bits, int group_size, int seed, "
      "int offset, Tensor? offset_tensor=None, bool rotated=False) -> "
      "(Tensor output, Tensor invstd, Tensor codes, Tensor ranges, Tensor "
      "act_codes, Tensor act_ranges)");
  m.def(
      "batch_norm_act_(Tensor(a!) input, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor(b!)? running_mean, Tensor(c!)? running_var, "
      "Tensor(d!)? num_batches_tracked, bool use_batch_stats, float momentum, "
      "float eps, bool relu, int bits, int act_bits, int group_size, int seed, "
      "int offset, Tensor? offset_tensor=None, bool rotated=False) -> "
      "(Tensor invstd, Tensor codes, Tensor ranges, Tensor act_codes, Tensor "
      "act_ranges)");
}

MMACTNN_IMPL(m) {
  m.impl("norm_act", TORCH_BOX(&mmactnn::norm_act));
  m.impl("batch_norm_act", TORCH_BOX(&mmactnn::batch_norm_act<false>));
  m.impl("batch_norm_act_", TORCH_BOX(&mmactnn::batch_norm_act<true>));
}
