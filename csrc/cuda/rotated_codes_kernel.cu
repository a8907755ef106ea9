#include <cstdint>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/rectified_codec.h"
#include "../common/rotation.h"
#include "channel_places.h"
#include "group_walk.h"
#include "launch.h"
#include "packed_block.h"
#include "rotated.h"
#include "rotated_decoder.h"
#include "rotated_encoder.h"
#include "rotation.h"

namespace mmactnn {
namespace {

// Groups that a warp takes at a time: the more, the less the work costs that is
// done once for all of them, as long as there are registers.
constexpr int kEncodedAtOnce = 4;
constexpr int kDecodedAtOnce = 4;
// Thread blocks of a multiprocessor that registers must suffice for.
constexpr int kEncodeResident = 2;
constexpr int kDecodeResident = 4;
constexpr int kSplitResident = 3;

// Location of the codes of rows with a width each. A launch takes those of one
// width and leaves the others to another one.
struct OwnRows {
  CodeLayout layout;
  Divider by_groups_per_row;  // of less than 2^31 groups
  int bits;

  // The first byte of a group's row, and its groups before; none if the row is
  // not to be taken.
  struct Place {
    bool taken;
    int64_t begin;   // of the row's codes
    int64_t blocks;  // of the tensor before the row
  };
  __device__ __forceinline__ Place of(int64_t group) const {
    const uint32_t row =
        by_groups_per_row.quotient(static_cast<uint32_t>(group));
    const RowCodes codes = layout.row<kAnyBits>(row);
    return {codes.bits == bits, codes.begin,
            int64_t{row} * by_groups_per_row.divisor * (kRotation / kBlock)};
  }
};

// The same of rows of one width.
struct UniformRows {
  static __device__ __forceinline__ OwnRows::Place of(int64_t) {
    return {true, 0, 0};
  }
};

template <typename T, typename Rows>
__global__ void __launch_bounds__(kThreads, kEncodeResident)
    quantize_kernel(const T* __restrict__ input, uint8_t* __restrict__ codes,
                    uint32_t* __restrict__ ranges, Rows rows,
                    RotatedCodes format, CountedStream random, GroupWalk walk,
                    bool vectorized) {
  const GroupCursor cursor(walk);
  const Hadamard hadamard;
  const PairStream stream = random.current_pair();
  for (uint32_t k = 0; k < cursor.count(); k += kEncodedAtOnce) {
    PackedBlock<T> blocks[kEncodedAtOnce];
    int64_t group[kEncodedAtOnce];
    OwnRows::Place place[kEncodedAtOnce];
    bool any = false;
#pragma unroll
    for (int u = 0; u < kEncodedAtOnce; ++u) {
      group[u] = cursor.group(k + u);
      place[u] = rows.of(group[u]);
      any |= place[u].taken;
    }
    if (!any) continue;
#pragma unroll
    for (int u = 0; u < kEncodedAtOnce; ++u) {
      load_block(blocks[u], input + cursor.block(group[u]) * kBlock,
                 vectorized);
    }
    const BlockSigns<kEncodedAtOnce> signs(stream, [&](int u) {
      return static_cast<uint64_t>(cursor.group(k + u));
    });
    float values[kEncodedAtOnce][kBlock];
    const uint32_t flags[kEncodedAtOnce] = {};
    uint32_t words[kEncodedAtOnce];
    GroupRange range[kEncodedAtOnce];
#pragma unroll
    for (int u = 0; u < kEncodedAtOnce; ++u) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) values[u][i] = blocks[u].get(i);
    }
    encode_rotated<RotatedKinds::kOne>(format, hadamard, signs, values, flags,
                                       words, range);
#pragma unroll
    for (int u = 0; u < kEncodedAtOnce; ++u) {
      if (k + u >= cursor.count() || !place[u].taken) continue;
      store_block_codes(codes + place[u].begin,
                        cursor.block(group[u]) - place[u].blocks, format.stride,
                        words[u]);
      if (threadIdx.x % kWarp == 0) ranges[group[u]] = range[u].pack();
    }
  }
}

