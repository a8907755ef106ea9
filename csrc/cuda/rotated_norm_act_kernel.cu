#include <cstdint>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/norm_act_arguments.h"
#include "../common/rotation.h"
#include "channel_places.h"
#include "group_walk.h"
#include "launch.h"
#include "packed_block.h"
#include "rectified_zero.h"
#include "rotated.h"
#include "rotated_encoder.h"
#include "rotation.h"

namespace mmactnn {
namespace {

// Groups that a warp takes at a time, see rotated_codes_kernel.cu.
template <NormActPayload kPayload>
constexpr int kGroupsAtOnce =
    kPayload == NormActPayload::kPlainAndZeroed ? 2 : 4;
constexpr int kResidentBlocks = 2;

// The output may be the input. Null pointers stand for a missing tensor and an
// output that is not wanted.
template <typename T>
struct NormAct {
  const T* input;
  const T* residual;
  T* output;
  const float* mean;
  const float* invstd;
  const float* weight;
  const float* bias;
  uint8_t* codes;
  void* ranges;
  uint8_t* act_codes;
  uint32_t* act_ranges;
  RotatedCodes format;
  RotatedCodes act_format;
  CountedStream random;
  CountedStream act_random;
  ChannelPlaces channels;
  bool vectorized;
};

// Encodes kCount groups, from the k-th of a warp on, and writes their codes;
// `store_range(group, range)` writes a range.
template <RotatedKinds kKinds, int kCount, typename StoreRange>
__device__ __forceinline__ void encode_groups(
    const RotatedCodes& format, const Hadamard& hadamard, PairStream stream,
    const GroupCursor& cursor, uint32_t k, float (&values)[kCount][kBlock],
    const uint32_t (&flags)[kCount], uint8_t* codes,
    const StoreRange& store_range) {
  const BlockSigns<kCount> signs(stream, [&](int u) {
    return static_cast<uint64_t>(cursor.group(k + u));
  });
  uint32_t words[kCount];
  GroupRange ranges[kCount];
  encode_rotated<kKinds>(format, hadamard, signs, values, flags, words, ranges);
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    if (k + u >= cursor.count()) continue;
    const int64_t group = cursor.group(k + u);
    store_block_codes(codes, cursor.block(group), format.stride, words[u]);
    if (threadIdx.x % kWarp == 0) store_range(group, ranges[u]);
  }
}

template <typename T, NormActPayload kPayload, bool kElements>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    norm_act_kernel(const NormAct<T> op, const GroupWalk walk) {
  constexpr int kAtOnce = kGroupsAtOnce<kPayload>;
  constexpr bool kRectified = kPayload != NormActPayload::kPlain;
  constexpr bool kSplit = kPayload == NormActPayload::kSplit;
  constexpr bool kZeroed = kPayload == NormActPayload::kPlainAndZeroed;
  const GroupCursor cursor(walk);
  if (cursor.count() == 0) return;
  const Hadamard hadamard;
  const PairStream stream = op.random.current_pair();
  PairStream act_stream{};
  if constexpr (kZeroed) act_stream = op.act_random.current_pair();
  const uint32_t place = cursor.place();
  const PlaceValues<kElements> mean(op.channels, place, op.mean);
  const PlaceValues<kElements> invstd(op.channels, place, op.invstd);
  const PlaceValues<kElements> weight(op.channels, place, op.weight, kNoWeight);
  const PlaceValues<kElements> bias(op.channels, place, op.bias, kNoBias);
  for (uint32_t k = 0; k < cursor.count(); k += kAtOnce) {
    PackedBlock<T> input[kAtOnce];
    PackedBlock<T> residual[kZeroed ? kAtOnce : 1];
    int64_t group[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      group[u] = cursor.group(k + u);
      const int64_t element = cursor.block(group[u]) * kBlock;
      load_block(input[u], op.input + element, op.vectorized);
      if constexpr (kZeroed) {
        load_block(residual[u], op.residual + element, op.vectorized);
      }
    }
    float normal[kAtOnce][kBlock];
    PackedBlock<T> output[kAtOnce];
    uint32_t flags[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float total[kBlock];
      flags[u] = 0;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const ChannelNorm norm{mean.of(i), invstd.of(i), weight.of(i),
                               bias.of(i)};
        normal[u][i] = norm.normalise(input[u].get(i));
        total[i] = norm.scale(normal[u][i]);
        if constexpr (kZeroed) {
          total[i] = add(total[i], residual[u].get(i));
        }
        if constexpr (kRectified) {
          const bool positive = !(total[i] <= kLargestZero<T>);
          flags[u] |= static_cast<uint32_t>(positive) << i;
          total[i] = positive ? total[i] : 0.0f;
        }
      }
      output[u].set(total);
      if (op.output != nullptr && k + u < cursor.count()) {
        store_block(output[u], op.output + cursor.block(group[u]) * kBlock,
                    op.vectorized);
      }
    }
    if constexpr (kSplit) {
      encode_groups<RotatedKinds::kBoth>(
          op.format, hadamard, stream, cursor, k, normal, flags, op.codes,
          [&](int64_t g, const GroupRange& range) {
            range.store_split(static_cast<uint16_t*>(op.ranges) + 3 * g);
          });
    } else {
      encode_groups<RotatedKinds::kOne>(
          op.format, hadamard, stream, cursor, k, normal, flags, op.codes,
          [&](int64_t g, const GroupRange& range) {
            static_cast<uint32_t*>(op.ranges)[g] = range.pack();
          });
    }
    if constexpr (kZeroed) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int i = 0; i < kBlock; ++i) normal[u][i] = output[u].get(i);
      }
      encode_groups<RotatedKinds::kPassing>(
          op.act_format, hadamard, act_stream, cursor, k, normal, flags,
          op.act_codes, [&](int64_t g, const GroupRange& range) {
            op.act_ranges[g] = range.pack();
          });
    }
  }
}

}  // namespace

