#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/resized_loss.h"
#include "allocate.h"
#include "registration.h"

namespace mmactnn {

// Logits; losses, logarithms of sums and hits, an element a pixel.
MMACTNN_KERNEL(resized_cross_entropy, const Memory&, const ResizedLoss&,
               const Memory&, const Memory&, const Memory&);
// Logits, logarithms of sums, factors of pixels and gradient of the logits.
MMACTNN_KERNEL(resized_cross_entropy_backward, const Memory&,
               const ResizedLoss&, const Memory&, const Memory&, const Memory&);

namespace {

constexpr int64_t kMaxPixels = INT64_C(0x7FFFFFFF);

void check_pixels(const char* name, const Tensor& tensor,
                  const Tensor& labels) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
          tensor.dim() == 3 && tensor.size(0) == labels.size(0) &&
          tensor.size(1) == labels.size(1) && tensor.size(2) == labels.size(2),
      name, " must be a contiguous float32 tensor of the labels' shape");
  check_same_device(name, tensor, labels);
}

ResizedLoss check_arguments(const Tensor& logits, const Tensor& labels,
                            const std::optional<Tensor>& class_weight,
                            bool align_corners, int64_t ignore_index) {
  check_dtype("logits", logits);
  STD_TORCH_CHECK(logits.dim() == 4 && logits.size(1) > 0 &&
                      logits.size(2) > 0 && logits.size(3) > 0,
                  "logits must be of shape [N, C, h, w] with at least one "
                  "class and pixel");
  const ScalarType dtype = labels.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Byte,
                  "labels must be int64 or uint8, got scalar type ",
                  static_cast<int>(dtype));
  STD_TORCH_CHECK(labels.dim() == 3 && labels.is_contiguous() &&
                      labels.size(0) == logits.size(0) && labels.size(1) > 0 &&
                      labels.size(2) > 0,
                  "labels must be contiguous, of shape [N, H, W] with the N "
                  "of the logits and at least one pixel");
  check_same_device("labels", labels, logits);
  STD_TORCH_CHECK(labels.size(1) * labels.size(2) <= kMaxPixels &&
                      labels.size(1) * logits.size(3) <= kMaxPixels &&
                      logits.size(2) * logits.size(3) <= kMaxPixels,
                  "an image may have at most ", kMaxPixels, " pixels");
  const float* weights = nullptr;
  if (class_weight) {
    STD_TORCH_CHECK(class_weight->scalar_type() == ScalarType::Float &&
                        class_weight->is_contiguous() &&
                        class_weight->dim() == 1 &&
                        class_weight->size(0) == logits.size(1),
                    "class_weight must be a contiguous float32 tensor of "
                    "shape [",
                    logits.size(1), "]");
    check_same_device("class_weight", *class_weight, logits);
    weights = static_cast<const float*>(class_weight->const_data_ptr());
  }
  return {{logits.size(0), logits.size(1), logits.stride(0), logits.stride(1),
           logits.stride(2), logits.stride(3)},
          ResizedAxis::of(logits.size(2), labels.size(1), align_corners),
          ResizedAxis::of(logits.size(3), labels.size(2), align_corners),
          {labels.const_data_ptr(), dtype == ScalarType::Byte},
          weights,
          ignore_index};
}

std::tuple<Tensor, Tensor, Tensor> resized_cross_entropy(
    Tensor logits, Tensor labels, std::optional<Tensor> class_weight,
    bool align_corners, int64_t ignore_index) {
  const ResizedLoss op = check_arguments(logits, labels, class_weight,
                                         align_corners, ignore_index);
  const auto make = [&](ScalarType dtype) {
    return empty(logits, {labels.size(0), labels.size(1), labels.size(2)},
                 dtype);
  };
  const Tensor losses = make(ScalarType::Float);
  const Tensor log_sums = make(ScalarType::Float);
  const Tensor hits = make(ScalarType::Byte);
  if (labels.numel() != 0) {
    OnDevice(logits).run(resized_cross_entropy_kernel, logits, op, losses,
                         log_sums, hits);
  }
  return {losses, log_sums, hits};
}

Tensor resized_cross_entropy_backward(Tensor logits, Tensor labels,
                                      Tensor log_sums,
                                      std::optional<Tensor> class_weight,
                                      std::optional<Tensor> scale,
                                      bool align_corners,
                                      int64_t ignore_index) {
  const ResizedLoss op = check_arguments(logits, labels, class_weight,
                                         align_corners, ignore_index);
  check_pixels("log_sums", log_sums, labels);
  if (scale) check_pixels("scale", *scale, labels);
  const Tensor gradient = empty(
      logits, {logits.size(0), logits.size(1), logits.size(2), logits.size(3)},
      ScalarType::Float);
  if (gradient.numel() != 0) {
    OnDevice(logits).run(resized_cross_entropy_backward_kernel, logits, op,
                         log_sums, scale, gradient);
  }
  return gradient;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "resized_cross_entropy(Tensor logits, Tensor labels, "
      "Tensor? class_weight, bool align_corners, int ignore_index) -> "
      "(Tensor losses, Tensor log_sums, Tensor hits)");
  m.def(
      "resized_cross_entropy_backward(Tensor logits, Tensor labels, "
      "Tensor log_sums, Tensor? class_weight, Tensor? scale, "
      "bool align_corners, int ignore_index) -> Tensor");
}

MMACTNN_IMPL(m) {
  m.impl("resized_cross_entropy", TORCH_BOX(&mmactnn::resized_cross_entropy));
  m.impl("resized_cross_entropy_backward",
         TORCH_BOX(&mmactnn::resized_cross_entropy_backward));
}
