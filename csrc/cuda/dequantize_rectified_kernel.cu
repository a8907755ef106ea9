#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/divider.h"
#include "../common/rectified.h"
#include "codes.h"
#include "launch.h"

namespace mmactnn {
namespace {

// Blocks of 8 elements that a thread decodes.
constexpr int kBlocksADecoder = 2;

// One launch covers the blocks of some rows.
struct DecodeLaunch {
  int64_t row_numel;
  uint32_t blocks;  // of all rows
  uint32_t row_groups;
  Divider by_row_blocks;
  Divider by_channels;  // or by planes
  int group_shift;      // binary logarithm of the blocks of a group
  bool vectorized;      // every full block starts on a 16-byte boundary
};

// Weight or bias of the elements of a block; `otherwise` where there is none.
template <bool kLast>
__device__ __forceinline__ void load_parameter(
    const float* source, float otherwise, const Channels& channels,
    const DecodeLaunch& launch, uint32_t element, float* values) {
  const uint32_t quotient = launch.by_channels.quotient(element);
  const uint32_t divisor = launch.by_channels.divisor;
  const uint32_t rest = element - quotient * divisor;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) values[i] = otherwise;
  if (source == nullptr) return;
  const auto count = static_cast<uint32_t>(channels.count);
  if constexpr (kLast) {
    if (count % kBlock == 0) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const float4 word = reinterpret_cast<const float4*>(source + rest)[w];
        values[4 * w] = word.x;
        values[4 * w + 1] = word.y;
        values[4 * w + 2] = word.z;
        values[4 * w + 3] = word.w;
      }
      return;
    }
    uint32_t channel = rest;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      values[i] = source[channel];
      channel = channel + 1 == count ? 0 : channel + 1;
    }
  } else {
    const float first = source[quotient];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) values[i] = first;
    uint32_t left = divisor - rest;
    if (left >= kBlock) return;
    uint32_t channel = quotient;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      values[i] = source[channel];
      if (--left == 0) {
        left = divisor;
        // Elements past the end of the row repeat the last channel.
        if (channel + 1 < count) ++channel;
      }
    }
  }
}

template <int kBits>
using BlockWord =
    std::conditional_t<kBits == kAnyBits || (kBits > 4), uint64_t, uint32_t>;

template <int kBits>
__device__ __forceinline__ BlockWord<kBits> load_block_codes(
    const uint8_t* source, int bits) {
  if constexpr (kBits == 2) {
    return *reinterpret_cast<const uint16_t*>(source);
  } else if constexpr (kBits == 4) {
    return *reinterpret_cast<const uint32_t*>(source);
  } else {
    BlockWord<kBits> word = 0;
#pragma unroll
    for (int byte = 0; byte < (kBits == kAnyBits ? kMaxBits : kBits); ++byte) {
      if (kBits != kAnyBits || byte < bits) {
        word |= static_cast<BlockWord<kBits>>(source[byte]) << (8 * byte);
      }
    }
    return word;
  }
}

// Of kBits or, with kAnyBits, of the width in `source`.
template <typename T, bool kSplit, int kBits, bool kLast>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(RectifiedCodes source, T* __restrict__ output,
                  DecodeLaunch launch) {
  const int bits = kBits == kAnyBits ? source.bits : kBits;
  const uint32_t first =
      blockIdx.x * (kThreads * kBlocksADecoder) + threadIdx.x;
  BlockWord<kBits> words[kBlocksADecoder];
  Range ranges[kBlocksADecoder];
  uint32_t elements[kBlocksADecoder];
  uint32_t rows[kBlocksADecoder];
  const auto* pairs = static_cast<const uint32_t*>(source.ranges);
  // All reads first: they are small, and their latency is what there is to
  // hide.
#pragma unroll
  for (int b = 0; b < kBlocksADecoder; ++b) {
    const uint32_t block = first + b * kThreads;
    if (block >= launch.blocks) continue;
    rows[b] = launch.by_row_blocks.quotient(block);
    const uint32_t row_block = block - rows[b] * launch.by_row_blocks.divisor;
    elements[b] = row_block * kBlock;
    words[b] = load_block_codes<kBits>(
        source.codes + static_cast<int64_t>(block) * bits, bits);
    const int64_t group = static_cast<int64_t>(rows[b]) * launch.row_groups +
                          (row_block >> launch.group_shift);
    ranges[b] = Range::unpack(pairs[kSplit ? 2 * group + 1 : group]);
  }
#pragma unroll
  for (int b = 0; b < kBlocksADecoder; ++b) {
    if (first + b * kThreads >= launch.blocks) continue;
    float weight[kBlock], bias[kBlock], values[kBlock];
    if constexpr (kSplit) {
      load_parameter<kLast>(source.weight, 1.0f, source.channels, launch,
                            elements[b], weight);
      load_parameter<kLast>(source.bias, 0.0f, source.channels, launch,
                            elements[b], bias);
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t code =
          static_cast<uint32_t>(words[b] >> (i * bits)) & max_code_of(bits);
      if constexpr (kSplit) {
        values[i] = decode_split(code, bits, ranges[b], weight[i], bias[i],
                                 Number<T>::kLargest);
      } else {
        values[i] = decode_zeroed(code, ranges[b], Number<T>::kLargest);
      }
    }
    T* target = output + rows[b] * launch.row_numel + elements[b];
    const int64_t left = launch.row_numel - elements[b];
    if (launch.vectorized && left >= kBlock) {
      constexpr int kPerWord = 16 / sizeof(T);
#pragma unroll
      for (int w = 0; w < kBlock / kPerWord; ++w) {
        store_16_bytes(target + w * kPerWord, values + w * kPerWord);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (i < left) target[i] = Number<T>::store(values[i]);
      }
    }
  }
}

