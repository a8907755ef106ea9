// A fused normalisation on the GPU: read, normalised, added to, rectified,
// written and rounded in one pass. Included by a file for each mode.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cfloat>
#include <cstdint>
#include <optional>

#include "../common/divider.h"
#include "../common/norm_act.h"
#include "../common/philox.h"
#include "codes.h"
#include "group.h"
#include "launch.h"

namespace mmactnn {

// What a launch needs beside its arguments.
struct NormActLaunch {
  Launch launch;
  Divider by_plane;      // or by channels, if these are innermost
  uint64_t first_block;  // of the launch, for the random bits
  int lanes;             // threads of a group
  int lane_shift;        // its binary logarithm
};

// What a thread of a fused normalisation holds of a group.
struct NormShare {
  float normal[kBlocksPerThread][kBlock];
  float output[kBlocksPerThread][kBlock];  // of NormAct::kAdd
  uint32_t positive;                       // a bit for each element
  int counts[kBlocksPerThread];

  __device__ __forceinline__ bool is_positive(int b, int i) const {
    return (positive >> (b * kBlock + i) & 1u) != 0u;
  }
};

// The channels of the 8 elements from `element` of a row on.
template <bool kLast>
struct BlockChannels {
  uint32_t channel;  // of the first element
  uint32_t left;     // elements until the next channel begins

  __device__ __forceinline__ BlockChannels(const NormActArguments& arguments,
                                           const NormActLaunch& launch,
                                           uint32_t element) {
    const uint32_t quotient = launch.by_plane.quotient(element);
    const uint32_t rest = element - quotient * launch.by_plane.divisor;
    if constexpr (kLast) {
      channel = rest;
      left = 1;
    } else {
      channel = quotient;
      left = launch.by_plane.divisor - rest;
    }
  }

  // Those of a block that ends behind the row repeat the last channel.
  __device__ __forceinline__ void next(const NormActArguments& arguments) {
    if constexpr (kLast) {
      channel = channel + 1 == arguments.channels.count ? 0 : channel + 1;
    } else {
      if (--left == 0) {
        left = static_cast<uint32_t>(arguments.channels.plane);
        if (channel + 1 < arguments.channels.count) ++channel;
      }
    }
  }
};

// Eight numbers that begin on a 16-byte boundary.
__device__ __forceinline__ void load_floats(const float* source,
                                            float* values) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const float4 word = reinterpret_cast<const float4*>(source)[w];
    values[4 * w] = word.x;
    values[4 * w + 1] = word.y;
    values[4 * w + 2] = word.z;
    values[4 * w + 3] = word.w;
  }
}

// Normalises and scales the elements of a block.
template <bool kLast>
__device__ __forceinline__ void normalise_block(
    const NormActArguments& arguments, const NormActLaunch& launch,
    uint32_t element, const float* x, float* normal, float* total) {
  BlockChannels<kLast> place(arguments, launch, element);
  if constexpr (kLast) {
    if (arguments.channels.count % kBlock == 0) {
      float mean[kBlock], invstd[kBlock], weight[kBlock], bias[kBlock];
      load_floats(arguments.mean + place.channel, mean);
      load_floats(arguments.invstd + place.channel, invstd);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        weight[i] = 1.0f;
        bias[i] = 0.0f;
      }
      if (arguments.weight != nullptr) {
        load_floats(arguments.weight + place.channel, weight);
      }
      if (arguments.bias != nullptr) {
        load_floats(arguments.bias + place.channel, bias);
      }
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const ChannelValues values{mean[i], invstd[i], weight[i], bias[i]};
        normal[i] = values.normalise(x[i]);
        total[i] = values.scale(normal[i]);
      }
      return;
    }
  } else if (place.left >= kBlock) {
    const ChannelValues values = channel_values(arguments, place.channel);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      normal[i] = values.normalise(x[i]);
      total[i] = values.scale(normal[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const ChannelValues values = channel_values(arguments, place.channel);
    normal[i] = values.normalise(x[i]);
    total[i] = values.scale(normal[i]);
    place.next(arguments);
  }
}

// Reads, normalises, adds, rectifies and writes what a thread holds.
template <typename T, NormAct kMode, bool kLast>
__device__ __forceinline__ void norm_act_share(
    const T* input, const T* residual, T* output,
    const NormActArguments& arguments, const NormActLaunch& launch,
    const Group& group, int lane, bool active, NormShare& share) {
  const bool vectorized = launch.launch.vectorized;
  share.positive = 0u;
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    const int begin = (b * launch.lanes + lane) * kBlock;
    const int count = active ? group.count - begin : 0;
    share.counts[b] = count;
    if (count <= 0) continue;
    float x[kBlock], total[kBlock];
    load_block(input + begin, count, vectorized, x);
    normalise_block<kLast>(arguments, launch,
                           static_cast<uint32_t>(group.start) + begin, x,
                           share.normal[b], total);
    if constexpr (kMode == NormAct::kAdd) {
      float added[kBlock];
      load_block(residual + begin, count, vectorized, added);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) total[i] = add(total[i], added[i]);
    }
    if (count < kBlock) {
      // What is past the end must not widen the range.
#pragma unroll
      for (int i = 1; i < kBlock; ++i) {
        if (i < count) continue;
        share.normal[b][i] = share.normal[b][0];
        total[i] = total[0];
      }
    }
    if constexpr (kMode != NormAct::kPlain) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        // The kind is that of the number that is written.
        const float rounded = Number<T>::load(Number<T>::store(total[i]));
        const bool positive = is_positive(rounded);
        total[i] = positive ? rounded : 0.0f;
        share.positive |= (positive ? 1u : 0u) << (b * kBlock + i);
        if constexpr (kMode == NormAct::kAdd) share.output[b][i] = total[i];
      }
    }
    if (vectorized && count >= kBlock) {
      constexpr int kPerWord = 16 / sizeof(T);
#pragma unroll
      for (int w = 0; w < kBlock / kPerWord; ++w) {
        store_16_bytes(output + begin + w * kPerWord, total + w * kPerWord);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (i < count) output[begin + i] = Number<T>::store(total[i]);
      }
    }
  }
}

