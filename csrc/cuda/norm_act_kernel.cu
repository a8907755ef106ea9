#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "norm_act.h"

namespace mmactnn {
namespace {

NormActOutputs run(const Tensor& input, const std::optional<Tensor>& residual,
                   Tensor& target, const NormActArguments& arguments) {
  NormActOutputs outputs = empty_norm_act(input, arguments);
  if (input.numel() == 0) return outputs;
  if (arguments.mode == NormAct::kAdd) {
    norm_act_add(input, *residual, target, arguments, outputs);
  } else if (arguments.mode == NormAct::kRelu) {
    norm_act_relu(input, target, arguments, outputs);
  } else {
    norm_act_plain(input, target, arguments, outputs);
  }
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act(
    Tensor input, std::optional<Tensor> residual, Tensor mean, Tensor invstd,
    std::optional<Tensor> weight, std::optional<Tensor> bias, bool relu,
    int64_t bits, int64_t act_bits, int64_t group_size, int64_t seed,
    int64_t offset) {
  const NormActArguments arguments =
      check_norm_act(input, residual, mean, invstd, weight, bias, relu, bits,
                     act_bits, group_size, seed, offset);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor output = torch::stable::empty_like(input);
  NormActOutputs kept = run(input, residual, output, arguments);
  return {output, kept.codes, kept.ranges, kept.act_codes, kept.act_ranges};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_(
    Tensor input, std::optional<Tensor> residual, Tensor mean, Tensor invstd,
    std::optional<Tensor> weight, std::optional<Tensor> bias, bool relu,
    int64_t bits, int64_t act_bits, int64_t group_size, int64_t seed,
    int64_t offset) {
  const NormActArguments arguments =
      check_norm_act(input, residual, mean, invstd, weight, bias, relu, bits,
                     act_bits, group_size, seed, offset);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  NormActOutputs kept = run(input, residual, input, arguments);
  return {kept.codes, kept.ranges, kept.act_codes, kept.act_ranges};
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("norm_act", TORCH_BOX(&mmactnn::norm_act));
  m.impl("norm_act_", TORCH_BOX(&mmactnn::norm_act_));
}
