#include <cstdint>
#include <optional>
#include <vector>

#include "../common/resized_loss.h"
#include "number.h"
#include "parallel.h"

namespace mmactnn {
namespace cpu {

void resized_cross_entropy(const Memory& logits, const ResizedLoss& op,
                           const Memory& losses, const Memory& log_sums,
                           const Memory& hits) {
  float* loss = static_cast<float*>(losses.mutable_data_ptr());
  float* log_sum = static_cast<float*>(log_sums.mutable_data_ptr());
  uint8_t* hit = static_cast<uint8_t*>(hits.mutable_data_ptr());
  const int64_t width = op.width.output;
  dispatch_dtype(logits.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(logits.const_data_ptr());
    parallel_for(op.logits.images * op.height.output, 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t line = begin; line < end; ++line) {
                     const int64_t image = line / op.height.output;
                     const auto row =
                         static_cast<int32_t>(line % op.height.output);
                     for (int64_t x = 0; x < width; ++x) {
                       const int64_t pixel = line * width + x;
                       const PixelLoss found = loss_at<T, HostNumber<T>>(
                           op, source + image * op.logits.image_stride,
                           op.labels.at(pixel), row, static_cast<int32_t>(x));
                       loss[pixel] = found.loss;
                       log_sum[pixel] = found.log_sum;
                       hit[pixel] = found.hit;
                     }
                   }
                 });
  });
}

void resized_cross_entropy_backward(const Memory& logits, const ResizedLoss& op,
                                    const Memory& log_sums, const Memory& scale,
                                    const Memory& gradient) {
  const float* log_sum = static_cast<const float*>(log_sums.const_data_ptr());
  const float* factors = static_cast<const float*>(scale.const_data_ptr());
  float* target = static_cast<float*>(gradient.mutable_data_ptr());
  const int32_t width = op.width.input;
  dispatch_dtype(logits.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(logits.const_data_ptr());
    parallel_for(op.logits.images * op.logits.classes, 1,
                 [&](int64_t begin, int64_t end) {
                   std::vector<float> rows(int64_t{op.height.output} * width);
                   for (int64_t plane = begin; plane < end; ++plane) {
                     const int64_t image = plane / op.logits.classes;
                     const int64_t c = plane % op.logits.classes;
                     const T* values = source + image * op.logits.image_stride +
                                       c * op.logits.class_stride;
                     for (int32_t y = 0; y < op.height.output; ++y) {
                       const int64_t first =
                           image * op.pixels() + int64_t{y} * op.width.output;
                       for (int32_t j = 0; j < width; ++j) {
                         rows[int64_t{y} * width + j] =
                             row_gradient<T, HostNumber<T>>(
                                 op, values, log_sum, factors, c, first, y, j);
                       }
                     }
                     float* own = target + plane * op.height.input * width;
                     for (int32_t i = 0; i < op.height.input; ++i) {
                       for (int32_t j = 0; j < width; ++j) {
                         own[int64_t{i} * width + j] =
                             plane_gradient(op, rows.data(), i, j);
                       }
                     }
                   }
                 });
  });
}

}  // namespace cpu
}  // namespace mmactnn
