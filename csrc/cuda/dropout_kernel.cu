#include "../common/dropout.h"
#include "blocks.h"
#include "launch.h"

namespace mmactnn {
namespace {

template <typename T>
struct Drop {
  Dropout dropout;

  __device__ __forceinline__ void operator()(int64_t block, T* values) const {
    const PhiloxBlock random =
        philox(dropout.stream.current(), static_cast<uint64_t>(block));
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float factor = dropout.factor(random.bits16(i));
      values[i] =
          Number<T>::store(multiply(Number<T>::load(values[i]), factor));
    }
  }
};

}  // namespace

namespace cuda {

void dropout(const Memory& input, const Memory& output,
             const Dropout& dropout) {
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    map_blocks(static_cast<const T*>(input.const_data_ptr()),
               static_cast<T*>(output.mutable_data_ptr()), input.numel(),
               Drop<T>{dropout}, current_stream());
  });
}

}  // namespace cuda
}  // namespace mmactnn
