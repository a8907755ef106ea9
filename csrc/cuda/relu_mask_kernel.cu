#include "../common/rectifier.h"
#include "blocks.h"
#include "launch.h"

namespace mmactnn {
namespace {

template <typename T>
struct Forward {
  Rectifier rectifier;
  uint8_t* mask;

  __device__ __forceinline__ void operator()(int64_t block, T* values) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float value = Number<T>::load(values[i]);
      const bool keep = rectifier.keep(value);
      bits |= static_cast<uint32_t>(keep) << i;
      if (!keep) values[i] = Number<T>::store(rectifier.rest(value));
    }
    // Elements past the end are 0, which no rectifier keeps.
    mask[block] = static_cast<uint8_t>(bits);
  }
};

template <typename T>
struct Backward {
  Rectifier rectifier;
  const uint8_t* mask;

  __device__ __forceinline__ void operator()(int64_t block, T* values) const {
    const uint32_t bits = mask[block];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (!((bits >> i) & 1u)) {
        const float grad = Number<T>::load(values[i]);
        values[i] = Number<T>::store(rectifier.rest_gradient(grad));
      }
    }
  }
};

}  // namespace

namespace cuda {

void relu_mask(const Memory& input, const Memory& output, const Memory& mask,
               const Rectifier& rectifier) {
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    map_blocks(
        static_cast<const T*>(input.const_data_ptr()),
        static_cast<T*>(output.mutable_data_ptr()), input.numel(),
        Forward<T>{rectifier, static_cast<uint8_t*>(mask.mutable_data_ptr())},
        current_stream());
  });
}

void relu_mask_backward(const Memory& grad_output, const Memory& mask,
                        const Memory& grad_input, const Rectifier& rectifier) {
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    map_blocks(static_cast<const T*>(grad_output.const_data_ptr()),
               static_cast<T*>(grad_input.mutable_data_ptr()),
               grad_output.numel(),
               Backward<T>{rectifier,
                           static_cast<const uint8_t*>(mask.const_data_ptr())},
               current_stream());
  });
}

}  // namespace cuda
}  // namespace mmactnn