template <typename T, typename Rows>
__global__ void __launch_bounds__(kThreads, kDecodeResident)
    dequantize_kernel(RotatedSource source, T* __restrict__ output, Rows rows,
                      GroupWalk walk, bool vectorized) {
  const GroupCursor cursor(walk);
  const RotatedDecoder decoder(source);
  for (uint32_t k = 0; k < cursor.count(); k += kDecodedAtOnce) {
    uint32_t words[kDecodedAtOnce];
    Range range[kDecodedAtOnce];
    int64_t group[kDecodedAtOnce];
    bool taken[kDecodedAtOnce], any = false;
#pragma unroll
    for (int u = 0; u < kDecodedAtOnce; ++u) {
      group[u] = cursor.group(k + u);
      const OwnRows::Place place = rows.of(group[u]);
      taken[u] = place.taken && k + u < cursor.count();
      any |= taken[u];
      words[u] = taken[u]
                     ? source.load_word(cursor.block(group[u]) - place.blocks,
                                        place.begin)
                     : 0u;
      range[u] = source.plain_range(group[u]);
    }
    if (!any) continue;
    const auto signs = decoder.signs<kDecodedAtOnce>(
        [&](int u) { return cursor.group(k + u); });
#pragma unroll
    for (int u = 0; u < kDecodedAtOnce; ++u) {
      float y[kBlock], values[kBlock];
      decoder.transform(decoder.spread(words[u]), signs.inner(u), y);
      const float scale = decoder.unit() * range[u].step;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        values[i] = clamp_finite(
            fmaf(signs.flip_outer(u, i, y[i]), scale, range[u].low),
            Number<T>::kLargest);
      }
      if (!taken[u]) continue;
      PackedBlock<T> packed;
      packed.set(values);
      store_block(packed, output + cursor.block(group[u]) * kBlock, vectorized);
    }
  }
}

// `output` may be `input`.
template <typename T>
__global__ void __launch_bounds__(kThreads, kEncodeResident)
    relu_codes_kernel(const T* input, T* output, uint8_t* __restrict__ codes,
                      uint32_t* __restrict__ ranges, RotatedCodes format,
                      CountedStream random, GroupWalk walk, bool vectorized) {
  const GroupCursor cursor(walk);
  const Hadamard hadamard;
  const PairStream stream = random.current_pair();
  for (uint32_t k = 0; k < cursor.count(); k += kEncodedAtOnce) {
    PackedBlock<T> blocks[kEncodedAtOnce];
    int64_t group[kEncodedAtOnce];
#pragma unroll
    for (int u = 0; u < kEncodedAtOnce; ++u) {
      group[u] = cursor.group(k + u);
      load_block(blocks[u], input + cursor.block(group[u]) * kBlock,
                 vectorized);
    }
    const BlockSigns<kEncodedAtOnce> signs(stream, [&](int u) {
      return static_cast<uint64_t>(cursor.group(k + u));
    });
    float values[kEncodedAtOnce][kBlock];
    uint32_t flags[kEncodedAtOnce], words[kEncodedAtOnce];
    GroupRange range[kEncodedAtOnce];
#pragma unroll
    for (int u = 0; u < kEncodedAtOnce; ++u) {
      flags[u] = 0;
      float rectified[kBlock];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        values[u][i] = blocks[u].get(i);
        const bool positive = is_positive(values[u][i]);
        flags[u] |= static_cast<uint32_t>(positive) << i;
        rectified[i] = positive ? values[u][i] : 0.0f;
      }
      if (k + u < cursor.count()) {
        PackedBlock<T> packed;
        packed.set(rectified);
        store_block(packed, output + cursor.block(group[u]) * kBlock,
                    vectorized);
      }
    }
    encode_rotated<RotatedKinds::kPassing>(format, hadamard, signs, values,
                                           flags, words, range);
#pragma unroll
    for (int u = 0; u < kEncodedAtOnce; ++u) {
      if (k + u >= cursor.count()) break;
      store_block_codes(codes, cursor.block(group[u]), format.stride, words[u]);
      if (threadIdx.x % kWarp == 0) ranges[group[u]] = range[u].pack();
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kDecodeResident)
    dequantize_zeroed_kernel(RotatedSource source, T* __restrict__ output,
                             GroupWalk walk, bool vectorized) {
  const GroupCursor cursor(walk);
  const RotatedDecoder decoder(source);
  for (uint32_t k = 0; k < cursor.count(); k += kDecodedAtOnce) {
    uint32_t words[kDecodedAtOnce];
    Range range[kDecodedAtOnce];
    int64_t group[kDecodedAtOnce];
#pragma unroll
    for (int u = 0; u < kDecodedAtOnce; ++u) {
      group[u] = cursor.group(k + u);
      words[u] = source.load_word(cursor.block(group[u]));
      range[u] = source.plain_range(group[u]);
    }
    const auto signs = decoder.signs<kDecodedAtOnce>(
        [&](int u) { return cursor.group(k + u); });
#pragma unroll
    for (int u = 0; u < kDecodedAtOnce; ++u) {
      float y[kBlock], values[kBlock];
      const BlockPairs spread = decoder.spread(words[u]);
      decoder.transform(spread, signs.inner(u), y);
      const float scale = decoder.unit() * range[u].step;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const float value = clamp_finite(
            fmaf(signs.flip_outer(u, i, y[i]), scale, range[u].low),
            Number<T>::kLargest);
        values[i] = spread_flag(spread, i) ? value : 0.0f;
      }
      if (k + u >= cursor.count()) continue;
      PackedBlock<T> packed;
      packed.set(values);
      store_block(packed, output + cursor.block(group[u]) * kBlock, vectorized);
    }
  }
}

