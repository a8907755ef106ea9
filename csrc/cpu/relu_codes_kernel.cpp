#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/allocate.h"
#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/rectified_checks.h"
#include "../common/rectified_codec.h"
#include "../common/tensor_checks.h"
#include "codes.h"
#include "group.h"
#include "kinds.h"
#include "number.h"

namespace mmactnn {
namespace {

// `output` may be `input`.
template <typename T>
void rectify_groups(const T* input, T* output, uint8_t* codes, uint32_t* ranges,
                    const Geometry& geometry, int bits, PhiloxStream stream,
                    int64_t begin, int64_t end) {
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
    random_bits(stream, static_cast<uint64_t>(first_block(geometry, group)),
                (group.count + kBlock - 1) / kBlock, geometry.group_size,
                random);
    ranges[index] =
        encode_zeroed(values, positive, group.count, bits, random, unpacked)
            .pack();
    store_group(unpacked, geometry, group, bits, codes);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, Tensor& output,
                                   int64_t bits, int64_t group_size,
                                   const CountedStream& random) {
  const Geometry geometry = input_geometry(input, group_size);
  check_rectified_bits("bits", bits);
  Tensor codes = empty_codes(input, geometry, bits);
  Tensor ranges = empty_ranges(input, geometry);
  const PhiloxStream stream = random.current();
  auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* range_words = static_cast<uint32_t*>(ranges.mutable_data_ptr());
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    torch::stable::parallel_for(
        0, geometry.groups(), kGrainElements / geometry.group_size,
        [&](int64_t begin, int64_t end) {
          rectify_groups(source, target, code_bytes, range_words, geometry,
                         static_cast<int>(bits), stream, begin, end);
        });
  });
  return {codes, ranges};
}

std::tuple<Tensor, Tensor, Tensor> relu_codes(Tensor input, int64_t bits,
                                              int64_t group_size, int64_t seed,
                                              int64_t offset,
                                              std::optional<Tensor> count) {
  Tensor output = empty_dense_like(input);
  const auto [codes, ranges] =
      forward(input, output, bits, group_size,
              checked_stream(seed, offset, count, input));
  return {output, codes, ranges};
}

std::tuple<Tensor, Tensor> relu_codes_(Tensor input, int64_t bits,
                                       int64_t group_size, int64_t seed,
                                       int64_t offset,
                                       std::optional<Tensor> count) {
  return forward(input, input, bits, group_size,
                 checked_stream(seed, offset, count, input));
}

Tensor relu_codes_backward(Tensor grad_output, Tensor codes, int64_t bits) {
  const Geometry geometry = check_zeroed_codes(grad_output, codes, bits);
  Tensor grad_input = empty_dense_like(grad_output);
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  dispatch_dtype(grad_output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    for_each_group(
        code_bytes, geometry, static_cast<int>(bits),
        [&](int64_t, const Group& group, const uint8_t* unpacked) {
          const int64_t base = group.row * geometry.row_numel + group.start;
          for (int64_t i = 0; i < group.count; ++i) {
            target[base + i] =
                unpacked[i] != 0 ? source[base + i] : static_cast<T>(0.0f);
          }
        });
  });
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("relu_codes", TORCH_BOX(&mmactnn::relu_codes));
  m.impl("relu_codes_", TORCH_BOX(&mmactnn::relu_codes_));
  m.impl("relu_codes_backward", TORCH_BOX(&mmactnn::relu_codes_backward));
}
