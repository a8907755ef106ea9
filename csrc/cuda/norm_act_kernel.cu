#include <cstdint>
#include <optional>
#include <type_traits>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/norm_act_arguments.h"
#include "../common/philox.h"
#include "../common/rectified_codec.h"
#include "../common/rounding.h"
#include "bounds.h"
#include "channel_index.h"
#include "code_floats.h"
#include "group.h"
#include "launch.h"
#include "packed_block.h"
#include "rectified_codes.h"
#include "rectified_zero.h"
#include "rotated.h"
#include "workspace.h"

namespace mmactnn {
namespace {

// The blocks of a group that one thread holds: the more, the less the work
// that is done once a group and thread costs each element, as long as there
// are registers for enough threads. float32 can afford that work.
template <typename T, NormActPayload kPayload, int kBits>
constexpr int kNormBlocks =
    sizeof(T) == 4 ||
            (kPayload == NormActPayload::kPlainAndZeroed && kBits == kAnyBits)
        ? 2
        : 4;

// Small thread blocks leave fewer registers of a multiprocessor unused, which
// must suffice for as many of them.
constexpr int kNormThreads = 128;
constexpr int kNormResident = 5;

// One launch of norm_act(); pointers are those of its first row. The output
// may be the input.
template <typename T>
struct NormAct {
  const T* input;
  const T* residual;
  T* output;
  const float* mean;
  const float* invstd;
  const float* weight;  // null: none
  const float* bias;    // null: none
  uint8_t* codes;
  uint32_t* ranges;
  uint8_t* act_codes;
  uint32_t* act_ranges;
  uint64_t first_block;
  CountedStream random;
  CountedStream zeroed_random;
  ChannelIndex channels;
  int bits;
  int act_bits;
  int group_size;
  int lane_shift;   // binary logarithm of the threads that share a group
  bool vectorized;  // every full block starts on a 16-byte boundary
};

// One of both by its members: a reference to one of two objects would put them
// into memory.
__device__ __forceinline__ Bounds select(bool second, const Bounds& a,
                                         const Bounds& b) {
  return {second ? b.low : a.low, second ? b.high : a.high};
}

// The bounds of the group. Where there are two kinds, even lanes return the
// bounds of the first, and odd ones those of the second.
template <bool kTwo>
__device__ __forceinline__ Bounds reduce_bounds(const Bounds& first,
                                                const Bounds& second, int lanes,
                                                bool odd) {
  Bounds mine = first;
  int step = 1;
  if constexpr (kTwo) {
    mine = select(odd, first, second);
    mine.include(select(odd, second, first).from_lane(1));
    step = 2;
  }
  for (; step < lanes; step *= 2) mine.include(mine.from_lane(step));
  return mine;
}

__device__ __forceinline__ Coding select(bool second, const Coding& a,
                                         const Coding& b) {
  return {second ? b.low : a.low, second ? b.scale : a.scale};
}

// The second where bit `i` of `flags` is set. In assembly, because the compiler
// moves the bit to the lowest place before it tests it.
__device__ __forceinline__ Coding select_by_flag(uint32_t flags, int i,
                                                 const Coding& a,
                                                 const Coding& b) {
  Coding selected;
  asm("{\n\t"
      ".reg .pred set;\n\t"
      ".reg .b32 bit;\n\t"
      "and.b32 bit, %2, %3;\n\t"
      "setp.ne.u32 set, bit, 0;\n\t"
      "selp.f32 %0, %5, %4, set;\n\t"
      "selp.f32 %1, %7, %6, set;\n\t"
      "}"
      : "=f"(selected.low), "=f"(selected.scale)
      : "r"(flags), "r"(1u << i), "f"(a.low), "f"(b.low), "f"(a.scale),
        "f"(b.scale));
  return selected;
}

// Shape of the groups of a tensor, as far as kernels are compiled for it.
enum class NormActShape {
  kColumns,  // whole ones, ChannelIndex::vectorized
  kWhole,    // whole ones
  kAny,
};

template <NormActShape kShape>
using ShapeConstant = std::integral_constant<NormActShape, kShape>;

// kBits is the width of all codes, or kAnyBits.
template <typename T, NormActPayload kPayload, int kBits, NormActShape kShape>
__global__ void __launch_bounds__(kNormThreads, kNormResident)
    norm_act_kernel(const NormAct<T> op, const Launch launch) {
  constexpr bool kSplit = kPayload == NormActPayload::kSplit;
  constexpr bool kZeroed = kPayload == NormActPayload::kPlainAndZeroed;
  constexpr int kBlocks = kNormBlocks<T, kPayload, kBits>;

  const uint32_t thread = blockIdx.x * kNormThreads + threadIdx.x;
  const uint32_t index = thread >> op.lane_shift;
  const int lanes = 1 << op.lane_shift;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const bool odd = lane % 2 != 0;
  // Whole warps stay: shuffles name every lane of the warp.
  // Threads past the end read the first group, and write nothing.
  const bool inside = index < launch.groups;
  const uint32_t group = inside ? index : 0u;
  const uint32_t row = launch.by_groups_per_row.quotient(group);
  const uint32_t row_numel = static_cast<uint32_t>(launch.row_numel);
  const uint32_t start = (group - row * launch.groups_per_row) * op.group_size;
  const int count =
      inside ? static_cast<int>(
                   min(static_cast<uint32_t>(op.group_size), row_numel - start))
             : 0;
  const int64_t base = static_cast<int64_t>(row) * launch.row_numel + start;

  // All reads first, so that they are under way together.
  PackedBlock<T> input[kBlocks];
  PackedBlock<T> residual[kZeroed ? kBlocks : 1];
  // Elements from the start of a block to the end of the group.
  const auto left_of = [&](int b) {
    return kShape == NormActShape::kAny ? count - (b * lanes + lane) * kBlock
                                        : kBlock;
  };
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int begin = (b * lanes + lane) * kBlock;
    const int left = left_of(b);
    if (kShape != NormActShape::kAny || (op.vectorized && left >= kBlock)) {
      input[b].load(op.input + base + begin);
      if constexpr (kZeroed) residual[b].load(op.residual + base + begin);
    } else if (left > 0) {
      input[b].load(op.input + base + begin, 0, left);
      if constexpr (kZeroed) {
        residual[b].load(op.residual + base + begin, 0, left);
      }
    }
  }
  // The compiler would put reads off until there are more registers.
  __syncwarp();

