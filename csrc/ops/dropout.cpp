#include "../common/dropout.h"

#include <cstdint>
#include <optional>

#include "allocate.h"
#include "registration.h"

namespace mmactnn {

// `output` may be the input.
MMACTNN_KERNEL(dropout, const Memory&, const Memory&, const Dropout&);

namespace {

void apply(const Tensor& input, const Tensor& output, double p, int64_t seed,
           int64_t offset, const std::optional<Tensor>& offset_tensor) {
  check_dtype("input", input);
  check_dense("input", input);
  const Dropout dropout =
      make_dropout(p, checked_stream(seed, offset, offset_tensor, input));
  OnDevice(input).run(dropout_kernel, input, output, dropout);
}

Tensor dropout(Tensor input, double p, int64_t seed, int64_t offset,
               std::optional<Tensor> offset_tensor) {
  const Tensor output = empty_dense_like(input);
  apply(input, output, p, seed, offset, offset_tensor);
  return output;
}

void dropout_(Tensor input, double p, int64_t seed, int64_t offset,
              std::optional<Tensor> offset_tensor) {
  apply(input, input, p, seed, offset, offset_tensor);
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "dropout(Tensor input, float p, int seed, int offset, "
      "Tensor? offset_tensor=None) -> Tensor");
  m.def(
      "dropout_(Tensor(a!) input, float p, int seed, int offset, "
      "Tensor? offset_tensor=None) -> ()");
}

MMACTNN_IMPL(m) {
  m.impl("dropout", TORCH_BOX(&mmactnn::dropout));
  m.impl("dropout_", TORCH_BOX(&mmactnn::dropout_));
}
