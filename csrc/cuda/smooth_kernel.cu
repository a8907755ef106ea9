#include <algorithm>

#include "../common/dither.h"
#include "../common/divider.h"
#include "../common/smooth.h"
#include "channel_index.h"
#include "code_floats.h"
#include "dither_floats.h"
#include "launch.h"
#include "packed.h"
#include "packed_block.h"

namespace mmactnn {
namespace {

static_assert(kFlagBlocks == kWarp, "a warp writes a flag");

// Calls `body` with the width as a Constant, kAnyBits for those of the one
// kernel: smooth activations mostly have 4 bits.
template <typename Body>
void dispatch_width(int bits, const Body& body) {
  if (bits == 4) {
    body(Constant<4>{});
  } else {
    body(Constant<kAnyBits>{});
  }
}

template <typename T>
__device__ __forceinline__ void load_any(PackedBlock<T>& block, const T* source,
                                         int count, bool vectorized) {
  if (vectorized && count == kBlock) {
    block.load(source);
  } else {
    block.load(source, 0, count);
  }
}

template <typename T>
__device__ __forceinline__ void store_any(const PackedBlock<T>& block,
                                          T* target, int count,
                                          bool vectorized) {
  if (vectorized && count == kBlock) {
    block.store(target);
  } else {
    block.store(target, count);
  }
}

// A thread encodes a block; those past the end of the tensor stay for the vote
// on the flag of their warp.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads)
    derivative_kernel(const T* __restrict__ input, uint8_t* __restrict__ codes,
                      uint8_t* __restrict__ flags, int64_t numel,
                      bool vectorized, Smooth smooth, DerivativeCodes format,
                      CountedStream random) {
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t start = index * kBlock;
  bool all_finite = true;
  if (start < numel) {
    const int count = static_cast<int>(min(numel - start, int64_t{kBlock}));
    const int bits = kBits == kAnyBits ? format.bits : kBits;
    PackedBlock<T> block;
    load_any(block, input + start, count, vectorized);
    const BlockBits drawn(random.current_pair(), static_cast<uint64_t>(index));
    const float scale =
        encode_scale({format.low, format.step}, max_code_of(bits));
    CodeWord<kBits> word = 0;
    dispatch_smooth(smooth.function, [&](auto function) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const float derivative = function.derivative(block.get(i), smooth);
        if (i < count) {
          all_finite = all_finite && is_finite(derivative);
          const auto code = static_cast<CodeWord<kBits>>(
              format.encode(derivative, scale, drawn.bits16(i)));
          word |= code << (i * bits);
        }
      }
    });
    store_word<kBits>(word, bits, kBlock, codes + index * bits);
  }
  const bool special = __any_sync(0xFFFFFFFFu, !all_finite);
  if (start < numel && threadIdx.x % kWarp == 0) {
    flags[index / kFlagBlocks] = special ? 1 : 0;
  }
}

template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads)
    derivative_backward_kernel(const T* __restrict__ grad_output,
                               const uint8_t* __restrict__ codes,
                               const uint8_t* __restrict__ flags,
                               T* __restrict__ grad_input, int64_t numel,
                               bool vectorized, DerivativeCodes format,
                               CountedStream random) {
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t start = index * kBlock;
  if (start >= numel) return;
  const int count = static_cast<int>(min(numel - start, int64_t{kBlock}));
  const int bits = kBits == kAnyBits ? format.bits : kBits;
  PackedBlock<T> grads;
  load_any(grads, grad_output + start, count, vectorized);
  const auto word = load_word<kBits>(codes + index * bits, bits);
  const bool special = flags[index / kFlagBlocks] != 0;
  const BlockBits drawn(random.current_pair(), static_cast<uint64_t>(index));
  const Range range{format.low, format.step};
  float values[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t code =
        static_cast<uint32_t>(word >> (i * bits)) & max_code_of(bits);
    const float derivative =
        format.dithered
            ? decode_dithered(code, drawn.bits16(i), range, format.fraction)
            : decode(code, range);
    values[i] =
        multiply(grads.get(i), special ? bits_float(0x7FC00000u) : derivative);
  }
  grads.set(values);
  store_any(grads, grad_input + start, count, vectorized);
}

// Blocks of rows, each of which begins anew, and their groups.
struct Rows {
  int64_t row_numel;
  uint32_t blocks;
  Divider by_row_blocks;
  uint32_t groups_per_row;
  int group_shift;  // binary logarithm of the blocks of a group
  bool vectorized;
};

// A normalisation before the function: value * weight + bias.
struct Affine {
  const float* weight;
  const float* bias;
  ChannelIndex channels;

