#include "channel_stats.h"

#include <optional>
#include <tuple>

namespace mmactnn {
namespace {

std::tuple<Tensor, Tensor, Tensor> channel_stats(
    Tensor input, double eps, double momentum,
    std::optional<Tensor> running_mean, std::optional<Tensor> running_var) {
  const Channels channels =
      check_stats(input, {running_mean, running_var, std::nullopt});
  const Tensor mean = empty_stats(input, channels);
  const Tensor var = empty_stats(input, channels);
  const Tensor invstd = empty_stats(input, channels);
  OnDevice(input).run(
      batch_stats_kernel, input, channels, eps,
      RunningStats{running_mean, running_var, Memory(), momentum},
      StatsOutputs{mean, var, invstd});
  return {mean, var, invstd};
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "channel_stats(Tensor input, float eps, float momentum, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var) -> "
      "(Tensor mean, Tensor var, Tensor invstd)");
}

MMACTNN_IMPL(m) { m.impl("channel_stats", TORCH_BOX(&mmactnn::channel_stats)); }