  float normal[kBlocks][kBlock];
  PackedBlock<T> output[kBlocks];
  uint32_t positives = 0;  // a bit for each element, if there is a rectifier
  Bounds first, second;
  PositiveBounds<T> outputs;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int left = left_of(b);
    if (left <= 0) continue;
    const int begin = (b * lanes + lane) * kBlock;
    float total[kBlock];
    ChannelIndex::Place place = op.channels.of(start + begin);
    if (kShape != NormActShape::kColumns && place.left >= kBlock) {
      const ChannelNorm norm{op.mean[place.channel], op.invstd[place.channel],
                             load_channel(op.weight, place.channel, kNoWeight),
                             load_channel(op.bias, place.channel, kNoBias)};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        normal[b][i] = norm.normalise(input[b].get(i));
        total[i] = norm.scale(normal[b][i]);
      }
    } else if (kShape == NormActShape::kColumns ||
               (op.channels.vectorized && left >= kBlock)) {
      const ChannelWords<> mean(op.mean + place.channel);
      const ChannelWords<> invstd(op.invstd + place.channel);
      const ChannelWords<> weight(op.weight + place.channel);
      const ChannelWords<> bias(op.bias + place.channel);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const ChannelNorm norm{mean.item[i], invstd.item[i], weight.item[i],
                               bias.item[i]};
        normal[b][i] = norm.normalise(input[b].get(i));
        total[i] = norm.scale(normal[b][i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const ChannelNorm norm{
            op.mean[place.channel], op.invstd[place.channel],
            load_channel(op.weight, place.channel, kNoWeight),
            load_channel(op.bias, place.channel, kNoBias)};
        normal[b][i] = norm.normalise(input[b].get(i));
        total[i] = norm.scale(normal[b][i]);
        if (i + 1 < left) place = op.channels.next(place);
      }
    }
    if constexpr (kZeroed) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        total[i] = add(total[i], residual[b].get(i));
      }
    }
    if (left < kBlock) {
      // Elements past the end repeat the first one, to widen no range.
#pragma unroll
      for (int i = 1; i < kBlock; ++i) {
        if (i >= left) {
          normal[b][i] = normal[b][0];
          total[i] = total[0];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if constexpr (kPayload == NormActPayload::kPlain) {
        first.include(normal[b][i]);
      } else {
        const bool positive = !(total[i] <= kLargestZero<T>);
        if (!positive) total[i] = 0.0f;
        if (positive) positives |= 1u << (b * kBlock + i);
        if (kSplit && positive) {
          second.include(normal[b][i]);
        } else {
          first.include(normal[b][i]);
        }
      }
    }
    output[b].set(total);
    if constexpr (kZeroed) outputs.include(output[b]);
    T* target = op.output + base + begin;
    if (kShape != NormActShape::kAny) {
      if (inside) output[b].store(target);
    } else if (op.vectorized && left >= kBlock) {
      output[b].store(target);
    } else {
      output[b].store(target, left);
    }
  }

  constexpr bool kTwo = kPayload != NormActPayload::kPlain;
  if constexpr (kZeroed) second = outputs.finish();
  Bounds mine = reduce_bounds<kTwo>(first, second, lanes, odd);
  bool all_finite = mine.all_finite();
  // Warps with several groups take the slow path together when one of their
  // groups needs it.
  if (__any_sync(0xFFFFFFFFu, !all_finite)) {
    // Once more, without NaN and inf.
    first = second = Bounds();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int left = left_of(b);
      if (left <= 0) continue;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const bool positive =
            kSplit && (positives & (1u << (b * kBlock + i))) != 0u;
        if (is_finite(normal[b][i])) {
          if (positive) {
            second.include(normal[b][i]);
          } else {
            first.include(normal[b][i]);
          }
        }
        if constexpr (kZeroed) {
          const float value = output[b].get(i);
          if (is_positive(value) && is_finite(value)) second.include(value);
        }
      }
    }
    mine = reduce_bounds<kTwo>(first, second, lanes, odd);
  }

  const int bits = kBits == kAnyBits ? op.bits : kBits;
  const int act_bits = kBits == kAnyBits ? op.act_bits : kBits;
  const uint32_t max_code = kSplit ? max_split_code(bits) : max_code_of(bits);
  const uint32_t second_max = kSplit ? max_code : max_zeroed_code(act_bits);
  const Extent extent{mine.low, mine.high, all_finite};
  const uint32_t mine_max = kTwo && odd && !kSplit ? second_max : max_code;
  const Range range = make_kind_range(extent, mine_max);
  const Coding coding{range.low, encode_scale(range, mine_max)};
  Coding first_coding = coding, second_coding = coding;
  if constexpr (kTwo) {
    const Coding other{__shfl_xor_sync(0xFFFFFFFFu, coding.low, 1),
                       __shfl_xor_sync(0xFFFFFFFFu, coding.scale, 1)};
    first_coding = select(odd, coding, other);
    second_coding = select(odd, other, coding);
  }
  if (!inside) return;
  if constexpr (kSplit) {
    if (lane < 2)
      op.ranges[2 * static_cast<int64_t>(index) + lane] = range.pack();
  } else {
    if (lane == 0) op.ranges[index] = range.pack();
    if (kZeroed && lane == 1) op.act_ranges[index] = range.pack();
  }
  const bool special = first_coding.special() || second_coding.special();

  const int64_t first_block =
      static_cast<int64_t>(row) * launch.row_blocks + start / kBlock;
  const uint32_t integer = opaque_integer_float(row_numel);
  const int fraction = fraction_bits(max_code);
  const int second_fraction = fraction_bits(second_max);
  const PairStream stream = op.random.current_pair();
  PairStream zeroed_stream{};
  if constexpr (kZeroed) zeroed_stream = op.zeroed_random.current_pair();
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int left = left_of(b);
    if (left <= 0) continue;
    const int64_t block = first_block + b * lanes + lane;
    const uint64_t random_block = op.first_block + static_cast<uint64_t>(block);
    const BlockBits random_bits(stream, random_block);
    const auto rounding = [&](int i) {
      return random_bits.rounding(i, fraction, integer);
    };
    const auto positive = [&](int i) {
      return kSplit && (positives & (1u << (b * kBlock + i))) != 0u;
    };
    uint32_t sums[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const Coding kind = kSplit ? select_by_flag(positives, b * kBlock + i,
                                                  first_coding, second_coding)
                                 : first_coding;
      sums[i] = code_sum<kBits>(normal[b][i], kind, rounding(i), max_code);
    }
    if (special) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const Coding kind = select(positive(i), first_coding, second_coding);
        sums[i] = special_sum<false>(normal[b][i], kind, rounding(i), max_code);
      }
    }
    const uint32_t flags = positives >> (b * kBlock) & 0xFFu;
    if constexpr (kSplit && !kSpread<kBits>) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (positive(i)) sums[i] += 1u << (fraction + bits - 1);
      }
    }
    CodeWord<kBits> word = pack_sums<kBits>(sums, bits, fraction);
    if constexpr (kSplit && kSpread<kBits>) {
      word |= spread_flags<kBits>(flags) << (kBits - 1);
    }
    store_word<kBits>(word, bits, left, op.codes + block * bits);
    if constexpr (kZeroed) {
      const BlockBits zeroed_bits(zeroed_stream, random_block);
      const auto zeroed_rounding = [&](int i) {
        return zeroed_bits.rounding(i, second_fraction, integer);
      };
      word = zeroed_word<kBits>(output[b], flags, second_coding, special,
                                zeroed_rounding, act_bits);
      store_word<kBits>(word, act_bits, left, op.act_codes + block * act_bits);
    }
  }
}

