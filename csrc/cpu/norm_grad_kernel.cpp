#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/allocate.h"
#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/norm.h"
#include "../common/norm_checks.h"
#include "../common/rectified_codec.h"
#include "group.h"
#include "number.h"

namespace mmactnn {
namespace {

// Calls `body(element, channel, passed, grad, normal)` with every element of a
// row in memory order; `grad` is 0 where the gradient does not pass.
template <NormCodes kCodes, typename T, typename Body>
void for_each_element(const T* grad_output, const NormArguments& arguments,
                      int64_t row, const Body& body) {
  constexpr bool kSplit = kCodes == NormCodes::kSplit;
  const Geometry& geometry = arguments.geometry;
  const Channels& channels = arguments.channels;
  const int bits = static_cast<int>(arguments.bits);
  const int act_bits = static_cast<int>(arguments.act_bits);
  const auto row_codes = [&](const Tensor* codes, int64_t width) {
    return static_cast<const uint8_t*>(codes->const_data_ptr()) +
           row * geometry.blocks_per_row() * width;
  };
  const uint8_t* codes = row_codes(arguments.codes, bits);
  const uint8_t* act_codes = nullptr;
  if constexpr (kCodes == NormCodes::kMask) {
    act_codes = row_codes(arguments.act_codes, act_bits);
  }
  constexpr int kRanges = kSplit ? 2 : 1;
  const auto* ranges =
      static_cast<const uint32_t*>(arguments.ranges->const_data_ptr()) +
      row * geometry.groups_per_row() * kRanges;
  const uint32_t max_code = kSplit ? max_split_code(bits) : max_code_of(bits);
  const T* source = grad_output + row * geometry.row_numel;
  const int64_t channel_step = channels.last ? 1 : channels.plane;
  int64_t channel = 0, left = channel_step;
  for (int64_t start = 0; start < geometry.row_numel;
       start += geometry.group_size) {
    const int64_t end =
        std::min(start + geometry.group_size, geometry.row_numel);
    const uint32_t* words = ranges + start / geometry.group_size * kRanges;
    const Range kinds[2] = {Range::unpack(words[0]),
                            Range::unpack(words[kRanges - 1])};
    for (int64_t i = start; i < end; ++i) {
      uint32_t code = code_at(codes, i, bits);
      bool passed = true;
      Range range = kinds[0];
      if constexpr (kSplit) {
        passed = split_positive(code, bits);
        range = kinds[passed];
        code = split_value_code(code, bits);
      } else if constexpr (kCodes == NormCodes::kMask) {
        passed = code_at(act_codes, i, act_bits) != 0u;
      }
      const float normal = range.special()
                               ? decode_special(code, range, max_code)
                               : decode(code, range);
      const float grad = passed ? static_cast<float>(source[i]) : 0.0f;
      body(i, channel, passed, grad, normal);
      if (--left == 0) {
        left = channel_step;
        channel = channel + 1 == channels.count ? 0 : channel + 1;
      }
    }
  }
}

int64_t row_grain(const Geometry& geometry) {
  return std::max<int64_t>(
      kGrainElements / std::max<int64_t>(geometry.row_numel, 1), 1);
}

// `grad`, of NormCodes::kMask only, takes the gradients that pass.
template <NormCodes kCodes>
Tensor grad_sums(const Tensor& grad_output, const NormArguments& arguments,
                 Tensor* grad) {
  const int64_t channels = arguments.channels.count;
  const Geometry& geometry = arguments.geometry;
  // Sums by row, so that their order depends on nothing else.
  std::vector<double> row_sums(geometry.rows * 2 * channels);
  dispatch_dtype(grad_output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target =
        grad == nullptr ? nullptr : static_cast<T*>(grad->mutable_data_ptr());
    torch::stable::parallel_for(
        0, geometry.rows, row_grain(geometry), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            double* sums = row_sums.data() + row * 2 * channels;
            double* products = sums + channels;
            for_each_element<kCodes>(
                source, arguments, row,
                [&](int64_t i, int64_t channel, bool passed, float value,
                    float normal) {
                  sums[channel] += value;
                  products[channel] += static_cast<double>(value) * normal;
                  if constexpr (kCodes == NormCodes::kMask) {
                    const int64_t index = row * geometry.row_numel + i;
                    target[index] = passed ? source[index] : T(0.0f);
                  }
                });
          }
        });
  });
  Tensor sums = empty(grad_output, {2, channels}, ScalarType::Float);
  auto* result = static_cast<float*>(sums.mutable_data_ptr());
  for (int64_t c = 0; c < 2 * channels; ++c) {
    double sum = 0.0;
    for (int64_t row = 0; row < geometry.rows; ++row) {
      sum += row_sums[row * 2 * channels + c];
    }
    result[c] = static_cast<float>(sum);
  }
  return sums;
}

template <NormCodes kCodes>
void grad_input(const Tensor& grad_output, const NormArguments& arguments,
                const float* scale, const float* means, Tensor& output) {
  const Geometry& geometry = arguments.geometry;
  const float* product_means = means + arguments.channels.count;
  dispatch_dtype(grad_output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    torch::stable::parallel_for(
        0, geometry.rows, row_grain(geometry), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            for_each_element<kCodes>(
                source, arguments, row,
                [&](int64_t i, int64_t channel, bool, float value,
                    float normal) {
                  target[row * geometry.row_numel + i] = static_cast<T>(
                      norm_grad(value, normal, means[channel],
                                product_means[channel], scale[channel]));
                });
          }
        });
  });
}

