#include "workspace.h"

#include <torch/csrc/stable/tensor.h>

#include "../ops/allocate.h"
#include "stream.h"

namespace mmactnn {

struct Workspace::Owner {
  torch::stable::Tensor tensor;
};

Workspace::Workspace(int64_t count) {
  const int64_t stride = 1;
  owner_ = std::make_unique<Owner>(Owner{
      allocate({&count, 1}, {&stride, 1}, torch::headeronly::ScalarType::Float,
               aoti_torch_device_type_cuda(), current_device())});
  data_ = static_cast<float*>(owner_->tensor.mutable_data_ptr());
}

Workspace::~Workspace() = default;

}  // namespace mmactnn