// The extent of a group's elements; `visit(use)` calls `use(value, member)`
// for what the thread holds, where `member` tells whether the element counts.
// Elements past the end of a group repeat one that counts. All threads of a
// warp call it together.
template <typename Visit>
__device__ __forceinline__ Extent group_extent(int lanes, const Visit& visit) {
  const float nan = bits_float(0x7FC00000u);
  float low = FLT_MAX, high = -FLT_MAX, poison = 0.0f;
  visit([&](float value, bool member) {
    // fminf and fmaxf leave out NaN.
    const float chosen = member ? value : nan;
    low = fminf(low, chosen);
    high = fmaxf(high, chosen);
    poison = fmaf(member ? value : 0.0f, 0.0f, poison);
  });
  for (int step = lanes / 2; step > 0; step /= 2) {
    low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, step));
    high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, step));
  }
  bool all_finite = true;
  if (__any_sync(0xFFFFFFFFu, is_nan(poison))) {
    low = FLT_MAX;
    high = -FLT_MAX;
    visit([&](float value, bool member) {
      if (member && is_finite(value)) {
        low = fminf(low, value);
        high = fmaxf(high, value);
      }
    });
    for (int step = lanes / 2; step > 0; step /= 2) {
      low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, step));
      high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, step));
      poison = add(poison, __shfl_xor_sync(0xFFFFFFFFu, poison, step));
    }
    all_finite = !is_nan(poison);
  }
  return {low, high, all_finite};
}

// Writes the codes that `make(b, i, random16)` gives for what a thread holds.
template <int kBits, typename Make>
__device__ __forceinline__ void write_codes(const NormShare& share, int bits,
                                            PhiloxStream stream,
                                            uint64_t random_block,
                                            uint8_t* target, int lanes,
                                            int lane, const Make& make) {
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    const int count = share.counts[b];
    if (count <= 0) continue;
    const int block = b * lanes + lane;
    const PhiloxBlock random = philox(stream, random_block + block);
    uint32_t code[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) code[i] = make(b, i, random.bits16(i));
    with_width<kBits>(bits, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      store_codes<kWidth>(code, count, target + block * kWidth);
    });
  }
}

