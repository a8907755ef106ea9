#include <cstdint>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "../common/norm.h"
#include "../common/norm_codes.h"
#include "../common/rotation.h"
#include "block.h"
#include "channel_places.h"
#include "group_walk.h"
#include "launch.h"
#include "norm_sums.h"
#include "packed.h"
#include "packed_block.h"
#include "rotated.h"
#include "rotated_decoder.h"
#include "rotation.h"
#include "workspace.h"

namespace mmactnn {
namespace {

// Groups that a warp takes at a time, see rotated_codes_kernel.cu.
template <typename T, NormCodes kCodes>
constexpr int kAtOnce = sizeof(T) == 4 || kCodes == NormCodes::kMask ? 2 : 4;
// Thread blocks of a multiprocessor that registers must suffice for.
template <NormCodes kCodes>
constexpr int kResident = kCodes == NormCodes::kMask ? 3 : 2;

// Zeroed codes of a rectifier that follows an addition, rotated or not.
struct ActCodes {
  const uint8_t* codes;
  int bits;
  uint32_t passing;  // see passing_bits()

  __device__ __forceinline__ uint64_t load(int64_t block) const {
    const uint8_t* source = codes + block * bits;
    switch (bits) {
      case 2:
        return *reinterpret_cast<const uint16_t*>(source);
      case 4:
        return *reinterpret_cast<const uint32_t*>(source);
      case 8:
        return *reinterpret_cast<const uint64_t*>(source);
      default:
        return load_word<kAnyBits>(source, bits);
    }
  }
  __device__ __forceinline__ bool passes(uint64_t word, int i) const {
    return (static_cast<uint32_t>(word >> (i * bits)) & passing) != 0u;
  }
};

// kCount groups of gradients and of the normalised input's codes.
template <typename T, NormCodes kCodes, int kCount>
class NormGroups {
  static constexpr bool kSplit = kCodes == NormCodes::kSplit;
  static constexpr bool kMask = kCodes == NormCodes::kMask;

 public:
  __device__ __forceinline__ void load(const RotatedSource& source,
                                       const ActCodes& act_codes,
                                       const T* grad_output, bool vectorized,
                                       const GroupCursor& cursor, uint32_t k) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      group_[u] = cursor.group(k + u);
      const int64_t block = cursor.block(group_[u]);
      load_block(grads_[u].block, grad_output + block * kBlock, vectorized);
      words_[u] = source.load_word(block);
      if constexpr (kMask) act_words_[u] = act_codes.load(block);
      if constexpr (kSplit) {
        const SplitRange range = source.split_range(group_[u]);
        mean_[u] = range.mean;
        passing_mean_[u] = range.passing_mean;
        scale_[u] = range.scale;
      } else {
        const Range range = source.plain_range(group_[u]);
        passing_mean_[u] = range.low;
        scale_[u] = range.step;
      }
    }
  }

  __device__ __forceinline__ int64_t group(int u) const { return group_[u]; }

  // Calls `body(i, grad, normal)` with every element of the thread's block of
  // group `u`; `grad` is 0 where the gradient does not pass.
  template <typename Body>
  __device__ __forceinline__ void for_each(const RotatedDecoder& decoder,
                                           const BlockSigns<kCount>& signs,
                                           const ActCodes& act_codes, int u,
                                           const Body& body) const {
    float y[kBlock];
    const BlockPairs spread = decoder.spread(words_[u]);
    decoder.transform(spread, signs.inner(u), y);
    const float scale = decoder.unit() * scale_[u];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      bool passes = true;
      float mean = passing_mean_[u];
      if constexpr (kSplit) {
        passes = spread_flag(spread, i);
        mean = passes ? mean : mean_[u];
      } else if constexpr (kMask) {
        passes = act_codes.passes(act_words_[u], i);
      }
      body(i, passes ? grads_[u].value(i) : 0.0f,
           fmaf(signs.flip_outer(u, i, y[i]), scale, mean));
    }
  }

  // Writes the gradients that pass.
  __device__ __forceinline__ void store_passed(const ActCodes& act_codes, int u,
                                               T* target,
                                               bool vectorized) const {
    store_block(grads_[u].kept(
                    [&](int i) { return act_codes.passes(act_words_[u], i); }),
                target, vectorized);
  }

 private:
  int64_t group_[kCount];
  Packed<T, kBlock> grads_[kCount];
  uint32_t words_[kCount];
  uint64_t act_words_[kMask ? kCount : 1];
  float mean_[kSplit ? kCount : 1];
  float passing_mean_[kCount];
  float scale_[kCount];
};

