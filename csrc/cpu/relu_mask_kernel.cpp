
#include <cstdint>

#include "../common/rectifier.h"
#include "blocks.h"
#include "number.h"

namespace mmactnn {
namespace cpu {

void relu_mask(const Memory& input, const Memory& output, const Memory& mask,
               const Rectifier& rectifier) {
  auto* mask_bytes = static_cast<uint8_t*>(mask.mutable_data_ptr());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_block(
        static_cast<const T*>(input.const_data_ptr()),
        static_cast<T*>(output.mutable_data_ptr()), input.numel(),
        [&](int64_t block, const T* source, T* target, int64_t count) {
          uint32_t bits = 0;
          for (int64_t i = 0; i < count; ++i) {
            const float value = static_cast<float>(source[i]);
            const bool keep = rectifier.keep(value);
            bits |= static_cast<uint32_t>(keep) << i;
            target[i] = keep ? source[i] : T(rectifier.rest(value));
          }
          mask_bytes[block] = static_cast<uint8_t>(bits);
        });
  });
}

void relu_mask_backward(const Memory& grad_output, const Memory& mask,
                        const Memory& grad_input, const Rectifier& rectifier) {
  const auto* mask_bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_block(
        static_cast<const T*>(grad_output.const_data_ptr()),
        static_cast<T*>(grad_input.mutable_data_ptr()), grad_output.numel(),
        [&](int64_t block, const T* source, T* target, int64_t count) {
          for (int64_t i = 0; i < count; ++i) {
            const bool keep = (mask_bytes[block] >> i) & 1u;
            target[i] =
                keep
                    ? source[i]
                    : T(rectifier.rest_gradient(static_cast<float>(source[i])));
          }
        });
  });
}

}  // namespace cpu
}  // namespace mmactnn
