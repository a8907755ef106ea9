#include <algorithm>
#include <cstdint>

#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/rectified_codec.h"
#include "../common/rounding.h"
#include "bounds.h"
#include "code_floats.h"
#include "group.h"
#include "group_words.h"
#include "launch.h"
#include "packed.h"
#include "packed_block.h"
#include "rectified_codes.h"
#include "rotated.h"

namespace mmactnn {
namespace {

// Rectifies a block; returns a bit for each element that passes.
template <typename T>
__device__ __forceinline__ uint32_t rectify(PackedBlock<T>& block) {
  uint32_t flags = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const bool positive = is_positive(block.get(i));
      flags |= positive ? 1u << i : 0u;
      if (!positive) block.word[i] = 0u;
    }
    return flags;
  } else {
    const PairOf<T> zeros = as_pair<T>(0u);
#pragma unroll
    for (int w = 0; w < PackedBlock<T>::kWords; ++w) {
      // Greater or NaN.
      const uint32_t mask = __hgtu2_mask(as_pair<T>(block.word[w]), zeros);
      block.word[w] &= mask;
      flags |= mask & (1u << (2 * w) | 1u << (16 + 2 * w + 1));
    }
    return (flags | flags >> 16) & 0xFFu;
  }
}

// Thread blocks that the registers of a multiprocessor must suffice for; with
// more, kernels spill where the GPU does not compare bfloat16 by itself.
constexpr int kReluResident = 3;

// Codes of kBits, or of `any_bits` with kAnyBits. `output` may be `input`, so
// that neither is __restrict__.
template <typename T, int kBits, int kGroup>
__global__ void __launch_bounds__(kThreads, kReluResident)
    relu_codes_kernel(const T* input, T* output, uint8_t* __restrict__ codes,
                      uint32_t* __restrict__ ranges, Launch launch,
                      int any_bits, CountedStream random,
                      uint64_t first_block) {
  const GroupSize<kGroup> size(launch);
  const int lanes = size.template lanes<kSharedItems>();
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = size.template group_of<kSharedItems>(thread);
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  // Whole warps stay: shuffles name every lane of the warp. Groups past the
  // end have no elements.
  const bool inside = index < launch.groups;
  const Group group = locate(launch, inside ? index : 0, size.elements());
  const int count = inside ? group.count : 0;
  const bool whole = count == size.elements();
  const int64_t base = group.row * launch.row_numel + group.start;
  const auto begin_of = [&](int b) { return (b * lanes + lane) * kBlock; };
  // Elements from the start of a block to the end of the group.
  const auto left_of = [&](int b) { return count - begin_of(b); };

  PackedBlock<T> block[kBlocksPerThread];
  if (whole && launch.vectorized) {
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
      block[b].load(input + base + begin_of(b));
    }
  } else {
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
      // Elements past the end repeat the first one of the block, or are 0, so
      // that they widen no range.
      block[b] = {};
      if (left_of(b) > 0) {
        block[b].load(input + base + begin_of(b), 0, left_of(b));
      }
    }
  }
  // The compiler would put reads off until there are more registers.
  __syncwarp();

  uint32_t positives = 0;  // a bit for each element
  PositiveBounds<T> outputs;
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    positives |= rectify(block[b]) << (b * kBlock);
    outputs.include(block[b]);
    T* target = output + base + begin_of(b);
    if (whole && launch.vectorized) {
      block[b].store(target);
    } else {
      block[b].store(target, left_of(b));
    }
  }

  Bounds bounds = outputs.finish().of_lanes(lanes);
  const bool all_finite = bounds.all_finite();
  // Warps with several groups take the slow path together when one of their
  // groups needs it.
  if (__any_sync(0xFFFFFFFFu, !all_finite)) {
    // Once more, without NaN and inf.
    bounds = Bounds();
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const float value = block[b].get(i);
        if (is_positive(value) && is_finite(value)) bounds.include(value);
      }
    }
    bounds = bounds.of_lanes(lanes);
  }
  if (!inside) return;

  const int bits = kBits == kAnyBits ? any_bits : kBits;
  const uint32_t max_code = max_zeroed_code(bits);
  const Range range =
      make_kind_range({bounds.low, bounds.high, all_finite}, max_code);
  const Coding coding{range.low, encode_scale(range, max_code)};
  if (lane == 0) ranges[index] = range.pack();

  const int64_t group_block =
      group.row * launch.row_blocks + group.start / kBlock;
  const int fraction = fraction_bits(max_code);
  const uint32_t integer = opaque_integer_float(count);
  uint8_t* target = codes + group_block * bits;
  const PairStream stream = random.current_pair();
  CodeWord<kBits> words[kBlocksPerThread];
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    const BlockBits block_bits(
        stream,
        first_block + static_cast<uint64_t>(group_block) + b * lanes + lane);
    words[b] = zeroed_word<kBits>(
        block[b], positives >> (b * kBlock) & 0xFFu, coding, coding.special(),
        [&](int i) { return block_bits.rounding(i, fraction, integer); }, bits);
  }
  if constexpr (kMeet<kBits>) {
    if (whole) {
      store_whole_group<kBits>(words, lane, lanes, target);
      return;
    }
  }
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    if (left_of(b) <= 0) continue;
    store_word<kBits>(words[b], bits, left_of(b),
                      target + (b * lanes + lane) * bits);
  }
}