// Sums of a thread's places: of each element, or of those of the first and of
// the second channel in its block.
template <bool kElements>
constexpr int kPlaceSums = kElements ? kBlock : 2;

// Partial sums of the places of a row, gradients and then their products with
// the normalised input: [splits, 2, width], where the width is that of the row
// in elements or, of two channels in a block, [2, blocks].
template <typename T, NormCodes kCodes, bool kElements>
__global__ void __launch_bounds__(kThreads, kResident<kCodes>)
    sums_kernel(const T* __restrict__ grad_output, T* __restrict__ grad,
                float* __restrict__ partial, RotatedSource source,
                ActCodes act_codes, ChannelPlaces channels, GroupWalk walk,
                bool vectorized) {
  constexpr int kCount = kAtOnce<T, kCodes>;
  constexpr int kSums = kPlaceSums<kElements>;
  const GroupCursor cursor(walk);
  const RotatedDecoder decoder(source);
  float sums[2][kBlock] = {};
  for (uint32_t k = 0; k < cursor.count(); k += kCount) {
    NormGroups<T, kCodes, kCount> groups;
    groups.load(source, act_codes, grad_output, vectorized, cursor, k);
    const auto signs =
        decoder.signs<kCount>([&](int u) { return cursor.group(k + u); });
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const bool inside = k + u < cursor.count();
      groups.for_each(decoder, signs, act_codes, u,
                      [&](int i, float value, float normal) {
                        if (!inside) return;
                        sums[0][i] += value;
                        sums[1][i] = fmaf(value, normal, sums[1][i]);
                      });
      if constexpr (kCodes == NormCodes::kMask) {
        if (inside) {
          groups.store_passed(act_codes, u,
                              grad + cursor.block(groups.group(u)) * kBlock,
                              vectorized);
        }
      }
    }
  }
  // Of the rows of the thread block. Neighbours in a block are in banks of
  // their own.
  __shared__ float shared[2 * kSums][kThreads + 1];
  const int left = kElements ? kBlock : channels.left(cursor.place());
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float own[kSums] = {};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if constexpr (kElements) {
        own[i] = sums[which][i];
      } else {
        (i < left ? own[0] : own[1]) += sums[which][i];
      }
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      shared[which * kSums + s][threadIdx.x] = own[s];
    }
  }
  __syncthreads();
  const uint32_t side = walk.across * kWarp;
  const uint32_t first_column = blockIdx.x * side;
  const uint32_t columns = min(side, walk.period * kWarp - first_column);
  const int64_t width = int64_t{walk.period} * kWarp * kSums;
  for (uint32_t n = threadIdx.x; n < 2 * kSums * columns; n += blockDim.x) {
    const uint32_t which = n / (kSums * columns);
    const uint32_t rest = n - which * kSums * columns;
    const uint32_t sum = kElements ? rest % kSums : rest / columns;
    const uint32_t column = kElements ? rest / kSums : rest % columns;
    float total = 0.0f;
    for (uint32_t d = 0; d < walk.depth; ++d) {
      total += shared[which * kSums + sum][d * side + column];
    }
    const int64_t place =
        kElements ? int64_t{first_column} * kSums + rest
                  : int64_t{sum} * walk.period * kWarp + first_column + column;
    partial[(int64_t{blockIdx.y} * 2 + which) * width + place] = total;
  }
}

