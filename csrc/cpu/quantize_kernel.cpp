
#include <algorithm>
#include <cstdint>

#include "../common/codec.h"
#include "../common/dither.h"
#include "../common/geometry.h"
#include "../common/random_bits.h"
#include "codes.h"
#include "group.h"
#include "number.h"
#include "parallel.h"
#include "rotation.h"

namespace mmactnn {
namespace {

void store_blocks(const uint8_t* unpacked, int64_t first, int64_t count,
                  const RowCodes& row, uint8_t* codes) {
  pack_codes(unpacked, count, row.bits, codes + row.begin + first * row.bits);
}

template <typename T>
void quantize_groups(const T* input, uint8_t* codes, uint32_t* ranges,
                     const Geometry& geometry, const CodeLayout& layout,
                     const Rounding& rounding, int64_t begin, int64_t end) {
  const PairStream stream = rounding.random.current_pair();
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
    if (rounding.rotated && rotates(geometry, row.bits)) {
      ranges[index] =
          encode_rotated(values, nullptr, Blocked::kValue, stream,
                         static_cast<uint64_t>(index), row.bits, unpacked)
              .one_kind()
              .pack();
      store_blocks(unpacked, row_block, stored, row, codes);
      continue;
    }
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
                  (count + kBlock - 1) / kBlock, random);
      const float scale = encode_scale(range, max_code);
      for (int64_t i = 0; i < count; ++i) {
        unpacked[i] = static_cast<uint8_t>(
            encode(values[i], range, scale, random[i], max_code));
      }
    }
    std::fill(unpacked + count, unpacked + stored * kBlock, uint8_t{0});
    store_blocks(unpacked, row_block, stored, row, codes);
  }
}

template <typename T>
void dequantize_groups(const uint8_t* codes, const uint32_t* ranges, T* output,
                       const Geometry& geometry, const CodeLayout& layout,
                       const DrawnBits& drawn, int64_t begin, int64_t end) {
  const float largest = Largest<T>::value;
  const GroupDither draw(drawn, geometry);
  uint8_t unpacked[kMaxGroup];
  uint16_t random[kMaxGroup];
  for (int64_t index = begin; index < end; ++index) {
    const Group group = locate(geometry, index);
    const RowCodes row = layout.row<kAnyBits>(group.row);
    if (row.bits == 0) continue;
    const uint32_t max_code = max_code_of(row.bits);
    const int64_t blocks = (group.count + kBlock - 1) / kBlock;
    unpack_codes(codes + row.begin + group.start / kBlock * row.bits, blocks,
                 row.bits, unpacked);
    T* target = output + group.row * geometry.row_numel + group.start;
    const Range range = Range::unpack(ranges[index]);
    if (drawn.rotated && rotates(geometry, row.bits)) {
      const RotatedDecoder rotated(drawn, geometry, row.bits, true);
      int32_t multiples[kRotation];
      rotated(index, unpacked, multiples);
      for (int i = 0; i < kRotation; ++i) {
        const float value = rotated_value(multiples[i], range.step, range.low);
        target[i] = static_cast<T>(clamp_finite(value, largest));
      }
      continue;
    }
    if (range.special()) {
      for (int64_t i = 0; i < group.count; ++i) {
        target[i] =
            static_cast<T>(decode_special(unpacked[i], range, max_code));
      }
      continue;
    }
    const bool dithered = has_dither(range) && draw(group, random);
    for (int64_t i = 0; i < group.count; ++i) {
      const float value = dithered
                              ? decode_dithered(unpacked[i], random[i], range,
                                                fraction_bits(max_code))
                              : decode(unpacked[i], range);
      target[i] = static_cast<T>(clamp_finite(value, largest));
    }
  }
}

}  // namespace

namespace cpu {

void quantize(const Memory& input, const Memory& codes, const Memory& ranges,
              const Geometry& geometry, const CodeLayout& layout,
              const Rounding& rounding) {
  auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* range_words = static_cast<uint32_t*>(ranges.mutable_data_ptr());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    parallel_for(geometry.groups(), kGrainElements / geometry.group_size,
                 [&](int64_t begin, int64_t end) {
                   quantize_groups(source, code_bytes, range_words, geometry,
                                   layout, rounding, begin, end);
                 });
  });
}

void dequantize(const Memory& codes, const Memory& ranges, const Memory& output,
                const Geometry& geometry, const CodeLayout& layout,
                const DrawnBits& drawn) {
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* range_words =
      static_cast<const uint32_t*>(ranges.const_data_ptr());
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    parallel_for(geometry.groups(), kGrainElements / geometry.group_size,
                 [&](int64_t begin, int64_t end) {
                   dequantize_groups(code_bytes, range_words, target, geometry,
                                     layout, drawn, begin, end);
                 });
  });
}

}  // namespace cpu
}  // namespace mmactnn
