#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/allocate.h"
#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/tensor_checks.h"
#include "group.h"
#include "launch.h"
#include "words.h"

namespace mmactnn {
namespace {

// Calls `body` with the width as a Constant: kBits where it is known.
template <int kBits, typename Body>
__device__ __forceinline__ void with_width(int bits, const Body& body) {
  if constexpr (kBits != kAnyBits) {
    body(Constant<kBits>{});
  } else {
    dispatch_bits(bits, body);
  }
}

// Writes the codes of a block; those from `count` on are 0.
template <int kBits>
__device__ __forceinline__ void store_codes(const uint32_t* code, int count,
                                            uint8_t* target) {
  using Word = UnsignedInt<kBits>;
  using Unit = UnitOf<kBits>;
  Word word = 0;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    word |= static_cast<Word>(code[i]) << (i * kBits);
  }
  if (count < kBlock) {
    word &= static_cast<Word>((uint64_t{1} << (max(count, 0) * kBits)) - 1);
  }
#pragma unroll
  for (int byte = 0; byte < kBits; byte += sizeof(Unit)) {
    *reinterpret_cast<Unit*>(target + byte) =
        static_cast<Unit>(word >> (8 * byte));
  }
}

// The width is kBits or, with kAnyBits, what the layout says: one kernel of
// that kind serves the widths that need no speed, and rows of several widths.
template <typename T, int kBits, int kGroup>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ input, uint8_t* __restrict__ codes,
                    uint32_t* __restrict__ ranges, Launch launch,
                    CodeLayout layout, PhiloxStream stream,
                    uint64_t first_block) {
  constexpr int kLanes = kLanesPerGroup<kGroup>;

  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = thread / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool inside = index < launch.groups;
  const Group group = locate<kGroup>(launch, inside ? index : 0);
  const RowCodes row = layout.row<kBits>(group.row);
  // Whole warps stay: load_group() names every lane of the warp.
  const bool active = inside && row.bits != 0;
  Share share;
  const Extent extent =
      load_group<kGroup>(input + group.row * launch.row_numel + group.start,
                         group.count, lane, active, launch.vectorized, share);
  if (!active) return;

  const uint32_t max_code = max_code_of(row.bits);
  const Range range = make_range(extent, max_code);
  if (lane == 0) ranges[index] = range.pack();
  const float scale = encode_scale(range);
  const int64_t group_block = group.start / kBlock;
  const uint64_t random_block =
      first_block +
      static_cast<uint64_t>(group.row * launch.row_blocks + group_block);
  uint8_t* target = codes + row.begin + group_block * row.bits;
  // Only rows of several widths are padded, and by less than a group.
  const int padding =
      kBits != kAnyBits
          ? 0
          : static_cast<int>(layout.row_blocks - launch.row_blocks) * kBlock;
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    const int count = share.counts[b];
    if (count + padding <= 0) continue;
    const int block = b * kLanes + lane;
    uint32_t code[kBlock] = {};
    if (count > 0) {
      if (range.special()) {
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
          code[i] = encode_special(share.values[b][i], range, max_code);
        }
      } else {
        const PhiloxBlock random = philox(stream, random_block + block);
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
          code[i] = encode(share.values[b][i], range, scale, random.bits16(i),
                           max_code);
        }
      }
    }
    with_width<kBits>(row.bits, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      store_codes<kWidth>(code, count, target + block * kWidth);
    });
  }
}

// Elements that a thread writes at once, and the threads that share a group.
template <typename T>
constexpr int kItemsPerStep = 16 / sizeof(T);

template <typename T, int kGroup>
constexpr int kLanesPerStep = std::min<int>(kGroup / kItemsPerStep<T>, kWarp);

// Decodes what one thread holds of a group: kItems elements a step, written as
// one word of 16 bytes.
template <typename T, int kBits, int kGroup>
__device__ __forceinline__ void decode_group(const uint8_t* source, Range range,
                                             int count, int lane,
                                             bool vectorized, T* target) {
  constexpr int kItems = kItemsPerStep<T>;
  constexpr int kLanes = kLanesPerStep<T, kGroup>;
  constexpr int kSteps = kGroup / kItems / kLanes;
  // The items begin inside of a byte unless they fill whole ones.
  constexpr int kLeftBits = kItems * kBits % 8;
  constexpr int kBytes = (kItems * kBits + kLeftBits + 7) / 8;
  using Unit = std::conditional_t<kLeftBits == 0, UnitOf<kBytes>, UnitOf<1>>;
  using Word = UnsignedInt<kBytes>;
  constexpr uint32_t kMaxCode = max_code_of(kBits);

  // All reads first: they are small, and their latency is what there is to
  // hide.
  Word words[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int begin = (s * kLanes + lane) * kItems;
    // A word ends inside of its block, and blocks are always whole.
    if (begin < count) {
      words[s] = 0;
      const uint8_t* bytes = source + begin * kBits / 8;
#pragma unroll
      for (int byte = 0; byte < kBytes; byte += sizeof(Unit)) {
        const Unit unit = *reinterpret_cast<const Unit*>(bytes + byte);
        words[s] |= static_cast<Word>(unit) << (8 * byte);
      }
      if constexpr (kLeftBits != 0) words[s] >>= begin * kBits % 8;
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int begin = (s * kLanes + lane) * kItems;
    if (begin >= count) continue;
    float values[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t code =
          static_cast<uint32_t>(words[s] >> (i * kBits)) & kMaxCode;
      values[i] = range.special()
                      ? decode_special(code, range, kMaxCode)
                      : clamp_finite(decode(code, range), Number<T>::kLargest);
    }
    if (vectorized && begin + kItems <= count) {
      store_16_bytes(target + begin, values);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (begin + i < count) {
          target[begin + i] = Number<T>::store(values[i]);
        }
      }
    }
  }
}