constexpr int kFinishWarps = 32;

// Adds up sums of elements, of a channel for each thread of a warp; blockIdx.y
// is that of the two sums.
__global__ void __launch_bounds__(kFinishWarps* kWarp)
    finish_elements_kernel(const float* __restrict__ partial,
                           SumsOutputs outputs, ChannelPlaces channels,
                           uint32_t width, uint32_t splits, Divider by_places) {
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t channel = blockIdx.x * kWarp + lane;
  const auto places = channels.places(min(channel, channels.count - 1), width);
  double sum = 0.0;
#pragma unroll 4
  for (uint32_t n = warp; n < splits * places.count; n += kFinishWarps) {
    const uint32_t split = by_places.quotient(n);
    const uint32_t place =
        places.first + (n - split * places.count) * places.step;
    sum += partial[(int64_t{split} * 2 + blockIdx.y) * width + place];
  }
  __shared__ double sums[kFinishWarps][kWarp];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || channel >= channels.count) return;
  for (int w = 1; w < kFinishWarps; ++w) sum += sums[w][lane];
  outputs.write(channel, blockIdx.y, static_cast<float>(sum));
}

// Adds up sums of blocks of two channels, of a channel for each thread block.
__global__ void __launch_bounds__(kThreads)
    finish_blocks_kernel(const float* __restrict__ partial, SumsOutputs outputs,
                         ChannelPlaces channels, uint32_t blocks,
                         uint32_t splits) {
  const uint32_t channel = blockIdx.x;
  const auto places = channels.places(channel, 0);
  // The blocks that begin in the channel, and the one before.
  const uint32_t first = (places.first + kBlock - 1) / kBlock;
  const uint32_t end = (places.first + places.count + kBlock - 1) / kBlock;
  double sums[2] = {};
  for (uint32_t split = 0; split < splits; ++split) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const float* row =
          partial + (int64_t{split} * 2 + which) * 2 * int64_t{blocks};
      for (uint32_t b = first + threadIdx.x; b < end; b += kThreads) {
        sums[which] += row[b];
      }
      if (threadIdx.x == 0 && places.first % kBlock != 0) {
        sums[which] += row[int64_t{blocks} + first - 1];
      }
    }
  }
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const double total = block_sum(sums[which]);
    if (threadIdx.x == 0) {
      outputs.write(channel, which, static_cast<float>(total));
    }
  }
}

template <typename T, NormCodes kCodes, bool kElements>
__global__ void __launch_bounds__(kThreads, kResident<kCodes>)
    grad_kernel(const T* __restrict__ grad_output, T* __restrict__ grad_input,
                RotatedSource source, NormVectors vectors,
                ChannelPlaces channels, GroupWalk walk, bool vectorized) {
  constexpr int kCount = kAtOnce<T, kCodes>;
  const GroupCursor cursor(walk);
  if (cursor.count() == 0) return;
  const RotatedDecoder decoder(source);
  const uint32_t place = cursor.place();
  const PlaceValues<kElements> factor(channels, place, vectors.scale);
  const PlaceValues<kElements> mean_grad(channels, place, vectors.means);
  const PlaceValues<kElements> mean_product(channels, place,
                                            vectors.means + vectors.channels);
  for (uint32_t k = 0; k < cursor.count(); k += kCount) {
    NormGroups<T, kCodes, kCount> groups;
    groups.load(source, {}, grad_output, vectorized, cursor, k);
    const auto signs =
        decoder.signs<kCount>([&](int u) { return cursor.group(k + u); });
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float result[kBlock];
      groups.for_each(decoder, signs, {}, u,
                      [&](int i, float value, float normal) {
                        result[i] = norm_grad(value, normal, mean_grad.of(i),
                                              mean_product.of(i), factor.of(i));
                      });
      if (k + u >= cursor.count()) continue;
      PackedBlock<T> packed;
      packed.set(result);
      store_block(packed, grad_input + cursor.block(groups.group(u)) * kBlock,
                  vectorized);
    }
  }
}

