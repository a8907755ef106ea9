#include "../common/frozen_norm.h"

#include <optional>

#include "channel_checks.h"
#include "registration.h"
#include "residual_check.h"

namespace mmactnn {

// Values, which are overwritten, and their channels; residual.
MMACTNN_KERNEL(frozen_norm_act, const Memory&, const Channels&, const Memory&,
               const FrozenParameters&, bool);

namespace {

void frozen_norm_act_(Tensor input, std::optional<Tensor> residual, Tensor mean,
                      Tensor var, std::optional<Tensor> weight,
                      std::optional<Tensor> bias, double eps, bool relu) {
  const Channels channels = channels_of("input", input);
  if (residual) check_residual(*residual, input);
  check_per_channel("mean", mean, channels, input);
  check_per_channel("var", var, channels, input);
  if (weight) check_per_channel("weight", *weight, channels, input);
  if (bias) check_per_channel("bias", *bias, channels, input);
  if (channels.numel() == 0) return;
  const auto pointer = [](const Memory& memory) {
    return static_cast<const float*>(memory.const_data_ptr());
  };
  const FrozenParameters parameters{pointer(mean), pointer(var),
                                    pointer(weight), pointer(bias),
                                    static_cast<float>(eps)};
  OnDevice(input).run(frozen_norm_act_kernel, input, channels, residual,
                      parameters, relu);
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "frozen_norm_act_(Tensor(a!) input, Tensor? residual, Tensor mean, "
      "Tensor var, Tensor? weight, Tensor? bias, float eps, bool relu) -> ()");
}

MMACTNN_IMPL(m) {
  m.impl("frozen_norm_act_", TORCH_BOX(&mmactnn::frozen_norm_act_));
}