// kBits is the width of the codes of the normalised input, and with
// NormAct::kAdd that of the others too, or kAnyBits. `output` may be `input`.
template <typename T, NormAct kMode, int kBits, bool kLast>
__global__ void __launch_bounds__(kThreads)
    norm_act_kernel(const T* input, const T* residual, T* output,
                    uint8_t* __restrict__ codes, uint32_t* __restrict__ ranges,
                    uint8_t* __restrict__ act_codes,
                    uint32_t* __restrict__ act_ranges,
                    NormActArguments arguments, NormActLaunch launch) {
  const int bits = kBits == kAnyBits ? arguments.bits : kBits;
  const int act_bits = kBits == kAnyBits ? arguments.act_bits : kBits;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = thread >> launch.lane_shift;
  const int lane = threadIdx.x & (launch.lanes - 1);
  // Whole warps stay: group_extent() names every lane of the warp.
  const bool active = index < launch.launch.groups;
  const uint32_t row =
      launch.launch.by_groups_per_row.quotient(active ? index : 0);
  const int64_t group_size = arguments.geometry.group_size;
  const int64_t start =
      static_cast<int64_t>((active ? index : 0) -
                           row * launch.launch.groups_per_row) *
      group_size;
  const int64_t row_left = launch.launch.row_numel - start;
  const Group group{
      row, start,
      static_cast<int>(row_left < group_size ? row_left : group_size)};
  const int64_t first = row * launch.launch.row_numel + start;

  NormShare share;
  norm_act_share<T, kMode, kLast>(
      input + first, kMode == NormAct::kAdd ? residual + first : nullptr,
      output + first, arguments, launch, group, lane, active, share);

  const uint64_t group_block =
      static_cast<uint64_t>(row) * launch.launch.row_blocks +
      static_cast<uint64_t>(start / kBlock);
  const uint64_t random_block = launch.first_block + group_block;
  const int lanes = launch.lanes;
  const auto visit_normal = [&](const auto& use, const auto& member) {
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
      if (share.counts[b] <= 0) continue;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        use(share.normal[b][i], member(b, i));
      }
    }
  };

  if constexpr (kMode == NormAct::kRelu) {
    const uint32_t max_code = max_split_code(bits);
    const Extent rest = group_extent(lanes, [&](const auto& use) {
      visit_normal(use, [&](int b, int i) { return !share.is_positive(b, i); });
    });
    const Extent upper = group_extent(lanes, [&](const auto& use) {
      visit_normal(use, [&](int b, int i) { return share.is_positive(b, i); });
    });
    if (!active) return;
    const Range first_range = make_kind_range(rest, max_code);
    const Range second_range = make_kind_range(upper, max_code);
    if (lane == 0) {
      reinterpret_cast<uint2*>(ranges)[index] =
          make_uint2(first_range.pack(), second_range.pack());
    }
    const float first_scale = encode_scale(first_range);
    const float second_scale = encode_scale(second_range);
    const bool special = first_range.special() || second_range.special();
    write_codes<kBits>(
        share, bits, arguments.stream, random_block, codes + group_block * bits,
        lanes, lane, [&](int b, int i, uint32_t random) {
          const bool positive = share.is_positive(b, i);
          const Range range = positive ? second_range : first_range;
          const float value = share.normal[b][i];
          const uint32_t code =
              special && range.special()
                  ? encode_special(value, range, max_code)
                  : encode(value, range, positive ? second_scale : first_scale,
                           random, max_code);
          return join_split(code, positive, bits);
        });
  } else {
    const uint32_t max_code = max_code_of(bits);
    const Extent extent = group_extent(lanes, [&](const auto& use) {
      visit_normal(use, [](int, int) { return true; });
    });
    Extent upper;
    if constexpr (kMode == NormAct::kAdd) {
      upper = group_extent(lanes, [&](const auto& use) {
#pragma unroll
        for (int b = 0; b < kBlocksPerThread; ++b) {
          if (share.counts[b] <= 0) continue;
#pragma unroll
          for (int i = 0; i < kBlock; ++i) {
            use(share.output[b][i], share.is_positive(b, i));
          }
        }
      });
    }
    if (!active) return;
    const Range range = make_range(extent, max_code);
    if (lane == 0) ranges[index] = range.pack();
    const float scale = encode_scale(range);
    const bool special = range.special();
    write_codes<kBits>(
        share, bits, arguments.stream, random_block, codes + group_block * bits,
        lanes, lane, [&](int b, int i, uint32_t random) {
          const float value = share.normal[b][i];
          return special ? encode_special(value, range, max_code)
                         : encode(value, range, scale, random, max_code);
        });
    if constexpr (kMode == NormAct::kAdd) {
      const uint32_t act_max_code = max_zeroed_code(act_bits);
      const Range act_range = make_kind_range(upper, act_max_code);
      if (lane == 0) act_ranges[index] = act_range.pack();
      const float act_scale = encode_scale(act_range);
      const bool act_special = act_range.special();
      write_codes<kBits>(share, act_bits, arguments.act_stream, random_block,
                         act_codes + group_block * act_bits, lanes, lane,
                         [&](int b, int i, uint32_t random) {
                           const float value = share.output[b][i];
                           const uint32_t code =
                               act_special
                                   ? encode_zeroed_special(value, act_range)
                                   : encode(value, act_range, act_scale, random,
                                            act_max_code);
                           return share.is_positive(b, i) ? code + 1u : 0u;
                         });
    }
  }
}

