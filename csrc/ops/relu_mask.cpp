#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/rectifier.h"
#include "allocate.h"
#include "registration.h"

namespace mmactnn {

// Input, output and mask. The output may be the input.
MMACTNN_KERNEL(relu_mask, const Memory&, const Memory&, const Memory&,
               const Rectifier&);
// Gradient of the output, mask and gradient of the input.
MMACTNN_KERNEL(relu_mask_backward, const Memory&, const Memory&, const Memory&,
               const Rectifier&);

namespace {

Tensor rectify(const Tensor& input, const Tensor& output,
               const Rectifier& rectifier) {
  check_dtype("input", input);
  check_dense("input", input);
  const Tensor mask = empty_mask(input);
  OnDevice(input).run(relu_mask_kernel, input, output, mask, rectifier);
  return mask;
}

std::tuple<Tensor, Tensor> relu_mask(Tensor input, std::optional<double> max,
                                     std::optional<double> slope) {
  const Tensor output = empty_dense_like(input);
  const Tensor mask = rectify(input, output, make_rectifier(max, slope));
  return {output, mask};
}

Tensor relu_mask_(Tensor input, std::optional<double> max,
                  std::optional<double> slope) {
  return rectify(input, input, make_rectifier(max, slope));
}

void check_mask(const Tensor& mask, int64_t numel) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.dim() == 1 &&
                      mask.is_contiguous() &&
                      mask.size(0) == (numel + kBlock - 1) / kBlock,
                  "mask must be a contiguous uint8 tensor of ",
                  (numel + kBlock - 1) / kBlock, " bytes");
}

Tensor relu_mask_backward(Tensor grad_output, Tensor mask,
                          std::optional<double> slope) {
  check_dtype("grad_output", grad_output);
  check_dense("grad_output", grad_output);
  check_mask(mask, grad_output.numel());
  const Rectifier rectifier = make_rectifier(std::nullopt, slope);
  const Tensor grad_input = empty_dense_like(grad_output);
  OnDevice(grad_output)
      .run(relu_mask_backward_kernel, grad_output, mask, grad_input, rectifier);
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "relu_mask(Tensor input, float? max=None, float? slope=None) -> "
      "(Tensor output, Tensor mask)");
  m.def(
      "relu_mask_(Tensor(a!) input, float? max=None, float? slope=None) -> "
      "Tensor mask");
  m.def(
      "relu_mask_backward(Tensor grad_output, Tensor mask, "
      "float? slope=None) -> Tensor");
}

MMACTNN_IMPL(m) {
  m.impl("relu_mask", TORCH_BOX(&mmactnn::relu_mask));
  m.impl("relu_mask_", TORCH_BOX(&mmactnn::relu_mask_));
  m.impl("relu_mask_backward", TORCH_BOX(&mmactnn::relu_mask_backward));
}