template <typename T, bool kElements>
__global__ void __launch_bounds__(kThreads, kSplitResident)
    dequantize_split_kernel(RotatedSource source, T* __restrict__ output,
                            const float* __restrict__ weight,
                            const float* __restrict__ bias,
                            ChannelPlaces channels, GroupWalk walk,
                            bool vectorized) {
  const GroupCursor cursor(walk);
  if (cursor.count() == 0) return;
  const RotatedDecoder decoder(source);
  const PlaceValues<kElements> weights(channels, cursor.place(), weight,
                                       kNoWeight);
  const PlaceValues<kElements> biases(channels, cursor.place(), bias, kNoBias);
  for (uint32_t k = 0; k < cursor.count(); k += kDecodedAtOnce) {
    uint32_t words[kDecodedAtOnce];
    Range range[kDecodedAtOnce];
    int64_t group[kDecodedAtOnce];
#pragma unroll
    for (int u = 0; u < kDecodedAtOnce; ++u) {
      group[u] = cursor.group(k + u);
      words[u] = source.load_word(cursor.block(group[u]));
      range[u] = source.split_range(group[u]).passing();
    }
    const auto signs = decoder.signs<kDecodedAtOnce>(
        [&](int u) { return cursor.group(k + u); });
#pragma unroll
    for (int u = 0; u < kDecodedAtOnce; ++u) {
      float y[kBlock], values[kBlock];
      const BlockPairs spread = decoder.spread(words[u]);
      decoder.transform(spread, signs.inner(u), y);
      const float scale = decoder.unit() * range[u].step;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const float normal =
            fmaf(signs.flip_outer(u, i, y[i]), scale, range[u].low);
        const ChannelNorm norm{0.0f, 1.0f, weights.of(i), biases.of(i)};
        const float value =
            clamp_if_finite(norm.scale(normal), Number<T>::kLargest);
        values[i] = spread_flag(spread, i) ? value : 0.0f;
      }
      if (k + u >= cursor.count()) continue;
      PackedBlock<T> packed;
      packed.set(values);
      store_block(packed, output + cursor.block(group[u]) * kBlock, vectorized);
    }
  }
}

// Calls `body` with the widths of rotated codes that rows have, and returns
// whether there are no others.
template <typename Body>
bool for_each_width(const CodeLayout& layout, const Body& body) {
  if (layout.row_bits == nullptr) {
    if (layout.bits > kMaxRotatedBits) return false;
    body(layout.bits);
    return true;
  }
  for (int bits = 1; bits <= kMaxRotatedBits; ++bits) body(bits);
  return false;
}