// Rows of blocks, as many as one launch covers.
struct BlockRows {
  int64_t row_numel;
  uint32_t blocks;
  Divider by_row_blocks;
  bool vectorized;  // every full block starts on a 16-byte boundary
};

// The blocks that a thread reads before it writes one.
template <typename T>
constexpr int kBlocksAtOnce = sizeof(T) == sizeof(float) ? 2 : 4;

// Codes of kBits, or of `any_bits` with kAnyBits.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads)
    relu_codes_backward_kernel(const T* __restrict__ grad_output,
                               const uint8_t* __restrict__ codes,
                               T* __restrict__ grad_input, BlockRows rows,
                               int any_bits, uint32_t passing) {
  constexpr int kAtOnce = kBlocksAtOnce<T>;
  const int bits = kBits == kAnyBits ? any_bits : kBits;
  const uint32_t first = blockIdx.x * (kThreads * kAtOnce) + threadIdx.x;
  Packed<T, kBlock> grads[kAtOnce];
  CodeWord<kBits> words[kAtOnce];
  int64_t offset[kAtOnce];
  int count[kAtOnce];  // elements of each block
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    const uint32_t index = first + u * kThreads;
    count[u] = 0;
    if (index >= rows.blocks) continue;
    const uint32_t row = rows.by_row_blocks.quotient(index);
    const int64_t begin =
        int64_t{index - row * rows.by_row_blocks.divisor} * kBlock;
    offset[u] = row * rows.row_numel + begin;
    count[u] = static_cast<int>(min(rows.row_numel - begin, int64_t{kBlock}));
    words[u] = load_word<kBits>(codes + int64_t{index} * bits, bits);
    if (rows.vectorized && count[u] == kBlock) {
      grads[u].load(grad_output + offset[u]);
    } else {
      grads[u].block.load(grad_output + offset[u], 0, count[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    if (count[u] == 0) continue;
    const PackedBlock<T> passed = grads[u].kept([&](int i) {
      return (static_cast<uint32_t>(words[u] >> (i * bits)) & passing) != 0u;
    });
    T* target = grad_input + offset[u];
    if (rows.vectorized && count[u] == kBlock) {
      passed.store(target);
    } else {
      passed.store(target, count[u]);
    }
  }
}

// Calls `body` with the width, kAnyBits for those of the one kernel.
template <typename Body>
void dispatch_width(int bits, const Body& body) {
  if (bits == 2) {
    body(Constant<2>{});
  } else if (bits == 3) {
    body(Constant<3>{});
  } else if (bits == 4) {
    body(Constant<4>{});
  } else if (bits == 8) {
    body(Constant<8>{});
  } else {
    body(Constant<kAnyBits>{});
  }
}

template <typename T>
void backward(const T* source, const uint8_t* codes, T* target,
              const Geometry& geometry, int bits, uint32_t passing,
              cudaStream_t stream) {
  const int64_t row_blocks = geometry.blocks_per_row();
  STD_TORCH_CHECK(row_blocks <= kMaxIndex, "a sample may have at most ",
                  kMaxIndex, " blocks of elements, got ", row_blocks);
  const bool vectorized = is_aligned(source, 16) && is_aligned(target, 16) &&
                          geometry.row_numel * sizeof(T) % 16 == 0;
  // The codes may be a slice of others.
  const int width = is_aligned(codes, 8) ? bits : kAnyBits;
  const int64_t max_rows = kMaxIndex / row_blocks;
  constexpr int64_t kStep = int64_t{kThreads} * kBlocksAtOnce<T>;
  for (int64_t row = 0; row < geometry.rows; row += max_rows) {
    const int64_t blocks = std::min(max_rows, geometry.rows - row) * row_blocks;
    const BlockRows rows{geometry.row_numel, static_cast<uint32_t>(blocks),
                         Divider(static_cast<uint32_t>(row_blocks)),
                         vectorized};
    const int64_t element = row * geometry.row_numel;
    dispatch_width(width, [&](auto constant) {
      relu_codes_backward_kernel<T, decltype(constant)::value>
          <<<static_cast<unsigned int>((blocks + kStep - 1) / kStep), kThreads,
             0, stream>>>(source + element, codes + row * row_blocks * bits,
                          target + element, rows, bits, passing);
      check_launch();
    });
  }
}

}  // namespace

namespace cuda {

void relu_codes(const Memory& input, const Memory& output, const Memory& codes,
                const Memory& ranges, const Geometry& geometry, int bits,
                const Rounding& rounding) {
  if (rounding.rotated && rotates_zeroed(geometry, bits)) {
    return rotated::relu_codes(input, output, codes, ranges, geometry, bits,
                               rounding.random);
  }
  const cudaStream_t stream = current_stream();
  auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* range_words = static_cast<uint32_t*>(ranges.mutable_data_ptr());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    const auto launch_kernel = [&](auto width, auto group) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kGroup = decltype(group)::value;
      for_each_launch(geometry, source, [&](Launch launch, int64_t row) {
        launch.vectorized = launch.vectorized && is_aligned(target, 16);
        const int64_t element = row * geometry.row_numel;
        const int64_t block = row * launch.row_blocks;
        relu_codes_kernel<T, kBits, kGroup>
            <<<grid_size<kSharedItems>(launch), kThreads, 0, stream>>>(
                source + element, target + element, code_bytes + block * bits,
                range_words + row * geometry.groups_per_row(), launch, bits,
                rounding.random, static_cast<uint64_t>(block));
        check_launch();
      });
    };
    // Rare widths and group sizes have one kernel.
    const Constant<kAnyGroup> any_group;
    dispatch_group_size(geometry.group_size, [&](auto group) {
      if constexpr (decltype(group)::value == kAnyGroup) {
        launch_kernel(Constant<kAnyBits>{}, any_group);
      } else {
        dispatch_width(bits, [&](auto width) {
          if constexpr (decltype(width)::value == kAnyBits) {
            launch_kernel(width, any_group);
          } else {
            launch_kernel(width, group);
          }
        });
      }
    });
  });
}

void relu_codes_backward(const Memory& grad_output, const Memory& codes,
                         const Memory& grad_input, const Geometry& geometry,
                         int bits, bool rotated) {
  const uint32_t passing =
      passing_bits(bits, rotated && rotates_zeroed(geometry, bits));
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    backward(static_cast<const T*>(grad_output.const_data_ptr()),
             static_cast<const uint8_t*>(codes.const_data_ptr()),
             static_cast<T*>(grad_input.mutable_data_ptr()), geometry, bits,
             passing, current_stream());
  });
}

}  // namespace cuda
}  // namespace mmactnn
