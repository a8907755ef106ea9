#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/geometry.h"
#include "allocate.h"
#include "rectified_checks.h"
#include "registration.h"

namespace mmactnn {

// Input, output, codes and ranges; bits. The output may be the input.
MMACTNN_KERNEL(relu_codes, const Memory&, const Memory&, const Memory&,
               const Memory&, const Geometry&, int, const Rounding&);
// Gradient of the output, codes and gradient of the input; bits; whether codes
// are rotated where they can be.
MMACTNN_KERNEL(relu_codes_backward, const Memory&, const Memory&, const Memory&,
               const Geometry&, int, bool);

namespace {

std::tuple<Tensor, Tensor> rectify(const Tensor& input, const Tensor& output,
                                   int64_t bits, int64_t group_size,
                                   int64_t seed, int64_t offset,
                                   const std::optional<Tensor>& offset_tensor,
                                   bool rotated) {
  const Geometry geometry = input_geometry(input, group_size);
  check_rectified_bits("bits", bits);
  const Rounding rounding =
      checked_rounding(seed, offset, offset_tensor, rotated, group_size, input);
  const Tensor codes = empty_codes(input, geometry, bits);
  const Tensor ranges = empty_ranges(input, geometry);
  if (input.numel() != 0) {
    OnDevice(input).run(relu_codes_kernel, input, output, codes, ranges,
                        geometry, static_cast<int>(bits), rounding);
  }
  return {codes, ranges};
}

std::tuple<Tensor, Tensor, Tensor> relu_codes(
    Tensor input, int64_t bits, int64_t group_size, int64_t seed,
    int64_t offset, std::optional<Tensor> offset_tensor, bool rotated) {
  const Tensor output = empty_dense_like(input);
  const auto [codes, ranges] = rectify(input, output, bits, group_size, seed,
                                       offset, offset_tensor, rotated);
  return {output, codes, ranges};
}

std::tuple<Tensor, Tensor> relu_codes_(Tensor input, int64_t bits,
                                       int64_t group_size, int64_t seed,
                                       int64_t offset,
                                       std::optional<Tensor> offset_tensor,
                                       bool rotated) {
  return rectify(input, input, bits, group_size, seed, offset, offset_tensor,
                 rotated);
}

Tensor relu_codes_backward(Tensor grad_output, Tensor codes, int64_t bits,
                           bool rotated) {
  const Geometry geometry = check_zeroed_codes(grad_output, codes, bits);
  const Tensor grad_input = empty_dense_like(grad_output);
  if (grad_output.numel() != 0) {
    OnDevice(grad_output)
        .run(relu_codes_backward_kernel, grad_output, codes, grad_input,
             geometry, static_cast<int>(bits), rotated);
  }
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "relu_codes(Tensor input, int bits, int group_size, int seed, "
      "int offset, Tensor? offset_tensor=None, bool rotated=False) -> "
      "(Tensor output, Tensor codes, Tensor ranges)");
  m.def(
      "relu_codes_(Tensor(a!) input, int bits, int group_size, int seed, "
      "int offset, Tensor? offset_tensor=None, bool rotated=False) -> "
      "(Tensor codes, Tensor ranges)");
  m.def(
      "relu_codes_backward(Tensor grad_output, Tensor codes, int bits, "
      "bool rotated=False) -> Tensor");
}

MMACTNN_IMPL(m) {
  m.impl("relu_codes", TORCH_BOX(&mmactnn::relu_codes));
  m.impl("relu_codes_", TORCH_BOX(&mmactnn::relu_codes_));
  m.impl("relu_codes_backward", TORCH_BOX(&mmactnn::relu_codes_backward));
}