  Affine(const Memory& weights, const Memory& biases, const Channels& of)
      : weight(static_cast<const float*>(weights.const_data_ptr())),
        bias(static_cast<const float*>(biases.const_data_ptr())),
        channels(index_channels(of.count == 0 ? Channels{1, 1, 1, false} : of,
                                {weight, bias})) {}

  __device__ __forceinline__ bool enabled() const {
    return weight != nullptr || bias != nullptr;
  }
};

// Scale and shift of each element of a block.
struct BlockAffine {
  float scale[kBlock];
  float shift[kBlock];

  // `count` elements from `begin` on within a row.
  __device__ __forceinline__ BlockAffine(const Affine& affine, uint32_t begin,
                                         int count) {
    if (!affine.enabled()) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        scale[i] = 1.0f;
        shift[i] = 0.0f;
      }
      return;
    }
    ChannelIndex::Place place = affine.channels.of(begin);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      scale[i] = load_channel(affine.weight, place.channel, 1.0f);
      shift[i] = load_channel(affine.bias, place.channel, 0.0f);
      if (i + 1 < count) place = affine.channels.next(place);
    }
  }
};

// Reads a block of codes, and calls `body(jet, half_variance, i)` with the
// function and its derivatives at each decoded argument.
template <int kBits, typename Body>
__device__ __forceinline__ void decode_block(const uint8_t* codes, int any_bits,
                                             Range range, bool dithered,
                                             const BlockBits& drawn,
                                             const BlockAffine& affine,
                                             const Smooth& smooth,
                                             const Body& body) {
  const int bits = kBits == kAnyBits ? any_bits : kBits;
  const uint32_t max_code = max_code_of(bits);
  const auto word = load_word<kBits>(codes, bits);
  const bool special = range.special();
  const float half = special ? 0.0f : half_variance(range, dithered);
  dispatch_smooth(smooth.function, [&](auto function) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t code =
          static_cast<uint32_t>(word >> (i * bits)) & max_code;
      const float value = special ? decode_special(code, range, max_code)
                          : dithered
                              ? decode_dithered(code, drawn.bits16(i), range,
                                                fraction_bits(max_code))
                              : decode(code, range);
      const float scale = affine.scale[i];
      body(function.jet(add(multiply(value, scale), affine.shift[i]), smooth),
           half * (scale * scale), i);
    }
  });
}

// Values of the function, or with `kBackward` products with its derivative.
template <typename T, int kBits, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const T* __restrict__ grad_output,
                  const uint8_t* __restrict__ codes,
                  const uint32_t* __restrict__ ranges, T* __restrict__ output,
                  Rows rows, Affine affine, int any_bits, Smooth smooth,
                  DitherSource dither) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= rows.blocks) return;
  const int bits = kBits == kAnyBits ? any_bits : kBits;
  const uint32_t row = rows.by_row_blocks.quotient(index);
  const uint32_t block = index - row * rows.by_row_blocks.divisor;
  const int64_t begin = int64_t{block} * kBlock;
  const int64_t start = row * rows.row_numel + begin;
  const int count =
      static_cast<int>(min(rows.row_numel - begin, int64_t{kBlock}));
  PackedBlock<T> packed;
  if constexpr (kBackward) {
    load_any(packed, grad_output + start, count, rows.vectorized);
  }
  const uint32_t group =
      row * rows.groups_per_row + (block >> rows.group_shift);
  const BlockBits drawn(dither.random.current_pair(),
                        dither.first_block + index);
  float values[kBlock];
  decode_block<kBits>(codes + int64_t{index} * bits, bits,
                      Range::unpack(ranges[group]), dither.enabled, drawn,
                      BlockAffine(affine, static_cast<uint32_t>(begin), count),
                      smooth, [&](const Jet& jet, float half, int i) {
                        if constexpr (kBackward) {
                          values[i] =
                              packed.get(i) *
                              corrected(jet.derivative, half, jet.third);
                        } else {
                          values[i] = corrected(jet.value, half, jet.second);
                        }
                      });
  packed.set(values);
  store_any(packed, output + start, count, rows.vectorized);
}

