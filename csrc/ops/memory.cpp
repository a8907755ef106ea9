#include "../common/memory.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace mmactnn {
namespace {

Dtype dtype_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kOther;
  }
}

}  // namespace

Memory::Memory(const torch::stable::Tensor& tensor)
    : exists_(true),
      data_(tensor.data_ptr()),
      numel_(tensor.numel()),
      dtype_(dtype_of(tensor.scalar_type())) {}

Memory::Memory(const std::optional<torch::stable::Tensor>& tensor)
    : Memory(tensor ? Memory(*tensor) : Memory()) {}

}  // namespace mmactnn
