// The arguments of a fused normalisation, checked, and its outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "allocate.h"
#include "channels.h"
#include "geometry.h"
#include "philox.h"
#include "rectified_codec.h"
#include "tensor_checks.h"

namespace mmactnn {

// What becomes of the normalised input, and what is kept.
enum class NormAct {
  kPlain,  // nothing else; its plain codes
  kRelu,   // rectified; its split codes
  kAdd,    // a sum, rectified; its plain codes and zeroed ones of the output
};

// The upper half of the counter of the zeroed codes' random bits: the highest
// bit is set, so that they are not those of the plain codes.
constexpr uint64_t kActStream = uint64_t{1} << 63;

struct NormActArguments {
  NormAct mode;
  Channels channels;
  Geometry geometry;
  int bits;
  int act_bits;
  const float* mean;
  const float* invstd;
  const float* weight;  // may be null
  const float* bias;    // may be null
  PhiloxStream stream;
  PhiloxStream act_stream;
};

inline const float* float_data(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* checked_parameter(const char* name,
                                      const std::optional<Tensor>& tensor,
                                      const Channels& channels,
                                      const Tensor& like) {
  if (!tensor) return nullptr;
  check_per_channel(name, *tensor, channels, like);
  return float_data(*tensor);
}

inline void check_residual(const Tensor& residual, const Tensor& input) {
  bool same = residual.scalar_type() == input.scalar_type() &&
              residual.dim() == input.dim();
  for (int64_t d = 0; same && d < input.dim(); ++d) {
    same = residual.size(d) == input.size(d) &&
           (residual.stride(d) == input.stride(d) || input.size(d) == 1);
  }
  STD_TORCH_CHECK(same || (input.numel() == 0 && residual.numel() == 0),
                  "residual must be of the shape, strides and dtype of input");
  check_same_device("residual", residual, input);
}

inline void check_rectified_bits(const char* name, int64_t bits) {
  STD_TORCH_CHECK(bits >= kMinRectifiedBits && bits <= kMaxBits, name,
                  " must be an integer from ", kMinRectifiedBits, " to 8, got ",
                  bits);
}

inline NormActArguments check_norm_act(const Tensor& input,
                                       const std::optional<Tensor>& residual,
                                       const Tensor& mean, const Tensor& invstd,
                                       const std::optional<Tensor>& weight,
                                       const std::optional<Tensor>& bias,
                                       bool relu, int64_t bits,
                                       int64_t act_bits, int64_t group_size,
                                       int64_t seed, int64_t offset) {
  const Channels channels = channels_of("input", input);
  STD_TORCH_CHECK(channels.row_numel() <= INT32_MAX,
                  "a sample may have at most ", INT32_MAX, " elements, got ",
                  channels.row_numel());
  STD_TORCH_CHECK(relu || !residual,
                  "a residual is added where relu is True only");
  check_group_size(group_size);
  const NormAct mode = residual ? NormAct::kAdd
                       : relu   ? NormAct::kRelu
                                : NormAct::kPlain;
  if (mode == NormAct::kRelu) {
    check_rectified_bits("bits", bits);
  } else {
    check_bits(bits);
  }
  if (mode == NormAct::kAdd) {
    check_rectified_bits("act_bits", act_bits);
    check_residual(*residual, input);
  }
  check_per_channel("mean", mean, channels, input);
  check_per_channel("invstd", invstd, channels, input);
  const auto key = static_cast<uint64_t>(seed);
  const auto counter = static_cast<uint64_t>(offset);
  return {mode,
          channels,
          {channels.rows, channels.rows == 0 ? 0 : channels.row_numel(),
           group_size},
          static_cast<int>(bits),
          static_cast<int>(act_bits),
          float_data(mean),
          float_data(invstd),
          checked_parameter("weight", weight, channels, input),
          checked_parameter("bias", bias, channels, input),
          {key, counter},
          {key, counter ^ kActStream}};
}

struct NormActOutputs {
  Tensor codes;
  Tensor ranges;
  Tensor act_codes;   // empty where there are none
  Tensor act_ranges;  // likewise
};

inline Tensor empty_pairs(const Tensor& like, const Geometry& geometry,
                          int64_t numbers) {
  return torch::stable::new_empty(
      like, {geometry.rows, geometry.groups_per_row(), numbers},
      ScalarType::BFloat16);
}

inline NormActOutputs empty_norm_act(const Tensor& like,
                                     const NormActArguments& arguments) {
  const Geometry& geometry = arguments.geometry;
  const bool adds = arguments.mode == NormAct::kAdd;
  return {empty_codes(like, geometry, arguments.bits),
          empty_pairs(like, geometry, arguments.mode == NormAct::kRelu ? 4 : 2),
          adds ? empty_codes(like, geometry, arguments.act_bits)
               : torch::stable::new_empty(like, {0}, ScalarType::Byte),
          adds ? empty_pairs(like, geometry, 2)
               : torch::stable::new_empty(like, {0}, ScalarType::BFloat16)};
}

// What the elements of a channel are normalised and scaled with.
struct ChannelValues {
  float mean;
  float invstd;
  float weight;
  float bias;

  // Each operation is rounded by itself, as in reference.py.
  MMACTNN_HOST_DEVICE float normalise(float x) const {
    return multiply(add(x, -mean), invstd);
  }
  MMACTNN_HOST_DEVICE float scale(float normal) const {
    return add(multiply(normal, weight), bias);
  }
};

MMACTNN_HOST_DEVICE ChannelValues
channel_values(const NormActArguments& arguments, int64_t channel) {
  return {arguments.mean[channel], arguments.invstd[channel],
          arguments.weight == nullptr ? 1.0f : arguments.weight[channel],
          arguments.bias == nullptr ? 0.0f : arguments.bias[channel]};
}

}  // namespace mmactnn
