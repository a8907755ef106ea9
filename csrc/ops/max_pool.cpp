#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/pool.h"
#include "pool_checks.h"
#include "registration.h"

namespace mmactnn {

// Input, output and indices.
MMACTNN_KERNEL(max_pool2d, const Memory&, const Memory&, const Memory&,
               const Pool&);
// Gradient of the output, indices and gradient of the input.
MMACTNN_KERNEL(max_pool2d_backward, const Memory&, const Memory&, const Memory&,
               const Pool&);

namespace {

std::tuple<Tensor, Tensor> max_pool2d(
    Tensor input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation,
    std::vector<int64_t> output_size, bool channels_last) {
  const PoolWindow window{kernel_size, stride, padding, dilation};
  check_pooled("input", input, window, output_size, channels_last);
  const Tensor output = empty_pooled(input, output_size, channels_last);
  const Tensor indices =
      empty(output, {index_bytes(output.numel())}, ScalarType::Byte);
  if (output.numel() != 0) {
    OnDevice(input).run(max_pool2d_kernel, input, output, indices,
                        make_pool(input, window, plane_size(input), output_size,
                                  channels_last));
  }
  return {output, indices};
}

Tensor max_pool2d_backward(Tensor grad_output, Tensor indices,
                           std::vector<int64_t> kernel_size,
                           std::vector<int64_t> stride,
                           std::vector<int64_t> padding,
                           std::vector<int64_t> dilation,
                           std::vector<int64_t> input_size,
                           bool channels_last) {
  const PoolWindow window{kernel_size, stride, padding, dilation};
  check_pooled("grad_output", grad_output, window, input_size, channels_last);
  check_indices(indices, grad_output);
  const Tensor grad_input =
      empty_pooled(grad_output, input_size, channels_last);
  if (grad_input.numel() != 0) {
    OnDevice(grad_output)
        .run(max_pool2d_backward_kernel, grad_output, indices, grad_input,
             make_pool(grad_output, window, input_size, plane_size(grad_output),
                       channels_last));
  }
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "max_pool2d(Tensor input, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int[] output_size, "
      "bool channels_last) -> (Tensor output, Tensor indices)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor indices, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int[] input_size, bool channels_last) -> Tensor");
}

MMACTNN_IMPL(m) {
  m.impl("max_pool2d", TORCH_BOX(&mmactnn::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&mmactnn::max_pool2d_backward));
}