RotatedSource source_of(const NormArguments& arguments) {
  const Geometry& geometry = arguments.geometry;
  const int stride = static_cast<int>(arguments.bits);
  return RotatedSource(arguments.codes,
                       geometry.rows * geometry.blocks_per_row() * stride,
                       arguments.ranges, geometry,
                       {stride, arguments.value_bits()}, arguments.drawn);
}

ActCodes act_codes_of(const NormArguments& arguments) {
  STD_TORCH_CHECK(is_aligned(arguments.act_codes, 8),
                  "act_codes must start on an 8-byte boundary");
  return {arguments.act_codes, static_cast<int>(arguments.act_bits),
          arguments.act_passing_bits()};
}

}  // namespace

namespace rotated {

void norm_grad_sums(const Memory& grad_output, const NormArguments& arguments,
                    const NormSums& sums) {
  const ChannelPlaces places(arguments.channels);
  const RotatedSource source = source_of(arguments);
  const ActCodes act_codes = act_codes_of(arguments);
  const SumsOutputs outputs(arguments.channels, sums);
  const cudaStream_t stream = current_stream();
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* grad = static_cast<const T*>(grad_output.const_data_ptr());
    T* passed = static_cast<T*>(sums.grad.mutable_data_ptr());
    const bool vectorized = is_aligned(grad, 16) && is_aligned(passed, 16);
    dispatch_codes(arguments.kind, [&](auto codes) {
      constexpr NormCodes kCodes = decltype(codes)::value;
      const GroupWalk walk = make_walk(arguments.channels, kResident<kCodes>);
      places.dispatch([&](auto elements) {
        constexpr bool kElements = decltype(elements)::value;
        const Workspace partial(int64_t{walk.splits} * 2 *
                                kPlaceSums<kElements> * walk.period * kWarp);
        sums_kernel<T, kCodes, kElements>
            <<<walk.grid(), walk.threads(), 0, stream>>>(
                grad, passed, partial.data(), source, act_codes, places, walk,
                vectorized);
        check_launch();
        const uint32_t blocks = walk.period * kWarp;
        if constexpr (kElements) {
          const uint32_t width = blocks * kBlock;
          const dim3 grid((places.count + kWarp - 1) / kWarp, 2);
          finish_elements_kernel<<<grid, kFinishWarps * kWarp, 0, stream>>>(
              partial.data(), outputs, places, width, walk.splits,
              Divider(places.places(0, width).count));
        } else {
          finish_blocks_kernel<<<places.count, kThreads, 0, stream>>>(
              partial.data(), outputs, places, blocks, walk.splits);
        }
        check_launch();
      });
    });
  });
}

void norm_grad_input(const Memory& grad_output, const NormArguments& arguments,
                     const NormFactors& factors, const Memory& grad_input) {
  const GroupWalk walk =
      make_walk(arguments.channels, kResident<NormCodes::kPlain>);
  const ChannelPlaces places(arguments.channels);
  const RotatedSource source = source_of(arguments);
  const NormVectors vectors{factors.scale, factors.means,
                            arguments.channels.count};
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* grad = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    const bool vectorized = is_aligned(grad, 16) && is_aligned(target, 16);
    const auto launch = [&](auto codes) {
      places.dispatch([&](auto elements) {
        grad_kernel<T, decltype(codes)::value, decltype(elements)::value>
            <<<walk.grid(), walk.threads(), 0, current_stream()>>>(
                grad, target, source, vectors, places, walk, vectorized);
        check_launch();
      });
    };
    if (arguments.kind == NormCodes::kSplit) {
      launch(std::integral_constant<NormCodes, NormCodes::kSplit>{});
    } else {
      // The gradients are those that pass.
      launch(std::integral_constant<NormCodes, NormCodes::kPlain>{});
    }
  });
}

}  // namespace rotated
}  // namespace mmactnn