Tensor norm_grad_sums(Tensor grad_output, Tensor codes, Tensor ranges,
                      int64_t bits, int64_t group_size, bool relu) {
  const NormArguments arguments =
      check_norm_codes(grad_output, codes, ranges, bits, group_size, relu);
  return relu ? grad_sums<NormCodes::kSplit>(grad_output, arguments, nullptr)
              : grad_sums<NormCodes::kPlain>(grad_output, arguments, nullptr);
}

std::tuple<Tensor, Tensor> norm_add_grad_sums(Tensor grad_output, Tensor codes,
                                              Tensor ranges, Tensor act_codes,
                                              int64_t bits, int64_t act_bits,
                                              int64_t group_size) {
  NormArguments arguments =
      check_norm_codes(grad_output, codes, ranges, bits, group_size, false);
  check_act_codes(grad_output, act_codes, act_bits, group_size, arguments);
  Tensor grad = empty_dense_like(grad_output);
  Tensor sums = grad_sums<NormCodes::kMask>(grad_output, arguments, &grad);
  return {grad, sums};
}

Tensor norm_grad_input(Tensor grad_output, Tensor codes, Tensor ranges,
                       Tensor scale, Tensor means, int64_t bits,
                       int64_t group_size, bool relu) {
  const NormArguments arguments =
      check_norm_codes(grad_output, codes, ranges, bits, group_size, relu);
  check_per_channel("scale", scale, arguments.channels, grad_output);
  check_per_channel("means", means, arguments.channels, grad_output, true);
  Tensor output = empty_dense_like(grad_output);
  const auto* scales = static_cast<const float*>(scale.const_data_ptr());
  const auto* mean_values = static_cast<const float*>(means.const_data_ptr());
  if (relu) {
    grad_input<NormCodes::kSplit>(grad_output, arguments, scales, mean_values,
                                  output);
  } else {
    grad_input<NormCodes::kPlain>(grad_output, arguments, scales, mean_values,
                                  output);
  }
  return output;
}

// What grad_input() multiplies with and subtracts, [3, C]: scale, then means.
Tensor coefficients(const Tensor& sums, const std::optional<Tensor>& weight,
                    const Tensor& invstd, bool of_batch, float count) {
  const int64_t channels = sums.size(1);
  Tensor result = empty(sums, {3, channels}, ScalarType::Float);
  auto* values = static_cast<float*>(result.mutable_data_ptr());
  const auto* totals = static_cast<const float*>(sums.const_data_ptr());
  const auto* scales = static_cast<const float*>(invstd.const_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    const float factor =
        weight ? static_cast<const float*>(weight->const_data_ptr())[c] : 1.0f;
    values[c] = multiply(scales[c], factor);
    values[channels + c] = of_batch ? totals[c] / count : 0.0f;
    values[2 * channels + c] = of_batch ? totals[channels + c] / count : 0.0f;
  }
  return result;
}

std::vector<Tensor> batch_norm_act_backward(
    Tensor grad_output, Tensor codes, Tensor ranges,
    std::optional<Tensor> act_codes, std::optional<Tensor> weight,
    Tensor invstd, bool relu, bool of_batch, bool needs_input, int64_t bits,
    int64_t act_bits, int64_t group_size) {
  const bool masks = relu && !act_codes;
  const NormArguments plain =
      check_norm_codes(grad_output, codes, ranges, bits, group_size, masks);
  const int64_t channels = plain.channels.count;
  check_per_channel("invstd", invstd, plain.channels, grad_output);
  if (weight) {
    check_per_channel("weight", *weight, plain.channels, grad_output);
  }
  Tensor grad = grad_output;
  const auto sum = [&] {
    if (act_codes) {
      NormArguments arguments = plain;
      check_act_codes(grad_output, *act_codes, act_bits, group_size, arguments);
      grad = empty_dense_like(grad_output);
      return grad_sums<NormCodes::kMask>(grad_output, arguments, &grad);
    }
    return masks ? grad_sums<NormCodes::kSplit>(grad_output, plain, nullptr)
                 : grad_sums<NormCodes::kPlain>(grad_output, plain, nullptr);
  };
  const Tensor sums = sum();
  std::vector<Tensor> results{sums};
  if (needs_input) {
    results.push_back(empty_dense_like(grad_output));
  }
  if (needs_input && grad_output.numel() != 0) {
    Tensor& output = results.back();
    const Tensor factors =
        coefficients(sums, weight, invstd, of_batch,
                     static_cast<float>(plain.channels.channel_numel()));
    const auto* values = static_cast<const float*>(factors.const_data_ptr());
    if (masks) {
      grad_input<NormCodes::kSplit>(grad, plain, values, values + channels,
                                    output);
    } else {
      grad_input<NormCodes::kPlain>(grad, plain, values, values + channels,
                                    output);
    }
  }
  if (act_codes) results.push_back(grad);
  return results;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("norm_grad_sums", TORCH_BOX(&mmactnn::norm_grad_sums));
  m.impl("norm_add_grad_sums", TORCH_BOX(&mmactnn::norm_add_grad_sums));
  m.impl("norm_grad_input", TORCH_BOX(&mmactnn::norm_grad_input));
  m.impl("batch_norm_act_backward",
         TORCH_BOX(&mmactnn::batch_norm_act_backward));
}
