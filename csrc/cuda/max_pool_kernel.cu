#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/divider.h"
#include "../common/pool.h"
#include "../common/pool_checks.h"
#include "../common/tensor_checks.h"
#include "launch.h"

namespace mmactnn {
namespace {

// Where an element lies in a tensor [outer, height, width, inner].
struct Place {
  int32_t outer;
  int32_t row;
  int32_t column;
  int32_t inner;
};

// Finds the place of an index below 2^31.
struct Locator {
  Divider height;
  Divider width;
  Divider inner;

  __device__ __forceinline__ Place operator()(uint32_t index) const {
    const uint32_t pixel = inner.quotient(index);
    const uint32_t line = width.quotient(pixel);
    const uint32_t plane = height.quotient(line);
    return {static_cast<int32_t>(plane),
            static_cast<int32_t>(line - plane * height.divisor),
            static_cast<int32_t>(pixel - line * width.divisor),
            static_cast<int32_t>(index - pixel * inner.divisor)};
  }
};

// What is the same for all launches of an op.
struct Layout {
  Pool pool;
  Locator locate;
  int32_t input_plane;
  int32_t output_plane;
};

// An output a thread; neighbours share a byte of indices.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(const T* __restrict__ input, T* __restrict__ output,
                uint8_t* __restrict__ indices, Layout layout, uint32_t count) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  // Whole warps stay: the shuffle below names every lane of the warp.
  const bool active = index < count;
  uint32_t tap = 0;
  if (active) {
    const Place at = layout.locate(index);
    const auto maximum = find_maximum<T, Number<T>, int32_t>(
        input + at.outer * layout.input_plane + at.inner, layout.pool, at.row,
        at.column);
    output[index] = maximum.value;
    tap = maximum.tap;
  }
  const uint32_t next = __shfl_down_sync(0xFFFFFFFFu, tap, 1);
  if (active && index % 2 == 0) {
    indices[index / 2] = static_cast<uint8_t>(tap | (next << 4));
  }
}

// An element of the input a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* __restrict__ grad_output,
                  const uint8_t* __restrict__ indices,
                  T* __restrict__ grad_input, Layout layout, uint32_t count) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= count) return;
  const Place at = layout.locate(index);
  grad_input[index] = gather_gradient<T, Number<T>, int32_t>(
      grad_output, indices, layout.pool,
      at.outer * layout.output_plane + at.inner, at.row, at.column);
}

// Calls `body(layout, first, count)` for as many planes at a time as 32-bit
// indices can count; `height` and `width` are those of the tensor that has a
// thread an element.
template <typename Body>
void for_each_launch(const Pool& pool, int32_t height, int32_t width,
                     const Body& body) {
  const int64_t plane = std::max(pool.input_plane(), pool.output_plane());
  // A multiple of kThreads less than the limit, for the threads past the end.
  int64_t planes = (kMaxIndex - kThreads) / plane;
  STD_TORCH_CHECK(planes >= std::min<int64_t>(pool.outer, 2),
                  "a plane (of channels_last tensors: a sample) may have at "
                  "most ",
                  (kMaxIndex - kThreads) / 2, " elements, got ", plane);
  // An even number, so that no two launches share a byte of indices.
  if (planes > 1) planes -= planes % 2;
  const Layout layout{pool,
                      {Divider(static_cast<uint32_t>(height)),
                       Divider(static_cast<uint32_t>(width)),
                       Divider(static_cast<uint32_t>(pool.inner))},
                      static_cast<int32_t>(pool.input_plane()),
                      static_cast<int32_t>(pool.output_plane())};
  for (int64_t first = 0; first < pool.outer; first += planes) {
    const int64_t count = std::min(planes, pool.outer - first);
    body(layout, first,
         static_cast<uint32_t>(count * height * width * pool.inner));
  }
}

unsigned int grid_size(uint32_t count) {
  return (count + kThreads - 1) / kThreads;
}

std::tuple<Tensor, Tensor> max_pool2d(
    Tensor input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation,
    std::vector<int64_t> output_size, bool channels_last) {
  const PoolWindow window{kernel_size, stride, padding, dilation};
  check_pooled("input", input, window, output_size, channels_last);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor output = empty_pooled(input, output_size, channels_last);
  Tensor indices = empty_indices(output);
  if (output.numel() == 0) return {output, indices};
  const Pool pool =
      make_pool(input, window, plane_size(input), output_size, channels_last);
  const cudaStream_t stream = current_stream(input.get_device_index());
  auto* index_bytes = static_cast<uint8_t*>(indices.mutable_data_ptr());
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    for_each_launch(pool, pool.height.output, pool.width.output,
                    [&](const Layout& layout, int64_t first, uint32_t count) {
                      const int64_t first_output = first * pool.output_plane();
                      pool_kernel<T><<<grid_size(count), kThreads, 0, stream>>>(
                          source + first * pool.input_plane(),
                          target + first_output, index_bytes + first_output / 2,
                          layout, count);
                      check_launch();
                    });
  });
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
  const torch::stable::accelerator::DeviceGuard guard(
      grad_output.get_device_index());
  Tensor grad_input = empty_pooled(grad_output, input_size, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  const Pool pool = make_pool(grad_output, window, input_size,
                              plane_size(grad_output), channels_last);
  const cudaStream_t stream = current_stream(grad_output.get_device_index());
  const auto* index_bytes =
      static_cast<const uint8_t*>(indices.const_data_ptr());
  dispatch_dtype(grad_output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    for_each_launch(
        pool, pool.height.input, pool.width.input,
        [&](const Layout& layout, int64_t first, uint32_t count) {
          const int64_t first_output = first * pool.output_plane();
          gather_kernel<T><<<grid_size(count), kThreads, 0, stream>>>(
              source + first_output, index_bytes + first_output / 2,
              target + first * pool.input_plane(), layout, count);
          check_launch();
        });
  });
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("max_pool2d", TORCH_BOX(&mmactnn::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&mmactnn::max_pool2d_backward));
}
