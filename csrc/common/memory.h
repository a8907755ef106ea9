// The memory of a tensor, which is all that kernels see of it. They need no
// header of torch for it, of which each takes the compilers seconds.
#pragma once

#include <cstdint>
#include <optional>

namespace torch::stable {
class Tensor;
}

namespace mmactnn {

// kOther stands for dtypes that no kernel distinguishes.
enum class Dtype { kFloat, kHalf, kBFloat16, kOther };

class Memory {
 public:
  // For a missing tensor.
  Memory() = default;
  // Implicit, as ops pass tensors to kernels. The tensor keeps it alive.
  Memory(const torch::stable::Tensor& tensor);
  Memory(const std::optional<torch::stable::Tensor>& tensor);

  explicit operator bool() const { return exists_; }
  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }
  int64_t numel() const { return numel_; }
  Dtype dtype() const { return dtype_; }
  // Bytes an element, for the first three dtypes.
  int element_size() const { return dtype_ == Dtype::kFloat ? 4 : 2; }

 private:
  bool exists_ = false;
  void* data_ = nullptr;
  int64_t numel_ = 0;
  Dtype dtype_ = Dtype::kOther;
};

}  // namespace mmactnn