template <typename T, bool kBackward>
void launch_decode(const T* source, const Memory& codes, const Memory& ranges,
                   T* target, const Affine& affine, const Geometry& geometry,
                   int bits, const Smooth& smooth, const DrawnBits& drawn) {
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* range_words =
      static_cast<const uint32_t*>(ranges.const_data_ptr());
  const int64_t row_blocks = geometry.blocks_per_row();
  STD_TORCH_CHECK(row_blocks <= kMaxIndex, "a sample may have at most ",
                  kMaxIndex, " blocks of elements, got ", row_blocks);
  const bool vectorized = (!kBackward || is_aligned(source, 16)) &&
                          is_aligned(target, 16) &&
                          geometry.row_numel * sizeof(T) % 16 == 0;
  int group_shift = 0;
  while ((int64_t{kBlock} << group_shift) < geometry.group_size) ++group_shift;
  // The codes may be a slice of others.
  const int width = is_aligned(code_bytes, 8) ? bits : kAnyBits;
  const DitherSource draws(drawn, geometry);
  const int64_t max_rows = kMaxIndex / row_blocks;
  for (int64_t row = 0; row < geometry.rows; row += max_rows) {
    const int64_t blocks = std::min(max_rows, geometry.rows - row) * row_blocks;
    const Rows rows{geometry.row_numel,
                    static_cast<uint32_t>(blocks),
                    Divider(static_cast<uint32_t>(row_blocks)),
                    static_cast<uint32_t>(geometry.groups_per_row()),
                    group_shift,
                    vectorized};
    const int64_t element = row * geometry.row_numel;
    dispatch_width(width, [&](auto constant) {
      decode_kernel<T, decltype(constant)::value, kBackward>
          <<<static_cast<unsigned int>((blocks + kThreads - 1) / kThreads),
             kThreads, 0, current_stream()>>>(
              kBackward ? source + element : nullptr,
              code_bytes + row * row_blocks * bits,
              range_words + row * geometry.groups_per_row(), target + element,
              rows, affine, bits, smooth, draws.advanced(row * row_blocks));
      check_launch();
    });
  }
}

unsigned int grid_of(int64_t numel) {
  constexpr int64_t kPerGridBlock = int64_t{kThreads} * kBlock;
  const int64_t grid = (numel + kPerGridBlock - 1) / kPerGridBlock;
  STD_TORCH_CHECK(grid <= kMaxIndex, "a tensor may have at most ",
                  kMaxIndex * kPerGridBlock, " elements");
  return static_cast<unsigned int>(grid);
}

int64_t blocks_of(int64_t numel) { return (numel + kBlock - 1) / kBlock; }

}  // namespace

namespace cuda {

void smooth_derivative(const Memory& input, const Memory& codes,
                       const Smooth& smooth, const DerivativeCodes& format,
                       const CountedStream& random) {
  auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  const int64_t numel = input.numel();
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    dispatch_width(format.bits, [&](auto width) {
      derivative_kernel<T, decltype(width)::value>
          <<<grid_of(numel), kThreads, 0, current_stream()>>>(
              source, code_bytes, code_bytes + blocks_of(numel) * format.bits,
              numel, is_aligned(source, 16), smooth, format, random);
      check_launch();
    });
  });
}

void smooth_derivative_backward(const Memory& grad_output, const Memory& codes,
                                const Memory& grad_input,
                                const DerivativeCodes& format,
                                const CountedStream& random) {
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const int64_t numel = grad_output.numel();
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    const bool vectorized = is_aligned(source, 16) && is_aligned(target, 16);
    const int bits = is_aligned(code_bytes, 8) ? format.bits : kAnyBits;
    dispatch_width(bits, [&](auto width) {
      derivative_backward_kernel<T, decltype(width)::value>
          <<<grid_of(numel), kThreads, 0, current_stream()>>>(
              source, code_bytes, code_bytes + blocks_of(numel) * format.bits,
              target, numel, vectorized, format, random);
      check_launch();
    });
  });
}

void smooth_decode(const Memory& codes, const Memory& ranges,
                   const Memory& output, const Memory& weight,
                   const Memory& bias, const Channels& channels,
                   const Geometry& geometry, int bits, const Smooth& smooth,
                   const DrawnBits& drawn) {
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch_decode<T, false>(
        nullptr, codes, ranges, static_cast<T*>(output.mutable_data_ptr()),
        {weight, bias, channels}, geometry, bits, smooth, drawn);
  });
}

void smooth_decode_backward(const Memory& grad_output, const Memory& codes,
                            const Memory& ranges, const Memory& grad_input,
                            const Memory& weight, const Memory& bias,
                            const Channels& channels, const Geometry& geometry,
                            int bits, const Smooth& smooth,
                            const DrawnBits& drawn) {
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch_decode<T, true>(
        static_cast<const T*>(grad_output.const_data_ptr()), codes, ranges,
        static_cast<T*>(grad_input.mutable_data_ptr()),
        {weight, bias, channels}, geometry, bits, smooth, drawn);
  });
}

}  // namespace cuda
}  // namespace mmactnn