// Calls `body` with the width of all codes, kAnyBits for those of the one
// kernel, and a NormActShape as constants.
template <typename Body>
void dispatch_kernels(const NormActArguments& arguments, bool whole,
                      bool columns, const Body& body) {
  const bool equal = arguments.payload() != NormActPayload::kPlainAndZeroed ||
                     arguments.bits == arguments.act_bits;
  const auto with_shape = [&](auto width) {
    if (columns) {
      body(width, ShapeConstant<NormActShape::kColumns>{});
    } else {
      body(width, ShapeConstant<NormActShape::kWhole>{});
    }
  };
  if (whole && equal && arguments.bits == 2) {
    with_shape(Constant<2>{});
  } else if (whole && equal && arguments.bits == 3) {
    with_shape(Constant<3>{});
  } else if (whole && equal && arguments.bits == 4) {
    with_shape(Constant<4>{});
  } else if (whole && equal && arguments.bits == 8) {
    with_shape(Constant<8>{});
  } else {
    body(Constant<kAnyBits>{}, ShapeConstant<NormActShape::kAny>{});
  }
}

template <typename T, NormActPayload kPayload>
void launch_payload(const NormActArguments& arguments, const Geometry& geometry,
                    const NormAct<T>& whole, cudaStream_t stream) {
  NormAct<T> op = whole;
  constexpr int kRanges = kPayload == NormActPayload::kSplit ? 2 : 1;
  for_each_launch(
      geometry, whole.input, [&](const Launch& launch, int64_t row) {
        const int64_t element = row * geometry.row_numel;
        const int64_t block = row * launch.row_blocks;
        const int64_t group = row * geometry.groups_per_row();
        op.vectorized = launch.vectorized && is_aligned(whole.output, 16) &&
                        is_aligned(whole.residual, 16);
        op.input = whole.input + element;
        op.output = whole.output + element;
        op.codes = whole.codes + block * op.bits;
        op.ranges = whole.ranges + group * kRanges;
        if constexpr (kPayload == NormActPayload::kPlainAndZeroed) {
          op.residual = whole.residual + element;
          op.act_codes = whole.act_codes + block * op.act_bits;
          op.act_ranges = whole.act_ranges + group;
        }
        op.first_block = static_cast<uint64_t>(block);
        const bool whole =
            op.vectorized && geometry.row_numel % geometry.group_size == 0;
        const bool columns = op.channels.vectorized;
        dispatch_kernels(
            arguments, whole, columns, [&](auto width, auto shape) {
              constexpr int kBits = decltype(width)::value;
              constexpr NormActShape kShape = decltype(shape)::value;
              const auto lanes =
                  static_cast<int>(geometry.group_size / kBlock /
                                   kNormBlocks<T, kPayload, kBits>);
              op.lane_shift = 0;
              while ((1 << op.lane_shift) < lanes) ++op.lane_shift;
              const int64_t threads = int64_t{launch.groups} * lanes;
              norm_act_kernel<T, kPayload, kBits, kShape>
                  <<<static_cast<unsigned int>((threads + kNormThreads - 1) /
                                               kNormThreads),
                     kNormThreads, 0, stream>>>(op, launch);
              check_launch();
            });
      });
}

}  // namespace

