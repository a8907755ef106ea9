
#include <cstdint>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/random_bits.h"
#include "../common/rectified_codec.h"
#include "codes.h"
#include "group.h"
#include "kinds.h"
#include "number.h"
#include "parallel.h"
#include "rotation.h"

namespace mmactnn {
namespace {

// `output` may be `input`.
template <typename T>
void rectify_groups(const T* input, T* output, uint8_t* codes, uint32_t* ranges,
                    const Geometry& geometry, int bits,
                    const Rounding& rounding, int64_t begin, int64_t end) {
  const PairStream stream = rounding.random.current_pair();
  const bool rotated = rounding.rotated && rotates_zeroed(geometry, bits);
  float values[kMaxGroup];
  bool positive[kMaxGroup];
  uint16_t random[kMaxGroup];
  uint8_t unpacked[kMaxGroup];
  for (int64_t index = begin; index < end; ++index) {
    const Group group = locate(geometry, index);
    const int64_t base = group.row * geometry.row_numel + group.start;
    for (int64_t i = 0; i < group.count; ++i) {
      const T item = input[base + i];
      values[i] = static_cast<float>(item);
      positive[i] = is_positive(values[i]);
      output[base + i] = positive[i] ? item : static_cast<T>(0.0f);
    }
    if (rotated) {
      ranges[index] =
          encode_zeroed_rotated(values, positive, stream,
                                static_cast<uint64_t>(index), bits, unpacked)
              .pack();
    } else {
      random_bits(stream, static_cast<uint64_t>(first_block(geometry, group)),
                  (group.count + kBlock - 1) / kBlock, random);
      ranges[index] =
          encode_zeroed(values, positive, group.count, bits, random, unpacked)
              .pack();
    }
    store_group(unpacked, geometry, group, bits, codes);
  }
}

}  // namespace

namespace cpu {

void relu_codes(const Memory& input, const Memory& output, const Memory& codes,
                const Memory& ranges, const Geometry& geometry, int bits,
                const Rounding& rounding) {
  auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* range_words = static_cast<uint32_t*>(ranges.mutable_data_ptr());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    parallel_for(geometry.groups(), kGrainElements / geometry.group_size,
                 [&](int64_t begin, int64_t end) {
                   rectify_groups(source, target, code_bytes, range_words,
                                  geometry, bits, rounding, begin, end);
                 });
  });
}

void relu_codes_backward(const Memory& grad_output, const Memory& codes,
                         const Memory& grad_input, const Geometry& geometry,
                         int bits, bool rotated) {
  const uint32_t passing =
      passing_bits(bits, rotated && rotates_zeroed(geometry, bits));
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    for_each_group(code_bytes, geometry, bits,
                   [&](int64_t, const Group& group, const uint8_t* unpacked) {
                     const int64_t base =
                         group.row * geometry.row_numel + group.start;
                     for (int64_t i = 0; i < group.count; ++i) {
                       target[base + i] = (unpacked[i] & passing) != 0u
                                              ? source[base + i]
                                              : static_cast<T>(0.0f);
                     }
                   });
  });
}

}  // namespace cpu
}  // namespace mmactnn
