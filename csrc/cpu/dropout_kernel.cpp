#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../common/allocate.h"
#include "../common/dropout.h"
#include "../common/tensor_checks.h"
#include "blocks.h"
#include "number.h"

namespace mmactnn {
namespace {

void apply(const Tensor& input, Tensor& output, const Dropout& dropout) {
  check_dtype("input", input);
  check_dense("input", input);
  const PhiloxStream stream = dropout.stream.current();
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_block(
        static_cast<const T*>(input.const_data_ptr()),
        static_cast<T*>(output.mutable_data_ptr()), input.numel(),
        [&](int64_t block, const T* source, T* target, int64_t count) {
          const PhiloxBlock random =
              philox(stream, static_cast<uint64_t>(block));
          for (int64_t i = 0; i < count; ++i) {
            const float factor =
                dropout.factor(random.bits16(static_cast<int>(i)));
            target[i] = T(multiply(static_cast<float>(source[i]), factor));
          }
        });
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

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("dropout", TORCH_BOX(&mmactnn::dropout));
  m.impl("dropout_", TORCH_BOX(&mmactnn::dropout_));
}
