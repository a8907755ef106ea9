#include <algorithm>
#include <cstdint>

#include "../common/resized_loss.h"
#include "launch.h"
#include "workspace.h"

namespace mmactnn {
namespace {

// Largest dimension y of a grid.
constexpr int64_t kMaxGridY = 65535;

// Elements of row sums that are in memory at once, 32 MiB.
constexpr int64_t kMaxRowSums = INT64_C(8) << 20;

// A pixel a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(const T* __restrict__ logits, const ResizedLoss op,
                float* __restrict__ losses, float* __restrict__ log_sums,
                uint8_t* __restrict__ hits) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= op.pixels()) return;
  const uint32_t row = index / static_cast<uint32_t>(op.width.output);
  const uint32_t column = index - row * op.width.output;
  for (int64_t image = blockIdx.y; image < op.logits.images;
       image += gridDim.y) {
    const int64_t pixel = image * op.pixels() + index;
    const PixelLoss found = loss_at<T, Number<T>>(
        op, logits + image * op.logits.image_stride, op.labels.at(pixel),
        static_cast<int32_t>(row), static_cast<int32_t>(column));
    losses[pixel] = found.loss;
    log_sums[pixel] = found.log_sum;
    hits[pixel] = found.hit;
  }
}

// A place of the row sums [planes, H, w] a thread; `first` is the first plane.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    row_sums_kernel(const T* __restrict__ logits, const ResizedLoss op,
                    const float* __restrict__ log_sums,
                    const float* __restrict__ scale, int64_t first,
                    float* __restrict__ rows) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t width = op.width.input;
  const uint32_t row = index / width;
  if (row >= static_cast<uint32_t>(op.height.output)) return;
  const int64_t plane = first + blockIdx.y;
  const int64_t image = plane / op.logits.classes;
  const int64_t c = plane - image * op.logits.classes;
  rows[int64_t{blockIdx.y} * op.height.output * width + index] =
      row_gradient<T, Number<T>>(
          op,
          logits + image * op.logits.image_stride + c * op.logits.class_stride,
          log_sums, scale, c,
          image * op.pixels() + int64_t{row} * op.width.output,
          static_cast<int32_t>(row), static_cast<int32_t>(index - row * width));
}

// An element of the gradient [planes, h, w] a thread.
__global__ void __launch_bounds__(kThreads)
    plane_sums_kernel(const ResizedLoss op, const float* __restrict__ rows,
                      float* __restrict__ gradient) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t width = op.width.input;
  const uint32_t row = index / width;
  if (row >= static_cast<uint32_t>(op.height.input)) return;
  gradient[int64_t{blockIdx.y} * op.height.input * width + index] =
      plane_gradient(op, rows + int64_t{blockIdx.y} * op.height.output * width,
                     static_cast<int32_t>(row),
                     static_cast<int32_t>(index - row * width));
}

dim3 grid_of(int64_t across, int64_t count) {
  return dim3(static_cast<unsigned int>((across + kThreads - 1) / kThreads),
              static_cast<unsigned int>(count));
}

}  // namespace

namespace cuda {

void resized_cross_entropy(const Memory& logits, const ResizedLoss& op,
                           const Memory& losses, const Memory& log_sums,
                           const Memory& hits) {
  dispatch_dtype(logits.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    loss_kernel<T>
        <<<grid_of(op.pixels(), std::min(op.logits.images, kMaxGridY)),
           kThreads, 0, current_stream()>>>(
            static_cast<const T*>(logits.const_data_ptr()), op,
            static_cast<float*>(losses.mutable_data_ptr()),
            static_cast<float*>(log_sums.mutable_data_ptr()),
            static_cast<uint8_t*>(hits.mutable_data_ptr()));
    check_launch();
  });
}

void resized_cross_entropy_backward(const Memory& logits, const ResizedLoss& op,
                                    const Memory& log_sums, const Memory& scale,
                                    const Memory& gradient) {
  const cudaStream_t stream = current_stream();
  const int64_t row_sums = int64_t{op.height.output} * op.width.input;
  const int64_t small = int64_t{op.height.input} * op.width.input;
  const int64_t planes = op.logits.images * op.logits.classes;
  const int64_t at_once = std::min(
      {planes, kMaxGridY, std::max<int64_t>(kMaxRowSums / row_sums, 1)});
  const Workspace rows(at_once * row_sums);
  float* target = static_cast<float*>(gradient.mutable_data_ptr());
  dispatch_dtype(logits.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t first = 0; first < planes; first += at_once) {
      const int64_t count = std::min(at_once, planes - first);
      row_sums_kernel<T><<<grid_of(row_sums, count), kThreads, 0, stream>>>(
          static_cast<const T*>(logits.const_data_ptr()), op,
          static_cast<const float*>(log_sums.const_data_ptr()),
          static_cast<const float*>(scale.const_data_ptr()), first,
          rows.data());
      check_launch();
      plane_sums_kernel<<<grid_of(small, count), kThreads, 0, stream>>>(
          op, rows.data(), target + first * small);
      check_launch();
    }
  });
}

}  // namespace cuda
}  // namespace mmactnn