namespace cuda {

void norm_act(const NormActArguments& arguments, const Channels& channels,
              const Geometry& geometry, const NormActOutputs& outputs) {
  const bool rotated = arguments.rotated(geometry);
  const bool act_rotated = arguments.act_rotated(geometry);
  const bool zeroed = arguments.payload() == NormActPayload::kPlainAndZeroed;
  if (rotated && (act_rotated || !zeroed)) {
    return rotated::norm_act(arguments, channels, outputs, false);
  }
  const Memory& input = arguments.input;
  auto* codes = static_cast<uint8_t*>(outputs.codes.mutable_data_ptr());
  auto* ranges = static_cast<uint32_t*>(outputs.ranges.mutable_data_ptr());
  // Widths of which one alone has rotated codes are rare, and take two kernels.
  std::optional<Workspace> unused;
  if (rotated) {
    rotated::norm_act(arguments, channels, outputs, true);
    unused.emplace(outputs.codes.numel() / 4 + geometry.groups());
    ranges = reinterpret_cast<uint32_t*>(unused->data());
    codes = reinterpret_cast<uint8_t*>(ranges + geometry.groups());
  }
  const auto* mean = static_cast<const float*>(arguments.mean.const_data_ptr());
  const auto* invstd =
      static_cast<const float*>(arguments.invstd.const_data_ptr());
  const auto* weight =
      static_cast<const float*>(arguments.weight.const_data_ptr());
  const auto* bias = static_cast<const float*>(arguments.bias.const_data_ptr());
  const ChannelIndex index =
      index_channels(channels, {mean, invstd, weight, bias});
  const cudaStream_t stream = current_stream();
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const NormAct<T> op{
        static_cast<const T*>(input.const_data_ptr()),
        static_cast<const T*>(arguments.residual.const_data_ptr()),
        static_cast<T*>(outputs.output.mutable_data_ptr()),
        mean,
        invstd,
        weight,
        bias,
        codes,
        ranges,
        static_cast<uint8_t*>(outputs.act_codes.mutable_data_ptr()),
        static_cast<uint32_t*>(outputs.act_ranges.mutable_data_ptr()),
        0,
        arguments.rounding.random,
        arguments.rounding.random.second(),
        index,
        static_cast<int>(arguments.bits),
        static_cast<int>(arguments.act_bits),
        static_cast<int>(geometry.group_size),
        0,
        false};
    dispatch_payload(arguments.payload(), [&](auto payload) {
      launch_payload<T, decltype(payload)::value>(arguments, geometry, op,
                                                  stream);
    });
  });
  if (act_rotated) {
    rotated::relu_codes(outputs.output, outputs.output, outputs.act_codes,
                        outputs.act_ranges, geometry,
                        static_cast<int>(arguments.act_bits),
                        arguments.rounding.random.second());
  }
}

}  // namespace cuda
}  // namespace mmactnn
