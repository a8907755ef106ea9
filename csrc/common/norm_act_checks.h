// What the CPU and the CUDA side of norm_act() and of the decoding of its
// codes check and allocate.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "allocate.h"
#include "channel_stats.h"
#include "channels.h"
#include "geometry.h"
#include "norm_act.h"
#include "philox.h"
#include "rectified_checks.h"
#include "tensor_checks.h"

namespace mmactnn {

// The arguments of norm_act().
struct NormActArguments {
  Tensor input;
  std::optional<Tensor> residual;
  Tensor mean;
  Tensor invstd;
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
  bool relu;
  int64_t bits;
  int64_t act_bits;
  int64_t group_size;
  CountedStream random;

  NormActPayload payload() const {
    if (!relu) return NormActPayload::kPlain;
    return residual ? NormActPayload::kPlainAndZeroed : NormActPayload::kSplit;
  }
};

// A normalisation by the statistics of the batch, or else the running ones.
struct BatchNorm {
  RunningStats running;
  bool of_batch;
  double eps;
};

inline void check_residual(const Tensor& residual, const Tensor& input) {
  STD_TORCH_CHECK(residual.scalar_type() == input.scalar_type(),
                  "residual must be of the dtype of input");
  bool same_shape = residual.dim() == input.dim();
  bool same_strides = same_shape;
  for (int64_t d = 0; same_shape && d < input.dim(); ++d) {
    same_shape = residual.size(d) == input.size(d);
    same_strides = same_strides && (input.size(d) == 1 ||
                                    residual.stride(d) == input.stride(d));
  }
  STD_TORCH_CHECK(same_shape, "residual must be of the shape of input");
  STD_TORCH_CHECK(same_strides || input.numel() == 0,
                  "residual must have the strides of input");
  check_same_device("residual", residual, input);
}

// Both are dense and of one size.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const auto first = reinterpret_cast<uintptr_t>(a.const_data_ptr());
  const auto second = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  const auto nbytes =
      static_cast<uintptr_t>(a.numel()) *
      (a.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(uint16_t));
  return first < second + nbytes && second < first + nbytes;
}

// Checks everything but the input, mean and invstd.
inline void check_norm_act(const NormActArguments& arguments,
                           const Channels& channels, bool in_place) {
  const Tensor& input = arguments.input;
  if (arguments.weight) {
    check_per_channel("weight", *arguments.weight, channels, input);
  }
  if (arguments.bias) {
    check_per_channel("bias", *arguments.bias, channels, input);
  }
  if (arguments.residual) {
    STD_TORCH_CHECK(arguments.relu,
                    "relu must be True where there is a residual");
    check_residual(*arguments.residual, input);
    STD_TORCH_CHECK(!in_place || channels.numel() == 0 ||
                        !overlap(input, *arguments.residual),
                    "residual must not overlap the input that is overwritten");
  }
  if (arguments.payload() == NormActPayload::kSplit) {
    check_rectified_bits("bits", arguments.bits);
  } else {
    check_bits(arguments.bits);
  }
  if (arguments.payload() == NormActPayload::kPlainAndZeroed) {
    check_rectified_bits("act_bits", arguments.act_bits);
  }
}

// The codes and ranges that norm_act() returns, those of the output if they are
// kept.
struct NormActCodes {
  Tensor codes;
  Tensor ranges;
  std::optional<Tensor> act_codes;
  std::optional<Tensor> act_ranges;

  // Those that exist, after other tensors.
  std::vector<Tensor> after(std::vector<Tensor> tensors) const {
    tensors.insert(tensors.end(), {codes, ranges});
    if (act_codes) tensors.insert(tensors.end(), {*act_codes, *act_ranges});
    return tensors;
  }
};

inline NormActCodes empty_norm_act_codes(const NormActArguments& arguments,
                                         const Geometry& geometry) {
  const Tensor& input = arguments.input;
  const NormActPayload payload = arguments.payload();
  const auto ranges = [&](int64_t width) {
    return empty(input, {geometry.rows, geometry.groups_per_row(), width},
                 ScalarType::BFloat16);
  };
  NormActCodes result{empty_codes(input, geometry, arguments.bits),
                      ranges(payload == NormActPayload::kSplit ? 4 : 2),
                      std::nullopt, std::nullopt};
  if (payload == NormActPayload::kPlainAndZeroed) {
    result.act_codes = empty_codes(input, geometry, arguments.act_bits);
    result.act_ranges = ranges(2);
  }
  return result;
}

// All that norm_act() returns: without codes of the output there are empty ones
// in their place.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_results(
    const Tensor& output, const NormActCodes& codes) {
  const auto or_empty = [&](const std::optional<Tensor>& tensor,
                            ScalarType dtype) {
    return tensor ? *tensor : empty(output, {0}, dtype);
  };
  return {output, codes.codes, codes.ranges,
          or_empty(codes.act_codes, ScalarType::Byte),
          or_empty(codes.act_ranges, ScalarType::BFloat16)};
}

inline void check_batch_norm(const BatchNorm& norm) {
  STD_TORCH_CHECK(norm.of_batch || norm.running.mean.has_value(),
                  "running_mean and running_var must be given unless the "
                  "statistics are the batch's");
}

// The geometry of rectified codes that are to be decoded to `sizes`, of
// `width` range numbers each group.
inline Geometry checked_rectified(const Tensor& codes, const Tensor& ranges,
                                  const std::vector<int64_t>& sizes,
                                  int64_t bits, int64_t group_size,
                                  bool split) {
  check_rectified_bits("bits", bits);
  STD_TORCH_CHECK(!sizes.empty(),
                  "size must have at least one dimension, got 0");
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  const Geometry geometry = make_geometry(sizes[0], numel, group_size);
  checked_layout(codes, geometry, bits);
  check_code_ranges(ranges, geometry, split, codes);
  return geometry;
}

}  // namespace mmactnn