template <typename Body>
void dispatch_width(int bits, const Body& body) {
  if (bits == 2) {
    body(Constant<2>{});
  } else if (bits == 3) {
    body(Constant<3>{});
  } else if (bits == 4) {
    body(Constant<4>{});
  } else {
    body(Constant<kAnyBits>{});
  }
}

template <bool kSplit>
Tensor dequantize(const Tensor& codes, const Tensor& ranges,
                  const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias,
                  const std::vector<int64_t>& size,
                  const std::vector<int64_t>& stride, ScalarType dtype,
                  int64_t bits, int64_t group_size) {
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  Tensor output = empty_strided(codes, size, stride, dtype);
  RectifiedCodes source = check_rectified(output, codes, ranges, weight, bias,
                                          bits, group_size, kSplit);
  if (output.numel() == 0) return output;
  const Geometry& geometry = source.geometry;
  const Channels& channels = source.channels;
  const int64_t row_blocks = geometry.blocks_per_row();
  const int64_t row_groups = geometry.groups_per_row();
  int group_shift = 0;
  while ((kBlock << group_shift) < group_size) ++group_shift;
  const int64_t max_rows = std::max<int64_t>(1, kMaxIndex / 2 / row_blocks);
  const cudaStream_t stream = current_stream(codes.get_device_index());
  const RectifiedCodes all = source;
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    const bool vectorized =
        is_aligned(target, 16) && geometry.row_numel * sizeof(T) % 16 == 0;
    dispatch_width(source.bits, [&](auto width) {
      constexpr int kBits = decltype(width)::value;
      for (int64_t row = 0; row < geometry.rows; row += max_rows) {
        const int64_t rows = std::min(max_rows, geometry.rows - row);
        source.codes = all.codes + row * row_blocks * bits;
        source.ranges = static_cast<const uint32_t*>(all.ranges) +
                        row * row_groups * (kSplit ? 2 : 1);
        const DecodeLaunch launch{
            geometry.row_numel,
            static_cast<uint32_t>(rows * row_blocks),
            static_cast<uint32_t>(row_groups),
            Divider(static_cast<uint32_t>(row_blocks)),
            Divider(static_cast<uint32_t>(channels.last ? channels.count
                                                        : channels.plane)),
            group_shift,
            vectorized};
        constexpr int64_t kPerBlock = int64_t{kThreads} * kBlocksADecoder;
        const auto grid = static_cast<unsigned int>(
            (rows * row_blocks + kPerBlock - 1) / kPerBlock);
        T* part = target + row * geometry.row_numel;
        if (kSplit && channels.last) {
          decode_kernel<T, kSplit, kBits, true>
              <<<grid, kThreads, 0, stream>>>(source, part, launch);
        } else {
          decode_kernel<T, kSplit, kBits, false>
              <<<grid, kThreads, 0, stream>>>(source, part, launch);
        }
        check_launch();
      }
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

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("dequantize_split", TORCH_BOX(&mmactnn::dequantize_split));
  m.impl("dequantize_zeroed", TORCH_BOX(&mmactnn::dequantize_zeroed));
}
