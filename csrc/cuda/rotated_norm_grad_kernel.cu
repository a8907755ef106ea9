#include <cstdint>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dispatch.h"
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
template <typename T>
constexpr int kAtOnce = sizeof(T) == 4 ? 2 : 4;
constexpr int kResidentBlocks = 2;

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
    decoder.transform(spread, y);
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
           fmaf(signs.flip(u, i, y[i]), scale, mean));
    }
  }

  // Writes the gradients that pass.
  __device__ __forceinline__ void store_passed(const ActCodes& act_codes, int u,
                                               T* target,
                                               bool vectorized) const {
    store_block(
        grads_[u].kept([&](int i) { return act_codes.passes(act_words_[u], i); }),
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

// Partial sums of each place of a row: [splits, 2, kPlaceSums, period * 32],
// gradients and then their products with the normalised input.
template <typename T, NormCodes kCodes, bool kElements>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    sums_kernel(const T* __restrict__ grad_output, T* __restrict__ grad,
                float* __restrict__ partial, RotatedSource source,
                ActCodes act_codes, ChannelPlaces channels, GroupWalk walk,
                bool vectorized) {
  constexpr int kCount = kAtOnce<T>;
  constexpr int kSums = kPlaceSums<kElements>;
  const GroupCursor cursor(walk);
  const RotatedDecoder decoder(source);
  float sums[2][kBlock] = {};
  for (uint32_t k = 0; k < cursor.count(); k += kCount) {
    NormGroups<T, kCodes, kCount> groups;
    groups.load(source, act_codes, grad_output, vectorized, cursor, k);
    const auto signs =
        decoder.signs<kCount>([&](int u) { return groups.group(u); });
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
          groups.store_passed(
              act_codes, u, grad + cursor.block(groups.group(u)) * kBlock,
              vectorized);
        }
      }
    }
  }
  // Of the rows of the thread block.
  __shared__ float shared[2 * kSums][kThreads];
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
    for (int s = 0; s < kSums; ++s) shared[which * kSums + s][threadIdx.x] = own[s];
  }
  __syncthreads();
  const uint32_t width = walk.period * kWarp;
  const uint32_t side = walk.across * kWarp;
  const uint32_t column = blockIdx.x * side + threadIdx.x;
  if (threadIdx.x >= side || column >= width) return;
  float* target = partial + int64_t{blockIdx.y} * 2 * kSums * width + column;
#pragma unroll
  for (int s = 0; s < 2 * kSums; ++s) {
    float total = 0.0f;
    for (uint32_t d = 0; d < walk.depth; ++d) {
      total += shared[s][d * side + threadIdx.x];
    }
    target[int64_t{s} * width] = total;
  }
}

// Adds the partial sums up, a channel for each thread block.
template <bool kElements>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const float* __restrict__ partial, SumsOutputs outputs,
                  ChannelPlaces channels, uint32_t period, uint32_t splits) {
  constexpr int kSums = kPlaceSums<kElements>;
  const uint32_t channel = blockIdx.x;
  const int64_t width = int64_t{period} * kWarp;
  const auto places = channels.places(channel, period * kRotation);
  double sums[2] = {};
  const auto add_place = [&](uint32_t split, uint32_t block, int sum) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int64_t row = (int64_t{split} * 2 + which) * kSums + sum;
      sums[which] += partial[row * width + block];
    }
  };
  for (uint32_t split = 0; split < splits; ++split) {
    if constexpr (kElements) {
      for (uint32_t n = threadIdx.x; n < places.count; n += kThreads) {
        const uint32_t place = places.first + n * places.step;
        add_place(split, place / kBlock, place % kBlock);
      }
    } else {
      // The blocks that begin in the channel, and the one before.
      const uint32_t first = (places.first + kBlock - 1) / kBlock;
      const uint32_t end = (places.first + places.count + kBlock - 1) / kBlock;
      for (uint32_t b = first + threadIdx.x; b < end; b += kThreads) {
        add_place(split, b, 0);
      }
      if (threadIdx.x == 0 && places.first % kBlock != 0) {
        add_place(split, first - 1, 1);
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
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    grad_kernel(const T* __restrict__ grad_output, T* __restrict__ grad_input,
                RotatedSource source, NormVectors vectors,
                ChannelPlaces channels, GroupWalk walk, bool vectorized) {
  constexpr int kCount = kAtOnce<T>;
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
        decoder.signs<kCount>([&](int u) { return groups.group(u); });
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float result[kBlock];
      groups.for_each(decoder, signs, {}, u,
                      [&](int i, float value, float normal) {
                        result[i] =
                            norm_grad(value, normal, mean_grad.of(i),
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
  const GroupWalk walk = make_walk(arguments.channels, kResidentBlocks);
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
      places.dispatch([&](auto elements) {
        constexpr bool kElements = decltype(elements)::value;
        const Workspace partial(int64_t{walk.splits} * 2 *
                                kPlaceSums<kElements> * walk.period * kWarp);
        sums_kernel<T, decltype(codes)::value, kElements>
            <<<walk.grid(), walk.threads(), 0, stream>>>(
                grad, passed, partial.data(), source, act_codes, places, walk,
                vectorized);
        check_launch();
        finish_kernel<kElements><<<places.count, kThreads, 0, stream>>>(
            partial.data(), outputs, places, walk.period, walk.splits);
        check_launch();
      });
    });
  });
}

void norm_grad_input(const Memory& grad_output, const NormArguments& arguments,
                     const NormFactors& factors, const Memory& grad_input) {
  const GroupWalk walk = make_walk(arguments.channels, kResidentBlocks);
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