namespace rotated {

void norm_act(const NormActArguments& arguments, const Channels& channels,
              const NormActOutputs& outputs, bool codes_alone) {
  const Memory& input = arguments.input;
  const auto vector = [](const Memory& memory) {
    return static_cast<const float*>(memory.const_data_ptr());
  };
  const int bits = static_cast<int>(arguments.bits);
  const int act_bits = static_cast<int>(arguments.act_bits);
  const NormActPayload payload =
      codes_alone ? NormActPayload::kPlain : arguments.payload();
  const int value_bits = payload == NormActPayload::kSplit ? bits - 1 : bits;
  const GroupWalk walk = make_walk(channels, kResidentBlocks);
  const ChannelPlaces places(channels);
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const NormAct<T> op{
        static_cast<const T*>(input.const_data_ptr()),
        static_cast<const T*>(arguments.residual.const_data_ptr()),
        codes_alone ? nullptr
                    : static_cast<T*>(outputs.output.mutable_data_ptr()),
        vector(arguments.mean),
        vector(arguments.invstd),
        vector(arguments.weight),
        vector(arguments.bias),
        static_cast<uint8_t*>(outputs.codes.mutable_data_ptr()),
        outputs.ranges.mutable_data_ptr(),
        static_cast<uint8_t*>(outputs.act_codes.mutable_data_ptr()),
        static_cast<uint32_t*>(outputs.act_ranges.mutable_data_ptr()),
        {bits, value_bits},
        {act_bits, act_bits - 1},
        arguments.rounding.random,
        arguments.rounding.random.second(),
        places,
        is_aligned(input.const_data_ptr(), 16) &&
            is_aligned(arguments.residual.const_data_ptr(), 16) &&
            is_aligned(outputs.output.const_data_ptr(), 16)};
    dispatch_payload(payload, [&](auto kind) {
      places.dispatch([&](auto elements) {
        norm_act_kernel<T, decltype(kind)::value, decltype(elements)::value>
            <<<walk.grid(), walk.threads(), 0, current_stream()>>>(op, walk);
        check_launch();
      });
    });
  });
}

}  // namespace rotated
}  // namespace mmactnn
