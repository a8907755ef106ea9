#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/allocate.h"
#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/norm_act_checks.h"
#include "../common/rectified_codec.h"
#include "../common/tensor_checks.h"
#include "channel_index.h"
#include "launch.h"
#include "packed_block.h"

namespace mmactnn {
namespace {

// Blocks that one thread decodes: their reads are small, and many of them
// have to be under way.
constexpr int kDecodedBlocks = 4;

// One launch; pointers are those of its first row.
template <typename T>
struct Decode {
  const uint8_t* codes;
  const uint32_t* ranges;
  T* output;
  int64_t row_numel;
  uint32_t blocks;
  uint32_t groups_per_row;
  Divider by_row_blocks;
  int group_shift;  // binary logarithm of the blocks of a group
  int bits;
  bool vectorized;  // every full block starts on a 16-byte boundary
};

// decode(), for ranges that are not special.
__device__ __forceinline__ float code_value(uint32_t code, const Range& range) {
  // To float without the slow conversion: exact for codes.
  const float number = add(bits_float(0x4B000000u | code), -8388608.0f);
  return add(multiply(number, range.step), range.low);
}

// The positive kind of split codes, normalised values that become outputs.
template <typename T, int kBits>
struct SplitDecoder {
  static constexpr int kRanges = 2;
  const float* weight;  // null: none
  const float* bias;    // null: none
  ChannelIndex channels;

  __device__ __forceinline__ void operator()(CodeWord<kBits> word, Range range,
                                             uint32_t element, int bits,
                                             int left, float* values) const {
    const uint32_t max_code = max_split_code(bits);
    bool positive[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const auto code = static_cast<uint32_t>(word >> (i * bits));
      positive[i] = (code >> (bits - 1)) & 1u;
      values[i] = code_value(code & max_code, range);
    }
    if (range.special()) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const auto code = static_cast<uint32_t>(word >> (i * bits));
        values[i] = decode_special(code & max_code, range, max_code);
      }
    }
    ChannelIndex::Place place = channels.of(element);
    if (place.left >= kBlock) {
      const ChannelNorm norm{0.0f, 1.0f,
                             load_channel(weight, place.channel, kNoWeight),
                             load_channel(bias, place.channel, kNoBias)};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) values[i] = norm.scale(values[i]);
    } else if (channels.vectorized && left >= kBlock) {
#pragma unroll
      for (int w = 0; w < kBlock; w += kChannelsPerWord) {
        const uint32_t channel = place.channel + w;
        const ChannelWord weights = load_channels(weight, channel, kNoWeight);
        const ChannelWord biases = load_channels(bias, channel, kNoBias);
#pragma unroll
        for (int i = 0; i < kChannelsPerWord; ++i) {
          const ChannelNorm norm{0.0f, 1.0f, weights.item[i], biases.item[i]};
          values[w + i] = norm.scale(values[w + i]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const ChannelNorm norm{0.0f, 1.0f,
                               load_channel(weight, place.channel, kNoWeight),
                               load_channel(bias, place.channel, kNoBias)};
        values[i] = norm.scale(values[i]);
        if (i + 1 < left) place = channels.next(place);
      }
    }
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (!positive[i]) values[i] = 0.0f;
      largest = fmaxf(largest, fabsf(values[i]));
    }
    // Of float32 a finite number is never too large.
    if constexpr (!std::is_same_v<T, float>) {
      if (largest > Number<T>::kLargest) {
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
          if (is_finite(values[i])) {
            values[i] = clamp_finite(values[i], Number<T>::kLargest);
          }
        }
      }
    }
  }
};

template <typename T, int kBits>
struct ZeroedDecoder {
  static constexpr int kRanges = 1;

  __device__ __forceinline__ void operator()(CodeWord<kBits> word, Range range,
                                             uint32_t, int bits, int,
                                             float* values) const {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t code =
          static_cast<uint32_t>(word >> (i * bits)) & max_code_of(bits);
      // Unsigned, code 0 would wrap; what it decodes to is not used.
      const float value = code_value(code == 0u ? 0u : code - 1u, range);
      values[i] = code == 0u ? 0.0f : clamp_finite(value, Number<T>::kLargest);
    }
    if (range.special()) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const uint32_t code =
            static_cast<uint32_t>(word >> (i * bits)) & max_code_of(bits);
        values[i] = code == 0u ? 0.0f : decode_zeroed_special(code - 1u, range);
      }
    }
  }
};