// Calls `body` with the location of rows of a width.
template <typename Body>
void dispatch_rows(const Geometry& geometry, const CodeLayout& layout, int bits,
                   const Body& body) {
  if (layout.row_bits == nullptr) return body(UniformRows{});
  STD_TORCH_CHECK(geometry.groups() <= kMaxIndex,
                  "a tensor with bits for each sample may have at most ",
                  kMaxIndex, " groups, got ", geometry.groups());
  body(OwnRows{
      layout, Divider(static_cast<uint32_t>(geometry.groups_per_row())), bits});
}

}  // namespace

namespace rotated {

bool quantize(const Memory& input, const Memory& codes, const Memory& ranges,
              const Geometry& geometry, const CodeLayout& layout,
              const CountedStream& random) {
  const GroupWalk walk = make_walk(geometry, kEncodeResident);
  return for_each_width(layout, [&](int bits) {
    dispatch_dtype(input.dtype(), [&](auto type) {
      using T = typename decltype(type)::type;
      const T* source = static_cast<const T*>(input.const_data_ptr());
      dispatch_rows(geometry, layout, bits, [&](const auto& rows) {
        quantize_kernel<<<walk.grid(), walk.threads(), 0, current_stream()>>>(
            source, static_cast<uint8_t*>(codes.mutable_data_ptr()),
            static_cast<uint32_t*>(ranges.mutable_data_ptr()), rows,
            RotatedCodes{bits, bits}, random, walk, is_aligned(source, 16));
        check_launch();
      });
    });
  });
}

bool dequantize(const Memory& codes, const Memory& ranges, const Memory& output,
                const Geometry& geometry, const CodeLayout& layout,
                const DrawnBits& drawn) {
  const GroupWalk walk = make_walk(geometry, kDecodeResident);
  return for_each_width(layout, [&](int bits) {
    const RotatedSource source(codes, ranges, geometry, {bits, bits}, drawn);
    dispatch_dtype(output.dtype(), [&](auto type) {
      using T = typename decltype(type)::type;
      T* target = static_cast<T*>(output.mutable_data_ptr());
      dispatch_rows(geometry, layout, bits, [&](const auto& rows) {
        dequantize_kernel<<<walk.grid(), walk.threads(), 0, current_stream()>>>(
            source, target, rows, walk, is_aligned(target, 16));
        check_launch();
      });
    });
  });
}

void relu_codes(const Memory& input, const Memory& output, const Memory& codes,
                const Memory& ranges, const Geometry& geometry, int bits,
                const CountedStream& random) {
  const GroupWalk walk = make_walk(geometry, kEncodeResident);
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    relu_codes_kernel<T><<<walk.grid(), walk.threads(), 0, current_stream()>>>(
        source, target, static_cast<uint8_t*>(codes.mutable_data_ptr()),
        static_cast<uint32_t*>(ranges.mutable_data_ptr()),
        RotatedCodes{bits, bits - 1}, random, walk,
        is_aligned(source, 16) && is_aligned(target, 16));
    check_launch();
  });
}

void dequantize_zeroed(const Memory& codes, const Memory& ranges,
                       const Memory& output, const Geometry& geometry, int bits,
                       const DrawnBits& drawn) {
  const GroupWalk walk = make_walk(geometry, kDecodeResident);
  const RotatedSource source(codes, ranges, geometry, {bits, bits - 1}, drawn);
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    dequantize_zeroed_kernel<T>
        <<<walk.grid(), walk.threads(), 0, current_stream()>>>(
            source, target, walk, is_aligned(target, 16));
    check_launch();
  });
}

void dequantize_split(const Memory& codes, const Memory& ranges,
                      const Memory& weight, const Memory& bias,
                      const Memory& output, const Geometry& geometry,
                      const Channels& channels, int bits,
                      const DrawnBits& drawn) {
  const GroupWalk walk = make_walk(channels, kSplitResident);
  const RotatedSource source(codes, ranges, geometry, {bits, bits - 1}, drawn);
  const ChannelPlaces places(channels);
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    places.dispatch([&](auto elements) {
      dequantize_split_kernel<T, decltype(elements)::value>
          <<<walk.grid(), walk.threads(), 0, current_stream()>>>(
              source, target,
              static_cast<const float*>(weight.const_data_ptr()),
              static_cast<const float*>(bias.const_data_ptr()), places, walk,
              is_aligned(target, 16));
      check_launch();
    });
  });
}

}  // namespace rotated
}  // namespace mmactnn
