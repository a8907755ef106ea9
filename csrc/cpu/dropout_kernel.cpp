
#include <cstdint>

#include "../common/dropout.h"
#include "blocks.h"
#include "number.h"

namespace mmactnn {
namespace cpu {

void dropout(const Memory& input, const Memory& output,
             const Dropout& dropout) {
  const PhiloxStream stream = dropout.stream.current();
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_block(
        static_cast<const T*>(input.const_data_ptr()),
        static_cast<T*>(output.mutable_data_ptr()), input.numel(),
        [&](int64_t block, const T* source, T* target, int64_t count) {
          const PhiloxBlock random =
              philox(stream, static_cast<uint64_t>(block));
          for (int64_t i = 0; i < count; ++i) {
            const float factor =
                dropout.factor(random.bits16(static_cast<int>(i)));
            target[i] = T(multiply(static_cast<float>(source[i]), factor));
          }
        });
  });
}

}  // namespace cpu
}  // namespace mmactnn
