#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/norm_codes.h"
#include "allocate.h"
#include "channel_checks.h"
#include "registration.h"

namespace mmactnn {

// For a gradient of the output with elements.
MMACTNN_KERNEL(norm_grad_sums, const Memory&, const NormArguments&,
               const NormSums&);
// Gradients of output and input. Of NormCodes::kMask the former are those that
// pass, and the mask is not looked at.
MMACTNN_KERNEL(norm_grad_input, const Memory&, const NormArguments&,
               const NormFactors&, const Memory&);

namespace {

NormArguments check_norm_codes(const Tensor& grad_output, const Tensor& codes,
                               const Tensor& ranges, int64_t bits,
                               int64_t group_size, bool split,
                               const std::vector<int64_t>& drawn,
                               const std::optional<Tensor>& offset_tensor) {
  const Channels channels = channels_of("grad_output", grad_output);
  const Geometry geometry = code_geometry("codes", codes, channels, group_size,
                                          bits, split, grad_output);
  const NormArguments arguments{
      split ? NormCodes::kSplit : NormCodes::kPlain,
      channels,
      geometry,
      static_cast<const uint8_t*>(codes.const_data_ptr()),
      ranges.const_data_ptr(),
      nullptr,
      bits,
      bits,
      checked_drawn(drawn, offset_tensor, grad_output)};
  check_rotated_group(arguments.drawn.rotated, group_size);
  check_code_ranges(ranges, geometry, range_width(split, arguments.rotated()),
                    grad_output);
  return arguments;
}

void add_act_codes(const Tensor& grad_output, const Tensor& act_codes,
                   int64_t act_bits, int64_t group_size,
                   NormArguments& arguments) {
  code_geometry("act_codes", act_codes, arguments.channels, group_size,
                act_bits, true, grad_output);
  arguments.kind = NormCodes::kMask;
  arguments.act_codes = static_cast<const uint8_t*>(act_codes.const_data_ptr());
  arguments.act_bits = act_bits;
}

// The sums are written to `request`, if there are elements; returned are the
// gradients that pass, if they are not those of the output.
std::optional<Tensor> sum(const OnDevice& device, const Tensor& grad_output,
                          const NormArguments& arguments, NormSums request) {
  std::optional<Tensor> passed;
  if (arguments.kind == NormCodes::kMask) {
    passed = empty_dense_like(grad_output);
  }
  if (grad_output.numel() != 0) {
    request.grad = passed;
    device.run(norm_grad_sums_kernel, grad_output, arguments, request);
  }
  return passed;
}

Tensor channel_vectors(const Tensor& grad_output,
                       std::initializer_list<int64_t> sizes) {
  Tensor vectors = empty(grad_output, sizes, ScalarType::Float);
  if (grad_output.numel() == 0) torch::stable::zero_(vectors);
  return vectors;
}

// One tensor, [2, C], of both sums.
std::tuple<std::optional<Tensor>, Tensor> sum_pair(
    const Tensor& grad_output, const NormArguments& arguments) {
  const int64_t count = arguments.channels.count;
  Tensor sums = channel_vectors(grad_output, {2, count});
  NormSums request{};
  request.gradients = static_cast<float*>(sums.mutable_data_ptr());
  request.products = request.gradients + count;
  return {sum(OnDevice(grad_output), grad_output, arguments, request), sums};
}

Tensor norm_grad_sums(Tensor grad_output, Tensor codes, Tensor ranges,
                      int64_t bits, int64_t group_size, bool relu,
                      std::vector<int64_t> drawn,
                      std::optional<Tensor> offset_tensor) {
  const NormArguments arguments = check_norm_codes(
      grad_output, codes, ranges, bits, group_size, relu, drawn, offset_tensor);
  return std::get<1>(sum_pair(grad_output, arguments));
}

std::tuple<Tensor, Tensor> norm_add_grad_sums(
    Tensor grad_output, Tensor codes, Tensor ranges, Tensor act_codes,
    int64_t bits, int64_t act_bits, int64_t group_size,
    std::vector<int64_t> drawn, std::optional<Tensor> offset_tensor) {
  NormArguments arguments =
      check_norm_codes(grad_output, codes, ranges, bits, group_size, false,
                       drawn, offset_tensor);
  add_act_codes(grad_output, act_codes, act_bits, group_size, arguments);
  auto [passed, sums] = sum_pair(grad_output, arguments);
  return {*passed, sums};
}

Tensor norm_grad_input(Tensor grad_output, Tensor codes, Tensor ranges,
                       Tensor scale, Tensor means, int64_t bits,
                       int64_t group_size, bool relu,
                       std::vector<int64_t> drawn,
                       std::optional<Tensor> offset_tensor) {
  const NormArguments arguments = check_norm_codes(
      grad_output, codes, ranges, bits, group_size, relu, drawn, offset_tensor);
  check_per_channel("scale", scale, arguments.channels, grad_output);
  check_per_channel("means", means, arguments.channels, grad_output, true);
  const Tensor grad_input = empty_dense_like(grad_output);
  if (grad_output.numel() != 0) {
    const NormFactors factors{
        static_cast<const float*>(scale.const_data_ptr()),
        static_cast<const float*>(means.const_data_ptr())};
    OnDevice(grad_output)
        .run(norm_grad_input_kernel, grad_output, arguments, factors,
             grad_input);
  }
  return grad_input;
}

std::vector<Tensor> batch_norm_act_backward(
    Tensor grad_output, Tensor codes, Tensor ranges,
    std::optional<Tensor> act_codes, std::optional<Tensor> weight,
    Tensor invstd, bool relu, bool use_batch_stats, bool needs_input,
    int64_t bits, int64_t act_bits, int64_t group_size,
    std::vector<int64_t> drawn, std::optional<Tensor> offset_tensor) {
  NormArguments arguments =
      check_norm_codes(grad_output, codes, ranges, bits, group_size,
                       relu && !act_codes, drawn, offset_tensor);
  const Channels channels = arguments.channels;
  check_per_channel("invstd", invstd, channels, grad_output);
  if (weight) check_per_channel("weight", *weight, channels, grad_output);
  if (act_codes) {
    add_act_codes(grad_output, *act_codes, act_bits, group_size, arguments);
  }
  const OnDevice device(grad_output);
  const bool any = needs_input && grad_output.numel() != 0;
  std::optional<Tensor> factors;
  if (any) factors = empty(grad_output, {3, channels.count}, ScalarType::Float);
  NormSums request{};
  if (any) {
    request.factors = factors;
    if (weight) {
      request.weight = static_cast<const float*>(weight->const_data_ptr());
    }
    request.invstd = static_cast<const float*>(invstd.const_data_ptr());
    request.use_batch_stats = use_batch_stats;
  }
  // Each is a tensor of its own: callers may return them from other ops, whose
  // outputs must not share memory.
  std::vector<Tensor> results{channel_vectors(grad_output, {channels.count}),
                              channel_vectors(grad_output, {channels.count})};
  request.gradients = static_cast<float*>(results[0].mutable_data_ptr());
  request.products = static_cast<float*>(results[1].mutable_data_ptr());
  const auto passed = sum(device, grad_output, arguments, request);
  if (needs_input) results.push_back(empty_dense_like(grad_output));
  if (any) {
    const auto* scale = static_cast<const float*>(factors->const_data_ptr());
    device.run(norm_grad_input_kernel, passed.value_or(grad_output), arguments,
               NormFactors{scale, scale + channels.count}, results.back());
  }
  if (passed) results.push_back(*passed);
  return results;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "norm_grad_sums(Tensor grad_output, Tensor codes, Tensor ranges, "
      "int bits, int group_size, bool relu, int[] drawn=[], "
      "Tensor? offset_tensor=None) -> Tensor sums");
  m.def(
      "norm_add_grad_sums(Tensor grad_output, Tensor codes, Tensor ranges, "
      "Tensor act_codes, int bits, int act_bits, int group_size, "
      "int[] drawn=[], Tensor? offset_tensor=None) -> (Tensor grad, "
      "Tensor sums)");
  m.def(
      "norm_grad_input(Tensor grad_output, Tensor codes, Tensor ranges, "
      "Tensor scale, Tensor means, int bits, int group_size, bool relu, "
      "int[] drawn=[], Tensor? offset_tensor=None) -> Tensor");
  m.def(
      "batch_norm_act_backward(Tensor grad_output, Tensor codes, "
      "Tensor ranges, Tensor? act_codes, Tensor? weight, Tensor invstd, "
      "bool relu, bool use_batch_stats, bool needs_input, int bits, int "
      "act_bits, int group_size, int[] drawn=[], "
      "Tensor? offset_tensor=None) -> Tensor[]");
}

MMACTNN_IMPL(m) {
  m.impl("norm_grad_sums", TORCH_BOX(&mmactnn::norm_grad_sums));
  m.impl("norm_add_grad_sums", TORCH_BOX(&mmactnn::norm_add_grad_sums));
  m.impl("norm_grad_input", TORCH_BOX(&mmactnn::norm_grad_input));
  m.impl("batch_norm_act_backward",
         TORCH_BOX(&mmactnn::batch_norm_act_backward));
}