inline int binary_logarithm(int value) {
  int shift = 0;
  while ((1 << shift) < value) ++shift;
  return shift;
}

// Calls `body` with the width as a Constant, kAnyBits unless it is 2, 3 or 4
// and that of all codes.
template <typename Body>
void dispatch_norm_bits(const NormActArguments& arguments, const Body& body) {
  const int bits = arguments.bits;
  const bool same =
      arguments.mode != NormAct::kAdd || arguments.act_bits == bits;
  if (same && bits == 2) {
    body(Constant<2>{});
  } else if (same && bits == 3) {
    body(Constant<3>{});
  } else if (same && bits == 4) {
    body(Constant<4>{});
  } else {
    body(Constant<kAnyBits>{});
  }
}

// Launches the kernel of a mode. `target` may be `input`.
template <NormAct kMode>
void launch_norm_act(const Tensor& input, const Tensor* residual,
                     Tensor& target, const NormActArguments& arguments,
                     NormActOutputs& outputs) {
  const Geometry& geometry = arguments.geometry;
  const int64_t groups_per_row = geometry.groups_per_row();
  const cudaStream_t stream = current_stream(input.get_device_index());
  auto* codes = static_cast<uint8_t*>(outputs.codes.mutable_data_ptr());
  auto* ranges = static_cast<uint32_t*>(outputs.ranges.mutable_data_ptr());
  auto* act_codes = static_cast<uint8_t*>(outputs.act_codes.mutable_data_ptr());
  auto* act_ranges =
      static_cast<uint32_t*>(outputs.act_ranges.mutable_data_ptr());
  const Channels& channels = arguments.channels;
  const Divider by_plane(
      static_cast<uint32_t>(channels.last ? channels.count : channels.plane));
  const int lanes =
      static_cast<int>(geometry.group_size) / kBlock / kBlocksPerThread;
  constexpr int kWidth = kMode == NormAct::kRelu ? 2 : 1;
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    const T* added = residual == nullptr
                         ? nullptr
                         : static_cast<const T*>(residual->const_data_ptr());
    T* output = static_cast<T*>(target.mutable_data_ptr());
    const bool aligned =
        is_aligned(output, 16) && (added == nullptr || is_aligned(added, 16));
    dispatch_norm_bits(arguments, [&](auto width) {
      constexpr int kBits = decltype(width)::value;
      for_each_launch(geometry, source, [&](Launch launch, int64_t row) {
        launch.vectorized = launch.vectorized && aligned;
        const NormActLaunch all{launch, by_plane,
                                static_cast<uint64_t>(row * launch.row_blocks),
                                lanes, binary_logarithm(lanes)};
        const int64_t element = row * geometry.row_numel;
        const int64_t group = row * groups_per_row;
        const int64_t block = row * launch.row_blocks;
        const auto start = [&](auto last) {
          norm_act_kernel<T, kMode, kBits, decltype(last)::value != 0>
              <<<grid_size(launch.groups, lanes), kThreads, 0, stream>>>(
                  source + element,
                  added == nullptr ? nullptr : added + element,
                  output + element, codes + block * arguments.bits,
                  ranges + group * kWidth,
                  act_codes + block * arguments.act_bits, act_ranges + group,
                  arguments, all);
        };
        if (channels.last) {
          start(Constant<1>{});
        } else {
          start(Constant<0>{});
        }
        check_launch();
      });
    });
  });
}

// One for each mode, in a file of its own.
void norm_act_plain(const Tensor& input, Tensor& target,
                    const NormActArguments& arguments, NormActOutputs& outputs);
void norm_act_relu(const Tensor& input, Tensor& target,
                   const NormActArguments& arguments, NormActOutputs& outputs);
void norm_act_add(const Tensor& input, const Tensor& residual, Tensor& target,
                  const NormActArguments& arguments, NormActOutputs& outputs);

}  // namespace mmactnn