// Of kBits, see quantize_kernel().
template <typename T, int kBits, int kGroup>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* __restrict__ codes,
                      const uint32_t* __restrict__ ranges,
                      T* __restrict__ output, Launch launch,
                      CodeLayout layout) {
  constexpr int kLanes = kLanesPerStep<T, kGroup>;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = thread / kLanes;
  if (index >= launch.groups) return;
  const int lane = threadIdx.x % kLanes;
  const Group group = locate<kGroup>(launch, index);
  const RowCodes row = layout.row<kBits>(group.row);
  if (row.bits == 0) return;
  const Range range = Range::unpack(ranges[index]);
  const uint8_t* source = codes + row.begin + group.start / kBlock * row.bits;
  T* target = output + group.row * launch.row_numel + group.start;
  with_width<kBits>(row.bits, [&](auto width) {
    decode_group<T, decltype(width)::value, kGroup>(
        source, range, group.count, lane, launch.vectorized, target);
  });
}

// Calls `body` with the bit width (kAnyBits for those of the one kernel) and
// the group size as constants.
template <typename Body>
void dispatch_format(const Geometry& geometry, const CodeLayout& layout,
                     const Body& body) {
  dispatch_group_size(geometry.group_size, [&](auto group) {
    if (layout.bits == 1) {
      body(Constant<1>{}, group);
    } else if (layout.bits == 2) {
      body(Constant<2>{}, group);
    } else if (layout.bits == 4) {
      body(Constant<4>{}, group);
    } else if (layout.bits == 8) {
      body(Constant<8>{}, group);
    } else {
      body(Constant<kAnyBits>{}, group);
    }
  });
}

Tensor quantize_into(const Tensor& input, Tensor& codes,
                     const Geometry& geometry, CodeLayout layout, int64_t seed,
                     int64_t offset) {
  Tensor ranges = empty_ranges(input, geometry);
  if (input.numel() == 0) return ranges;
  const PhiloxStream random{static_cast<uint64_t>(seed),
                            static_cast<uint64_t>(offset)};
  const cudaStream_t stream = current_stream(input.get_device_index());
  auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* range_words = static_cast<uint32_t*>(ranges.mutable_data_ptr());
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    dispatch_format(geometry, layout, [&](auto width, auto group) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kGroup = decltype(group)::value;
      for_each_launch(geometry, source, [&](const Launch& launch, int64_t row) {
        layout.first_row = row;
        quantize_kernel<T, kBits, kGroup>
            <<<grid_size(launch.groups, kLanesPerGroup<kGroup>), kThreads, 0,
               stream>>>(source + row * geometry.row_numel, code_bytes,
                         range_words + row * geometry.groups_per_row(), launch,
                         layout, random,
                         static_cast<uint64_t>(row * launch.row_blocks));
        check_launch();
      });
    });
  });
  return ranges;
}

Tensor dequantize_from(const Tensor& codes, const Tensor& ranges,
                       const std::vector<int64_t>& size,
                       const std::vector<int64_t>& stride, ScalarType dtype,
                       const Geometry& geometry, CodeLayout layout) {
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  Tensor output = empty_strided(codes, size, stride, dtype);
  check_dtype("dtype", output);
  check_dense("the output", output);
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(codes.get_device_index());
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* range_words =
      static_cast<const uint32_t*>(ranges.const_data_ptr());
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    dispatch_format(geometry, layout, [&](auto width, auto group) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kGroup = decltype(group)::value;
      for_each_launch(geometry, target, [&](const Launch& launch, int64_t row) {
        layout.first_row = row;
        dequantize_kernel<T, kBits, kGroup>
            <<<grid_size(launch.groups, kLanesPerStep<T, kGroup>), kThreads, 0,
               stream>>>(code_bytes,
                         range_words + row * geometry.groups_per_row(),
                         target + row * geometry.row_numel, launch, layout);
        check_launch();
      });
    });
  });
  return output;
}

std::tuple<Tensor, Tensor> quantize(Tensor input, int64_t bits,
                                    int64_t group_size, int64_t seed,
                                    int64_t offset) {
  const Geometry geometry = input_geometry(input, group_size);
  check_bits(bits);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor codes = empty_codes(input, geometry, bits);
  Tensor ranges = quantize_into(input, codes, geometry,
                                uniform_layout(geometry, bits), seed, offset);
  return {codes, ranges};
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor input, Tensor row_bits,
                                         Tensor row_starts, int64_t total_bits,
                                         int64_t group_size, int64_t seed,
                                         int64_t offset) {
  const Geometry geometry = input_geometry(input, group_size);
  check_total_bits(total_bits, geometry.rows);
  const CodeLayout layout =
      checked_row_layout(input, geometry, row_bits, row_starts, total_bits);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor codes = empty_row_codes(input, geometry, total_bits);
  Tensor ranges = quantize_into(input, codes, geometry, layout, seed, offset);
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

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&mmactnn::quantize));
  m.impl("quantize_rows", TORCH_BOX(&mmactnn::quantize_rows));
  m.impl("dequantize", TORCH_BOX(&mmactnn::dequantize));
  m.impl("dequantize_rows", TORCH_BOX(&mmactnn::dequantize_rows));
}
