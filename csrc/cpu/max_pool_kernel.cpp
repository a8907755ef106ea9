
#include <algorithm>
#include <cstdint>

#include "../common/pool.h"
#include "number.h"
#include "parallel.h"

namespace mmactnn {
namespace {

constexpr int64_t kGrainOutputs = 8192;

// Location of an element in a tensor [outer, height, width, inner].
struct Place {
  int64_t outer;
  int32_t row;
  int32_t column;
  int64_t inner;

  Place(int64_t index, int32_t height, int32_t width, int64_t channels) {
    inner = index % channels;
    index /= channels;
    column = static_cast<int32_t>(index % width);
    index /= width;
    row = static_cast<int32_t>(index % height);
    outer = index / height;
  }
};

template <typename T>
void pool_bytes(const T* input, T* output, uint8_t* indices, const Pool& pool,
                int64_t numel, int64_t begin, int64_t end) {
  for (int64_t byte = begin; byte < end; ++byte) {
    uint32_t taps = 0;
    const int64_t count = std::min<int64_t>(2, numel - 2 * byte);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = 2 * byte + i;
      const Place at(index, pool.height.output, pool.width.output, pool.inner);
      const auto maximum = find_maximum<T, HostNumber<T>, int64_t>(
          input + at.outer * pool.input_plane() + at.inner, pool, at.row,
          at.column);
      output[index] = maximum.value;
      taps |= maximum.tap << (4 * i);
    }
    indices[byte] = static_cast<uint8_t>(taps);
  }
}

template <typename T>
void gather_elements(const T* grad_output, const uint8_t* indices,
                     T* grad_input, const Pool& pool, int64_t begin,
                     int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Place at(index, pool.height.input, pool.width.input, pool.inner);
    grad_input[index] = gather_gradient<T, HostNumber<T>, int64_t>(
        grad_output, indices, pool, at.outer * pool.output_plane() + at.inner,
        at.row, at.column);
  }
}

}  // namespace

namespace cpu {

void max_pool2d(const Memory& input, const Memory& output,
                const Memory& indices, const Pool& pool) {
  const int64_t numel = output.numel();
  auto* index_bytes = static_cast<uint8_t*>(indices.mutable_data_ptr());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    parallel_for(
        indices.numel(), kGrainOutputs / 2, [&](int64_t begin, int64_t end) {
          pool_bytes(source, target, index_bytes, pool, numel, begin, end);
        });
  });
}

void max_pool2d_backward(const Memory& grad_output, const Memory& indices,
                         const Memory& grad_input, const Pool& pool) {
  const auto* index_bytes =
      static_cast<const uint8_t*>(indices.const_data_ptr());
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    parallel_for(
        grad_input.numel(), kGrainOutputs, [&](int64_t begin, int64_t end) {
          gather_elements(source, index_bytes, target, pool, begin, end);
        });
  });
}

}  // namespace cpu
}  // namespace mmactnn
