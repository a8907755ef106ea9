#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/allocate.h"
#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/tensor_checks.h"
#include "number.h"

namespace mmactnn {
namespace {

constexpr int64_t kMaxGroup = 512;
constexpr int64_t kMaxGroupBlocks = kMaxGroup / kBlock;
constexpr int64_t kGrainElements = 32768;

// The 16 random bits of each element of `count` consecutive blocks. Blocks
// lie side by side in every step, so that the compiler can vectorise it.
void random_bits(PhiloxStream stream, uint64_t first_block, int64_t count,
                 uint16_t* random) {
  PhiloxBlock blocks[kMaxGroupBlocks];
  for (int64_t b = 0; b < count; ++b) {
    blocks[b] = philox(stream, first_block + static_cast<uint64_t>(b));
  }
  for (int64_t b = 0; b < count; ++b) {
    for (int i = 0; i < kBlock; ++i) {
      random[b * kBlock + i] = static_cast<uint16_t>(blocks[b].bits16(i));
    }
  }
}

Range find_range(const float* values, int64_t count, uint32_t max_code) {
  float low = FLT_MAX, high = -FLT_MAX, poison = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
    poison += values[i] * 0.0f;  // NaN as soon as one value is not finite
  }
  const bool all_finite = !is_nan(poison);
  if (!all_finite) {
    low = FLT_MAX;
    high = -FLT_MAX;
    for (int64_t i = 0; i < count; ++i) {
      if (is_finite(values[i])) {
        low = std::min(low, values[i]);
        high = std::max(high, values[i]);
      }
    }
  }
  return make_range(low, high, all_finite, max_code);
}

template <int kBits>
void pack_codes(const uint8_t* codes, int64_t blocks, uint8_t* packed) {
  constexpr int kPerByte = 8 / kBits;
  for (int64_t byte = 0; byte < blocks * kBits; ++byte) {
    uint32_t value = 0;
    for (int i = 0; i < kPerByte; ++i) {
      value |= static_cast<uint32_t>(codes[byte * kPerByte + i]) << (i * kBits);
    }
    packed[byte] = static_cast<uint8_t>(value);
  }
}

template <typename T, int kBits>
void quantize_groups(const T* input, uint8_t* codes, uint32_t* ranges,
                     const Geometry& geometry, PhiloxStream stream,
                     int64_t begin, int64_t end) {
  constexpr uint32_t kMaxCode = CodeTraits<kBits>::kMaxCode;
  const int64_t groups_per_row = geometry.groups_per_row();
  float values[kMaxGroup];
  uint16_t random[kMaxGroup];
  uint8_t unpacked[kMaxGroup];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / groups_per_row;
    const int64_t start = (index % groups_per_row) * geometry.group_size;
    const int64_t count =
        std::min(geometry.group_size, geometry.row_numel - start);
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    const int64_t first_block =
        row * geometry.blocks_per_row() + start / kBlock;
    const T* source = input + row * geometry.row_numel + start;
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<float>(source[i]);
    }
    const Range range = find_range(values, count, kMaxCode);
    ranges[index] = range.pack();
    if (range.special()) {
      for (int64_t i = 0; i < count; ++i) {
        unpacked[i] =
            static_cast<uint8_t>(encode_special(values[i], range, kMaxCode));
      }
    } else {
      random_bits(stream, static_cast<uint64_t>(first_block), blocks, random);
      const float scale = encode_scale(range);
      for (int64_t i = 0; i < count; ++i) {
        unpacked[i] = static_cast<uint8_t>(
            encode(values[i], range, scale, random[i], kMaxCode));
      }
    }
    std::fill(unpacked + count, unpacked + blocks * kBlock, uint8_t{0});
    pack_codes<kBits>(unpacked, blocks, codes + first_block * kBits);
  }
}

template <typename T, int kBits>
void dequantize_groups(const uint8_t* codes, const uint32_t* ranges, T* output,
                       const Geometry& geometry, int64_t begin, int64_t end) {
  constexpr uint32_t kMaxCode = CodeTraits<kBits>::kMaxCode;
  constexpr int kPerByte = 8 / kBits;
  const float largest = Largest<T>::value;
  const int64_t groups_per_row = geometry.groups_per_row();
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / groups_per_row;
    const int64_t start = (index % groups_per_row) * geometry.group_size;
    const int64_t count =
        std::min(geometry.group_size, geometry.row_numel - start);
    const uint8_t* packed =
        codes + (row * geometry.blocks_per_row() + start / kBlock) * kBits;
    T* target = output + row * geometry.row_numel + start;
    const Range range = Range::unpack(ranges[index]);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t code =
          (packed[i / kPerByte] >> ((i % kPerByte) * kBits)) & kMaxCode;
      const float value = range.special()
                              ? decode_special(code, range, kMaxCode)
                              : clamp_finite(decode(code, range), largest);
      target[i] = static_cast<T>(value);
    }
  }
}

std::tuple<Tensor, Tensor> quantize(Tensor input, int64_t bits,
                                    int64_t group_size, int64_t seed,
                                    int64_t offset) {
  const Geometry geometry = quantize_geometry(input, bits, group_size);
  Tensor codes = empty_codes(input, geometry);
  Tensor ranges = empty_ranges(input, geometry);
  const PhiloxStream stream{static_cast<uint64_t>(seed),
                            static_cast<uint64_t>(offset)};
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
    auto* range_words = static_cast<uint32_t*>(ranges.mutable_data_ptr());
    dispatch_bits(bits, [&](auto width) {
      torch::stable::parallel_for(
          0, geometry.groups(), kGrainElements / group_size,
          [&](int64_t begin, int64_t end) {
            quantize_groups<T, decltype(width)::value>(
                source, code_bytes, range_words, geometry, stream, begin, end);
          });
    });
  });
  return {codes, ranges};
}

Tensor dequantize(Tensor codes, Tensor ranges, std::vector<int64_t> size,
                  std::vector<int64_t> stride, ScalarType dtype, int64_t bits,
                  int64_t group_size) {
  const Geometry geometry =
      dequantize_geometry(codes, ranges, size, bits, group_size);
  Tensor output = empty_strided(codes, size, stride, dtype);
  check_dtype("dtype", output);
  check_dense("the output", output);
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* range_words =
      static_cast<const uint32_t*>(ranges.const_data_ptr());
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    dispatch_bits(bits, [&](auto width) {
      torch::stable::parallel_for(
          0, geometry.groups(), kGrainElements / group_size,
          [&](int64_t begin, int64_t end) {
            dequantize_groups<T, decltype(width)::value>(
                code_bytes, range_words, target, geometry, begin, end);
          });
    });
  });
  return output;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("quantize", TORCH_BOX(&mmactnn::quantize));
  m.impl("dequantize", TORCH_BOX(&mmactnn::dequantize));
}
