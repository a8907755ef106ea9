#include "norm_act.h"

namespace mmactnn {

void norm_act_add(const Tensor& input, const Tensor& residual, Tensor& target,
                  const NormActArguments& arguments, NormActOutputs& outputs) {
  launch_norm_act<NormAct::kAdd>(input, &residual, target, arguments, outputs);
}

}  // namespace mmactnn
