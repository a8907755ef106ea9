#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/allocate.h"
#include "../common/codec.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/tensor_checks.h"
#include "launch.h"

namespace mmactnn {
namespace {

// The unsigned integer that holds the codes of one block of 8 elements.
template <int kBits>
using BlockWord = std::conditional_t<
    kBits == 1, uint8_t,
    std::conditional_t<kBits == 2, uint16_t,
                       std::conditional_t<kBits == 4, uint32_t, uint64_t>>>;

// One launch covers `groups` consecutive groups from the first of a row.
struct Launch {
  int64_t row_numel;
  int64_t row_blocks;
  uint32_t groups;
  uint32_t groups_per_row;
  Divider by_groups_per_row;
  bool vectorized;  // every full block starts on a 16-byte boundary
};

struct Group {
  uint32_t row;
  int64_t start;  // its first element within the row
  int count;      // its elements: group_size, or fewer at the end of a row
};

template <int kGroup>
__device__ __forceinline__ Group locate(const Launch& launch, uint32_t index) {
  const uint32_t row = launch.by_groups_per_row.quotient(index);
  const int64_t start =
      static_cast<int64_t>(index - row * launch.groups_per_row) * kGroup;
  const int64_t left = launch.row_numel - start;
  return {row, start, left < kGroup ? static_cast<int>(left) : kGroup};
}

// Reads the 8 elements of a block; those past `count` repeat the first, so
// that they cannot widen the range.
template <typename T>
__device__ __forceinline__ void load_block(const T* source, int count,
                                           bool vectorized, float* values) {
  constexpr int kPerWord = 16 / sizeof(T);
  if (vectorized && count >= kBlock) {
#pragma unroll
    for (int w = 0; w < kBlock / kPerWord; ++w) {
      const auto word = reinterpret_cast<const Vector<T, kPerWord>*>(source)[w];
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        values[w * kPerWord + i] = Number<T>::load(word.item[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      values[i] = Number<T>::load(source[i < count ? i : 0]);
    }
  }
}

// The blocks of a group that one thread holds: the more, the less the work
// that is done once a group and thread costs each element.
constexpr int kBlocksPerThread = 4;

template <int kGroup>
constexpr int kLanesPerGroup = kGroup / kBlock / kBlocksPerThread;

template <typename T, int kBits, int kGroup>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ input, uint8_t* __restrict__ codes,
                    uint32_t* __restrict__ ranges, Launch launch,
                    PhiloxStream stream, uint64_t first_block) {
  constexpr int kLanes = kLanesPerGroup<kGroup>;
  constexpr int kBlocks = kBlocksPerThread;
  constexpr uint32_t kMaxCode = CodeTraits<kBits>::kMaxCode;

  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = thread / kLanes;
  const int lane = threadIdx.x % kLanes;
  // Whole warps stay: the reductions below name every lane of the warp.
  const bool active = index < launch.groups;
  const Group group = locate<kGroup>(launch, active ? index : 0);
  const T* source = input + group.row * launch.row_numel + group.start;

  float values[kBlocks][kBlock];
  int counts[kBlocks];
  float low = FLT_MAX, high = -FLT_MAX, poison = 0.0f;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int begin = (b * kLanes + lane) * kBlock;
    counts[b] = active ? group.count - begin : 0;
    if (counts[b] <= 0) continue;
    load_block(source + begin, counts[b], launch.vectorized, values[b]);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      low = fminf(low, values[b][i]);
      high = fmaxf(high, values[b][i]);
      poison = fmaf(values[b][i], 0.0f, poison);  // NaN if one is not finite
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, step));
    high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, step));
  }
  // All lanes of the group must agree; warps with sub-warp groups take the
  // slow path together when one of their groups needs it.
  bool all_finite = true;
  if (__any_sync(0xFFFFFFFFu, is_nan(poison))) {
    low = FLT_MAX;
    high = -FLT_MAX;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (counts[b] <= 0) continue;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (is_finite(values[b][i])) {
          low = fminf(low, values[b][i]);
          high = fmaxf(high, values[b][i]);
        }
      }
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, step));
      high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, step));
      poison = add(poison, __shfl_xor_sync(0xFFFFFFFFu, poison, step));
    }
    all_finite = !is_nan(poison);
  }
  if (!active) return;

  const Range range = make_range(low, high, all_finite, kMaxCode);
  if (lane == 0) ranges[index] = range.pack();
  const float scale = encode_scale(range);
  const int64_t row_block =
      group.row * launch.row_blocks + group.start / kBlock;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    if (counts[b] <= 0) continue;
    const int64_t block = row_block + b * kLanes + lane;
    BlockWord<kBits> word = 0;
    if (range.special()) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const uint32_t code = encode_special(values[b][i], range, kMaxCode);
        word |= static_cast<BlockWord<kBits>>(code) << (i * kBits);
      }
    } else {
      const PhiloxBlock random =
          philox(stream, first_block + static_cast<uint64_t>(block));
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const uint32_t code =
            encode(values[b][i], range, scale, random.bits16(i), kMaxCode);
        word |= static_cast<BlockWord<kBits>>(code) << (i * kBits);
      }
    }
    if (counts[b] < kBlock) {  // elements past the end have code 0
      word &= static_cast<BlockWord<kBits>>(
          (uint64_t{1} << (counts[b] * kBits)) - 1);
    }
    reinterpret_cast<BlockWord<kBits>*>(codes)[block] = word;
  }
}

