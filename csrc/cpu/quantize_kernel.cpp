#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/allocate.h"
#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/tensor_checks.h"
#include "codes.h"
#include "group.h"
#include "number.h"

namespace mmactnn {
namespace {

template <typename T>
void quantize_groups(const T* input, uint8_t* codes, uint32_t* ranges,
                     const Geometry& geometry, const CodeLayout& layout,
                     PhiloxStream stream, int64_t begin, int64_t end) {
  float values[kMaxGroup];
  uint16_t random[kMaxGroup];
  uint8_t unpacked[kMaxGroup];
  for (int64_t index = begin; index < end; ++index) {
    const Group group = locate(geometry, index);
    const RowCodes row = layout.row<kAnyBits>(group.row);
    if (row.bits == 0) continue;
    const uint32_t max_code = max_code_of(row.bits);
    const int64_t count = group.count;
    const int64_t row_block = group.start / kBlock;
    // All but the last group of a row are whole, and a row is padded by less
    // than a group.
    const int64_t stored = std::min<int64_t>(geometry.group_size / kBlock,
                                             layout.row_blocks - row_block);
    load_group(input, geometry, group, values);
    const Range range = make_range(find_extent(values, count), max_code);
    ranges[index] = range.pack();
    if (range.special()) {
      for (int64_t i = 0; i < count; ++i) {
        unpacked[i] =
            static_cast<uint8_t>(encode_special(values[i], range, max_code));
      }
    } else {
      const int64_t first_block =
          group.row * geometry.blocks_per_row() + row_block;
      random_bits(stream, static_cast<uint64_t>(first_block),
                  (count + kBlock - 1) / kBlock, geometry.group_size, random);
      const float scale = encode_scale(range, max_code);
      for (int64_t i = 0; i < count; ++i) {
        unpacked[i] = static_cast<uint8_t>(
            encode(values[i], range, scale, random[i], max_code));
      }
    }
    std::fill(unpacked + count, unpacked + stored * kBlock, uint8_t{0});
    dispatch_bits(row.bits, [&](auto width) {
      pack_codes<decltype(width)::value>(
          unpacked, stored, codes + row.begin + row_block * row.bits);
    });
  }
}

template <typename T>
void dequantize_groups(const uint8_t* codes, const uint32_t* ranges, T* output,
                       const Geometry& geometry, const CodeLayout& layout,
                       int64_t begin, int64_t end) {
  const float largest = Largest<T>::value;
  uint8_t unpacked[kMaxGroup];
  for (int64_t index = begin; index < end; ++index) {
    const Group group = locate(geometry, index);
    const RowCodes row = layout.row<kAnyBits>(group.row);
    if (row.bits == 0) continue;
    const uint32_t max_code = max_code_of(row.bits);
    const int64_t blocks = (group.count + kBlock - 1) / kBlock;
    dispatch_bits(row.bits, [&](auto width) {
      unpack_codes<decltype(width)::value>(
          codes + row.begin + group.start / kBlock * row.bits, blocks,
          unpacked);
    });
    T* target = output + group.row * geometry.row_numel + group.start;
    const Range range = Range::unpack(ranges[index]);
    for (int64_t i = 0; i < group.count; ++i) {
      const float value =
          range.special() ? decode_special(unpacked[i], range, max_code)
                          : clamp_finite(decode(unpacked[i], range), largest);
      target[i] = static_cast<T>(value);
    }
  }
}

Tensor quantize_into(const Tensor& input, Tensor& codes,
                     const Geometry& geometry, const CodeLayout& layout,
                     const CountedStream& random) {
  Tensor ranges = empty_ranges(input, geometry);
  const PhiloxStream stream = random.current();
  auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* range_words = static_cast<uint32_t*>(ranges.mutable_data_ptr());
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    torch::stable::parallel_for(
        0, geometry.groups(), kGrainElements / geometry.group_size,
        [&](int64_t begin, int64_t end) {
          quantize_groups(source, code_bytes, range_words, geometry, layout,
                          stream, begin, end);
        });
  });
  return ranges;
}

Tensor dequantize_from(const Tensor& codes, const Tensor& ranges,
                       const std::vector<int64_t>& size,
                       const std::vector<int64_t>& stride, ScalarType dtype,
                       const Geometry& geometry, const CodeLayout& layout) {
  Tensor output = empty_strided(codes, size, stride, dtype);
  check_dtype("dtype", output);
  check_dense("the output", output);
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* range_words =
      static_cast<const uint32_t*>(ranges.const_data_ptr());
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    torch::stable::parallel_for(
        0, geometry.groups(), kGrainElements / geometry.group_size,
        [&](int64_t begin, int64_t end) {
          dequantize_groups(code_bytes, range_words, target, geometry, layout,
                            begin, end);
        });
  });
  return output;
}

std::tuple<Tensor, Tensor> quantize(Tensor input, int64_t bits,
                                    int64_t group_size, int64_t seed,
                                    int64_t offset,
                                    std::optional<Tensor> count) {
  const Geometry geometry = input_geometry(input, group_size);
  check_bits(bits);
  const CountedStream random = checked_stream(seed, offset, count, input);
  Tensor codes = empty_codes(input, geometry, bits);
  Tensor ranges = quantize_into(input, codes, geometry,
                                uniform_layout(geometry, bits), random);
  return {codes, ranges};
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor input, Tensor row_bits,
                                         Tensor row_starts, int64_t total_bits,
                                         int64_t group_size, int64_t seed,
                                         int64_t offset,
                                         std::optional<Tensor> count) {
  const Geometry geometry = input_geometry(input, group_size);
  check_total_bits(total_bits, geometry.rows);
  const CodeLayout layout =
      checked_row_layout(input, geometry, row_bits, row_starts, total_bits);
  const CountedStream random = checked_stream(seed, offset, count, input);
  Tensor codes = empty_row_codes(input, geometry, total_bits);
  Tensor ranges = quantize_into(input, codes, geometry, layout, random);
  return {codes, ranges};
}

Tensor dequantize(Tensor codes, Tensor ranges, std::vector<int64_t> size,
                  std::vector<int64_t> stride, ScalarType dtype, int64_t bits,
                  int64_t group_size) {
  const Geometry geometry = output_geometry(ranges, size, group_size);
  return dequantize_from(codes, ranges, size, stride, dtype, geometry,
                         checked_layout(codes, geometry, bits));
}

Tensor dequantize_rows(Tensor codes, Tensor ranges, Tensor row_bits,
                       Tensor row_starts, std::vector<int64_t> size,
                       std::vector<int64_t> stride, ScalarType dtype,
                       int64_t group_size) {
  const Geometry geometry = output_geometry(ranges, size, group_size);
  return dequantize_from(
      codes, ranges, size, stride, dtype, geometry,
      checked_row_layout_of(codes, geometry, row_bits, row_starts));
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("quantize", TORCH_BOX(&mmactnn::quantize));
  m.impl("quantize_rows", TORCH_BOX(&mmactnn::quantize_rows));
  m.impl("dequantize", TORCH_BOX(&mmactnn::dequantize));
  m.impl("dequantize_rows", TORCH_BOX(&mmactnn::dequantize_rows));
}
