#include "norm_act.h"

namespace mmactnn {

void norm_act_plain(const Tensor& input, Tensor& target,
                    const NormActArguments& arguments,
                    NormActOutputs& outputs) {
  launch_norm_act<NormAct::kPlain>(input, nullptr, target, arguments, outputs);
}

}  // namespace mmactnn
