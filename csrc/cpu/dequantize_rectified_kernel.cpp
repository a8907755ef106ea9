#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/rectified.h"
#include "codes.h"
#include "group.h"
#include "number.h"

namespace mmactnn {
namespace {

template <bool kSplit, typename T>
void decode_groups(const RectifiedCodes& source, T* output, int64_t begin,
                   int64_t end) {
  const float largest = Largest<T>::value;
  const Channels& channels = source.channels;
  const Geometry& geometry = source.geometry;
  const int bits = source.bits;
  const auto* words = static_cast<const uint32_t*>(source.ranges);
  uint8_t unpacked[kMaxGroup];
  for (int64_t index = begin; index < end; ++index) {
    const Group group = locate(geometry, index);
    const int64_t block =
        group.row * geometry.blocks_per_row() + group.start / kBlock;
    dispatch_bits(bits, [&](auto width) {
      unpack_codes<decltype(width)::value>(source.codes + block * bits,
                                           (group.count + kBlock - 1) / kBlock,
                                           unpacked);
    });
    const Range range = Range::unpack(words[kSplit ? 2 * index + 1 : index]);
    T* target = output + group.row * geometry.row_numel + group.start;
    for (int64_t i = 0; i < group.count; ++i) {
      float value;
      if constexpr (kSplit) {
        const int64_t element = group.start + i;
        const int64_t channel =
            channels.last ? element % channels.count : element / channels.plane;
        value = decode_split(
            unpacked[i], bits, range,
            source.weight == nullptr ? 1.0f : source.weight[channel],
            source.bias == nullptr ? 0.0f : source.bias[channel], largest);
      } else {
        value = decode_zeroed(unpacked[i], range, largest);
      }
      target[i] = static_cast<T>(value);
    }
  }
}

template <bool kSplit>
Tensor dequantize(const Tensor& codes, const Tensor& ranges,
                  const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias,
                  const std::vector<int64_t>& size,
                  const std::vector<int64_t>& stride, ScalarType dtype,
                  int64_t bits, int64_t group_size) {
  Tensor output = empty_strided(codes, size, stride, dtype);
  const RectifiedCodes source = check_rectified(output, codes, ranges, weight,
                                                bias, bits, group_size, kSplit);
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    torch::stable::parallel_for(
        0, output.numel() == 0 ? 0 : source.geometry.groups(),
        kGrainElements / group_size, [&](int64_t begin, int64_t end) {
          decode_groups<kSplit>(source, target, begin, end);
        });
  });
  return output;
}

Tensor dequantize_split(Tensor codes, Tensor ranges,
                        std::optional<Tensor> weight,
                        std::optional<Tensor> bias, std::vector<int64_t> size,
                        std::vector<int64_t> stride, ScalarType dtype,
                        int64_t bits, int64_t group_size) {
  return dequantize<true>(codes, ranges, weight, bias, size, stride, dtype,
                          bits, group_size);
}

Tensor dequantize_zeroed(Tensor codes, Tensor ranges, std::vector<int64_t> size,
                         std::vector<int64_t> stride, ScalarType dtype,
                         int64_t bits, int64_t group_size) {
  return dequantize<false>(codes, ranges, std::nullopt, std::nullopt, size,
                           stride, dtype, bits, group_size);
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("dequantize_split", TORCH_BOX(&mmactnn::dequantize_split));
  m.impl("dequantize_zeroed", TORCH_BOX(&mmactnn::dequantize_zeroed));
}
