#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../common/allocate.h"
#include "../common/dropout.h"
#include "../common/tensor_checks.h"
#include "blocks.h"
#include "launch.h"

namespace mmactnn {
namespace {

template <typename T>
struct Drop {
  Dropout dropout;

  __device__ __forceinline__ void operator()(int64_t block, T* values) const {
    const PhiloxBlock random =
        philox(dropout.stream.current(), static_cast<uint64_t>(block));
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float factor = dropout.factor(random.bits16(i));
      values[i] =
          Number<T>::store(multiply(Number<T>::load(values[i]), factor));
    }
  }
};

void apply(const Tensor& input, Tensor& output, const Dropout& dropout) {
  check_dtype("input", input);
  check_dense("input", input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    map_blocks(static_cast<const T*>(input.const_data_ptr()),
               static_cast<T*>(output.mutable_data_ptr()), input.numel(),
               Drop<T>{dropout}, current_stream(input.get_device_index()));
  });
}

Tensor dropout(Tensor input, double p, int64_t seed, int64_t offset,
               std::optional<Tensor> count) {
  Tensor output = empty_dense_like(input);
  apply(input, output,
        make_dropout(p, checked_stream(seed, offset, count, input)));
  return output;
}

void dropout_(Tensor input, double p, int64_t seed, int64_t offset,
              std::optional<Tensor> count) {
  apply(input, input,
        make_dropout(p, checked_stream(seed, offset, count, input)));
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("dropout", TORCH_BOX(&mmactnn::dropout));
  m.impl("dropout_", TORCH_BOX(&mmactnn::dropout_));
}