// Writes 16 bytes of numbers at once. In assembly, because the compiler
// merges an ordinary store with the scalar ones of a ragged end, and then
// writes two bytes at a time.
template <typename T>
__device__ __forceinline__ void store_16_bytes(T* target, const float* values) {
  uint32_t word[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      word[w] = float_bits(values[w]);
    } else {
      const Vector<T, 2> pair{Number<T>::store(values[2 * w]),
                              Number<T>::store(values[2 * w + 1])};
      word[w] = __builtin_bit_cast(uint32_t, pair);
    }
  }
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

// kItems elements a thread and step, written as one word of 16 bytes.
template <typename T, int kBits, int kGroup>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* __restrict__ codes,
                      const uint32_t* __restrict__ ranges,
                      T* __restrict__ output, Launch launch) {
  constexpr int kItems = 16 / sizeof(T);
  constexpr int kLanes = kGroup / kItems < kWarp ? kGroup / kItems : kWarp;
  constexpr int kSteps = kGroup / kItems / kLanes;
  constexpr int kWordBits = kItems * kBits;
  using Word = BlockWord<(kWordBits < 8 ? 1 : kWordBits / 8)>;
  constexpr uint32_t kMaxCode = CodeTraits<kBits>::kMaxCode;

  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = thread / kLanes;
  if (index >= launch.groups) return;
  const int lane = threadIdx.x % kLanes;
  const Group group = locate<kGroup>(launch, index);
  const Range range = Range::unpack(ranges[index]);
  const uint8_t* source =
      codes + (group.row * launch.row_blocks + group.start / kBlock) * kBits;
  T* target = output + group.row * launch.row_numel + group.start;

  // All reads first: they are small, and their latency is what there is to
  // hide.
  Word words[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int begin = (s * kLanes + lane) * kItems;
    // A word ends inside of its block, and blocks are always whole.
    if (begin < group.count) {
      words[s] = *reinterpret_cast<const Word*>(source + begin * kBits / 8);
      if constexpr (kWordBits < 8) words[s] >>= (begin % kBlock) * kBits;
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int begin = (s * kLanes + lane) * kItems;
    if (begin >= group.count) continue;
    float values[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t code =
          static_cast<uint32_t>(words[s] >> (i * kBits)) & kMaxCode;
      values[i] = range.special()
                      ? decode_special(code, range, kMaxCode)
                      : clamp_finite(decode(code, range), Number<T>::kLargest);
    }
    if (launch.vectorized && begin + kItems <= group.count) {
      store_16_bytes(target + begin, values);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (begin + i < group.count) {
          target[begin + i] = Number<T>::store(values[i]);
        }
      }
    }
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls `body` with the bit width and the group size as constants.
template <typename Body>
void dispatch_format(const Geometry& geometry, const Body& body) {
  dispatch_bits(geometry.bits, [&](auto width) {
    if (geometry.group_size == 64) {
      body(width, Constant<64>{});
    } else if (geometry.group_size == 128) {
      body(width, Constant<128>{});
    } else if (geometry.group_size == 256) {
      body(width, Constant<256>{});
    } else {
      body(width, Constant<512>{});
    }
  });
}

// Calls `body(launch, first_row)` for as many rows at a time as 32-bit
// indices can count.
template <typename T, typename Body>
void for_each_launch(const Geometry& geometry, const T* data,
                     const Body& body) {
  const int64_t groups_per_row = geometry.groups_per_row();
  // kWarp threads serve a group at most.
  const int64_t max_groups = kMaxIndex / kWarp;
  STD_TORCH_CHECK(groups_per_row <= max_groups, "a sample may have at most ",
                  max_groups, " groups of elements, got ", groups_per_row);
  const int64_t max_rows = max_groups / groups_per_row;
  for (int64_t row = 0; row < geometry.rows; row += max_rows) {
    const int64_t rows = std::min(max_rows, geometry.rows - row);
    const bool vectorized =
        is_aligned(data, 16) && geometry.row_numel * sizeof(T) % 16 == 0;
    body(Launch{geometry.row_numel, geometry.blocks_per_row(),
                static_cast<uint32_t>(rows * groups_per_row),
                static_cast<uint32_t>(groups_per_row),
                Divider(static_cast<uint32_t>(groups_per_row)), vectorized},
         row);
  }
}

unsigned int grid_size(uint32_t groups, int lanes) {
  return static_cast<unsigned int>(
      (static_cast<int64_t>(groups) * lanes + kThreads - 1) / kThreads);
}

std::tuple<Tensor, Tensor> quantize(Tensor input, int64_t bits,
                                    int64_t group_size, int64_t seed,
                                    int64_t offset) {
  const Geometry geometry = quantize_geometry(input, bits, group_size);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor codes = empty_codes(input, geometry);
  Tensor ranges = empty_ranges(input, geometry);
  if (input.numel() == 0) return {codes, ranges};
  const PhiloxStream random{static_cast<uint64_t>(seed),
                            static_cast<uint64_t>(offset)};
  const cudaStream_t stream = current_stream(input.get_device_index());
  auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* range_words = static_cast<uint32_t*>(ranges.mutable_data_ptr());
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    dispatch_format(geometry, [&](auto width, auto group) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kGroup = decltype(group)::value;
      for_each_launch(geometry, source, [&](const Launch& launch, int64_t row) {
        constexpr int kLanes = kLanesPerGroup<kGroup>;
        quantize_kernel<T, kBits, kGroup>
            <<<grid_size(launch.groups, kLanes), kThreads, 0, stream>>>(
                source + row * geometry.row_numel,
                code_bytes + row * geometry.row_bytes(),
                range_words + row * geometry.groups_per_row(), launch, random,
                static_cast<uint64_t>(row * geometry.blocks_per_row()));
        check_launch();
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
    dispatch_format(geometry, [&](auto width, auto group) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kGroup = decltype(group)::value;
      for_each_launch(geometry, target, [&](const Launch& launch, int64_t row) {
        constexpr int kItems = 16 / sizeof(T);
        constexpr int kLanes = std::min(kGroup / kItems, kWarp);
        dequantize_kernel<T, kBits, kGroup>
            <<<grid_size(launch.groups, kLanes), kThreads, 0, stream>>>(
                code_bytes + row * geometry.row_bytes(),
                range_words + row * geometry.groups_per_row(),
                target + row * geometry.row_numel, launch);
        check_launch();
      });
    });
  });
  return output;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&mmactnn::quantize));
  m.impl("dequantize", TORCH_BOX(&mmactnn::dequantize));
}