template <typename T, int kBits, typename Decoder>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const Decode<T> op, const Decoder decoder) {
  const int bits = kBits == kAnyBits ? op.bits : kBits;
  const uint32_t first = blockIdx.x * (kThreads * kDecodedBlocks) + threadIdx.x;
  uint32_t row[kDecodedBlocks], place[kDecodedBlocks];
  CodeWord<kBits> word[kDecodedBlocks];
  uint32_t range[kDecodedBlocks];
#pragma unroll
  for (int b = 0; b < kDecodedBlocks; ++b) {
    const uint32_t block = first + b * kThreads;
    if (block >= op.blocks) continue;
    row[b] = op.by_row_blocks.quotient(block);
    place[b] = block - row[b] * op.by_row_blocks.divisor;
    word[b] =
        load_word<kBits>(op.codes + static_cast<int64_t>(block) * bits, bits);
    const int64_t group = static_cast<int64_t>(row[b]) * op.groups_per_row +
                          (place[b] >> op.group_shift);
    // The last range of a group is that of the values that are not 0.
    range[b] = op.ranges[group * Decoder::kRanges + Decoder::kRanges - 1];
  }
#pragma unroll
  for (int b = 0; b < kDecodedBlocks; ++b) {
    if (first + b * kThreads >= op.blocks) continue;
    const uint32_t element = place[b] * kBlock;
    const auto row_left = static_cast<uint32_t>(op.row_numel) - element;
    const int left = row_left < kBlock ? static_cast<int>(row_left) : kBlock;
    float values[kBlock];
    decoder(word[b], Range::unpack(range[b]), element, bits, left, values);
    PackedBlock<T> packed;
    packed.set(values);
    T* target =
        op.output + static_cast<int64_t>(row[b]) * op.row_numel + element;
    if (op.vectorized && left >= kBlock) {
      packed.store(target);
    } else {
      packed.store(target, left);
    }
  }
}

template <typename Body>
void dispatch_widths(int64_t bits, const Body& body) {
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

// Decodes everything, with decoders that `make(type, width)` returns.
template <typename Make>
void decode_into(const Tensor& codes, const Tensor& ranges, Tensor& output,
                 const Geometry& geometry, int64_t bits, const Make& make) {
  const int64_t row_blocks = geometry.blocks_per_row();
  STD_TORCH_CHECK(geometry.row_numel <= kMaxIndex, "a sample may have at most ",
                  kMaxIndex, " elements, got ", geometry.row_numel);
  // A grid that is not whole ends before 32-bit indices do.
  const int64_t max_rows = (kMaxIndex - kThreads * kDecodedBlocks) / row_blocks;
  const cudaStream_t stream = current_stream(codes.get_device_index());
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* range_words =
      static_cast<const uint32_t*>(ranges.const_data_ptr());
  int group_shift = 0;
  while ((int64_t{kBlock} << group_shift) < geometry.group_size) ++group_shift;
  dispatch_dtype(output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    dispatch_widths(bits, [&](auto width) {
      constexpr int kBits = decltype(width)::value;
      const auto decoder = make(type, width);
      using Decoder = std::remove_const_t<decltype(decoder)>;
      for (int64_t row = 0; row < geometry.rows; row += max_rows) {
        const int64_t rows = std::min(max_rows, geometry.rows - row);
        const int64_t blocks = rows * row_blocks;
        const Decode<T> op{
            code_bytes + row * row_blocks * bits,
            range_words + row * geometry.groups_per_row() * Decoder::kRanges,
            target + row * geometry.row_numel,
            geometry.row_numel,
            static_cast<uint32_t>(blocks),
            static_cast<uint32_t>(geometry.groups_per_row()),
            Divider(static_cast<uint32_t>(row_blocks)),
            group_shift,
            static_cast<int>(bits),
            is_aligned(target, 16) && geometry.row_numel * sizeof(T) % 16 == 0};
        constexpr int64_t kPerGridBlock = int64_t{kThreads} * kDecodedBlocks;
        dequantize_kernel<T, kBits, Decoder>
            <<<static_cast<unsigned int>((blocks + kPerGridBlock - 1) /
                                         kPerGridBlock),
               kThreads, 0, stream>>>(op, decoder);
        check_launch();
      }
    });
  });
}

Tensor dequantize_split(Tensor codes, Tensor ranges,
                        std::optional<Tensor> weight,
                        std::optional<Tensor> bias, std::vector<int64_t> size,
                        std::vector<int64_t> stride, ScalarType dtype,
                        int64_t bits, int64_t group_size) {
  const Geometry geometry =
      checked_rectified(codes, ranges, size, bits, group_size, true);
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  Tensor output = empty_strided(codes, size, stride, dtype);
  const Channels channels = channels_of("the output", output);
  if (weight) check_per_channel("weight", *weight, channels, codes);
  if (bias) check_per_channel("bias", *bias, channels, codes);
  if (output.numel() == 0) return output;
  const auto* weights = static_cast<const float*>(data_or_null(weight));
  const auto* biases = static_cast<const float*>(data_or_null(bias));
  const ChannelIndex index = index_channels(
      channels, is_aligned(weights, 16) && is_aligned(biases, 16));
  decode_into(
      codes, ranges, output, geometry, bits, [&](auto type, auto width) {
        using T = typename decltype(type)::type;
        return SplitDecoder<T, decltype(width)::value>{weights, biases, index};
      });
  return output;
}

Tensor dequantize_zeroed(Tensor codes, Tensor ranges, std::vector<int64_t> size,
                         std::vector<int64_t> stride, ScalarType dtype,
                         int64_t bits, int64_t group_size) {
  const Geometry geometry =
      checked_rectified(codes, ranges, size, bits, group_size, false);
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  Tensor output = empty_strided(codes, size, stride, dtype);
  check_dtype("dtype", output);
  check_dense("the output", output);
  if (output.numel() == 0) return output;
  decode_into(codes, ranges, output, geometry, bits, [](auto type, auto width) {
    using T = typename decltype(type)::type;
    return ZeroedDecoder<T, decltype(width)::value>{};
  });
  return output;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("dequantize_split", TORCH_BOX(&mmactnn::dequantize_split));
  m.impl("dequantize_zeroed", TORCH_BOX(&mmactnn::dequantize_zeroed));
}
