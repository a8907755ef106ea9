#include <algorithm>
#include <type_traits>

#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/rounding.h"
#include "code_floats.h"
#include "dither_floats.h"
#include "group.h"
#include "group_words.h"
#include "launch.h"
#include "packed_block.h"
#include "rotated.h"
#include "words.h"

namespace mmactnn {
namespace {

// Calls `body` with the width as a Constant: kBits where it is known.
template <int kBits, typename Body>
__device__ __forceinline__ void with_width(int bits, const Body& body) {
  if constexpr (kBits != kAnyBits) {
    body(Constant<kBits>{});
  } else {
    dispatch_bits(bits, body);
  }
}

// The same, but kAnyBits for all widths below kMaxBits, which mainly differ in
// the written codes: kernels of single widths would each have to load their
// instructions, one after the other where rows are sorted by width.
template <int kBits, typename Body>
__device__ __forceinline__ void with_encoder(int bits, const Body& body) {
  if constexpr (kBits != kAnyBits) {
    body(Constant<kBits>{});
  } else if (bits == kMaxBits) {
    body(Constant<kMaxBits>{});
  } else {
    body(Constant<kAnyBits>{});
  }
}

// Elements that a thread of quantize_kernel() holds, and place of its codes.
template <typename T>
struct GroupCodes {
  Share<T> share;
  Extent extent;
  int count;    // elements of the group
  int padding;  // elements that may follow the end of the row
  int lane;
  int lanes;
  int bits;
  uint64_t first_block;  // that random bits count from
  uint8_t* codes;

  // Elements from the start of a block to the end of the group.
  __device__ __forceinline__ int left(int b) const {
    return count - (b * lanes + lane) * kBlock;
  }
  template <int kBits>
  __device__ __forceinline__ void store(int b, CodeWord<kBits> word,
                                        int left) const {
    store_word<kBits>(word, kBits, left, codes + (b * lanes + lane) * kBits);
  }
};

// Encoder of kBits; with kAnyBits, of any width below kMaxBits.
template <int kBits>
struct Width {
  static constexpr bool kAny = kBits == kAnyBits;
  static constexpr uint32_t kLargestCode =
      max_code_of(kAny ? kMaxBits - 1 : kBits);
  static constexpr int kFraction = fraction_bits(kLargestCode);
  // Whether the sum of a value may exceed that of the highest code.
  static constexpr bool kClamped = kLargestCode > kMaxUnclampedCode;

  int bits;

  explicit __device__ __forceinline__ Width(int any)
      : bits(kAny ? any : kBits) {}
  __device__ __forceinline__ uint32_t max_code() const {
    return max_code_of(bits);
  }
  __device__ __forceinline__ CodeWord<kBits> pack(const uint32_t* sums) const {
    return pack_sums<kBits>(sums, bits, kFraction);
  }
};

// kWhole: there is no end of a row in the group.
template <int kBits, bool kWhole, typename T>
__device__ __forceinline__ void store_group(const GroupCodes<T>& group,
                                            const CodeWord<kBits>* words) {
  with_width<kBits>(group.bits, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    CodeWord<kWidth> own[kBlocksPerThread];
#pragma unroll
    for (int b = 0; b < kBlocksPerThread; ++b) {
      own[b] = static_cast<CodeWord<kWidth>>(words[b]);
    }
    if constexpr (kWhole && kMeet<kWidth>) {
      store_whole_group<kWidth>(own, group.lane, group.lanes, group.codes);
    } else {
#pragma unroll
      for (int b = 0; b < kBlocksPerThread; ++b) {
        const int left = kWhole ? kBlock : group.left(b);
        if (!kWhole && left + group.padding <= 0) continue;
        group.template store<kWidth>(b, own[b], left);
      }
    }
  });
}

template <int kBits, bool kWhole, typename T>
__device__ __forceinline__ void encode_group(const GroupCodes<T>& group,
                                             Range range, PairStream stream) {
  const Width<kBits> width(group.bits);
  const float scale = encode_scale(range, width.max_code());
  const uint32_t largest = largest_sum(width.max_code());
  const uint32_t integer = opaque_integer_float(group.count);
  CodeWord<kBits> words[kBlocksPerThread];
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    const BlockBits bits(stream,
                         group.first_block + b * group.lanes + group.lane);
    uint32_t sums[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      sums[i] = encode_sum(group.share.blocks[b].get(i), range.low, scale,
                           bits.rounding(i, width.kFraction, integer));
      if constexpr (width.kClamped) sums[i] = min(sums[i], largest);
    }
    words[b] = width.pack(sums);
  }
  store_group<kBits, kWhole>(group, words);
}

template <int kBits, typename T>
__device__ __forceinline__ void encode_special_group(const GroupCodes<T>& group,
                                                     Range range) {
  const Width<kBits> width(group.bits);
  CodeWord<kBits> words[kBlocksPerThread];
#pragma unroll
  for (int b = 0; b < kBlocksPerThread; ++b) {
    uint32_t sums[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t code =
          encode_special(group.share.blocks[b].get(i), range, width.max_code());
      sums[i] = kIntegerFloat | code << width.kFraction;
    }
    words[b] = width.pack(sums);
  }
  store_group<kBits, false>(group, words);
}

// Minimum of thread blocks for which a multiprocessor has registers.
template <typename T>
constexpr int kQuantizeResident = sizeof(T) == 2 ? 5 : 4;

// The width is kBits or, with kAnyBits, that of the layout: one such kernel
// serves widths that are rarely used, and rows of several widths.
template <typename T, int kBits, int kGroup>
__global__ void __launch_bounds__(kThreads, kQuantizeResident<T>)
    quantize_kernel(const T* __restrict__ input, uint8_t* __restrict__ codes,
                    uint32_t* __restrict__ ranges, Launch launch,
                    CodeLayout layout, CountedStream random,
                    uint64_t first_block) {
  const GroupSize<kGroup> size(launch);
  const int lanes = size.template lanes<kSharedItems>();
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = size.template group_of<kSharedItems>(thread);
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  // Whole warps stay: find_extent() names every lane of the warp.
  const bool inside = index < launch.groups;
  const Group group = locate(launch, inside ? index : 0, size.elements());
  GroupCodes<T> held;
  load_group(input + group.row * launch.row_numel + group.start, group.count,
             lane, lanes, launch.vectorized, held.share);
  const RowCodes row = layout.row<kBits>(group.row);
  held.extent = find_extent(held.share, lanes);
  if (!inside || row.bits == 0) return;
  const PairStream stream = random.current_pair();

  const int64_t group_block = group.start / kBlock;
  held.count = group.count;
  // Only rows of several widths are padded, and by less than a group.
  held.padding =
      kBits != kAnyBits
          ? 0
          : static_cast<int>(layout.row_blocks - launch.row_blocks) * kBlock;
  held.lane = lane;
  held.lanes = lanes;
  held.bits = row.bits;
  held.first_block =
      first_block +
      static_cast<uint64_t>(group.row * launch.row_blocks + group_block);
  held.codes = codes + row.begin + group_block * row.bits;
  with_encoder<kBits>(row.bits, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const Range range =
        make_range(held.extent, Width<kWidth>(row.bits).max_code());
    if (lane == 0) ranges[index] = range.pack();
    if (range.special()) {
      encode_special_group<kWidth>(held, range);
    } else if (group.count == size.elements()) {
      encode_group<kWidth, true>(held, range, stream);
    } else {
      encode_group<kWidth, false>(held, range, stream);
    }
  });
}

// Elements that a thread decodes and writes at once, how often it does, since
// its reads are small and many of them have to be under way, and the threads
// that share a group.
template <typename T>
constexpr int kItemsPerStep = 16 / sizeof(T);

constexpr int kSteps = 4;

template <typename T>
constexpr int kDecodedItems = kItemsPerStep<T> * kSteps;

// Reads the codes of one step, of elements from `begin` on.
template <int kBits, int kItems>
__device__ __forceinline__ auto load_step(const uint8_t* source, int begin) {
  // The items begin inside of a byte unless they fill whole ones.
  constexpr int kLeftBits = kItems * kBits % 8;
  constexpr int kBytes = (kItems * kBits + kLeftBits + 7) / 8;
  using Unit = std::conditional_t<kLeftBits == 0, UnitOf<kBytes>, UnitOf<1>>;
  using Word = UnsignedInt<kBytes>;
  const uint8_t* bytes = source + begin * kBits / 8;
  Word word = 0;
#pragma unroll
  for (int byte = 0; byte < kBytes; byte += sizeof(Unit)) {
    const Unit unit = *reinterpret_cast<const Unit*>(bytes + byte);
    word |= static_cast<Word>(unit) << (8 * byte);
  }
  if constexpr (kLeftBits != 0) word >>= begin * kBits % 8;
  return word;
}

// Elements of one step, from `begin` on within a group.
template <typename T, int kBits>
class CodedStep {
 public:
  static constexpr int kItems = kItemsPerStep<T>;
  using Word = decltype(load_step<kBits, kItems>(nullptr, 0));
  using Floats = DitherFloats<kBits, kItems, kBits, Word>;
  static constexpr int kFraction = Floats::kFraction;

  __device__ __forceinline__ CodedStep(Word word, const DitherDraws& draws,
                                       uint64_t first_block, bool dithered,
                                       int begin, uint32_t integer)
      : floats_(word, bits(draws, first_block, dithered, begin), integer) {}

  __device__ __forceinline__ float number(int i) const {
    return floats_.number(i);
  }

 private:
  static __device__ __forceinline__ DitherBits bits(const DitherDraws& draws,
                                                    uint64_t first_block,
                                                    bool dithered, int begin) {
    if (!dithered) return {{0u, 0u}};
    const DitherBits bits = draws.of(first_block + begin / kBlock);
    return kItems == kBlock ? bits : bits.half(begin % kBlock != 0);
  }

  Floats floats_;
};

// Decodes a thread's share of a whole group and writes the elements of each
// step as one word of 16 bytes. Returns false, without writing, if the group
// has special codes.
template <typename T, int kBits>
__device__ __forceinline__ bool decode_plain_group(
    const uint8_t* source, Range range, const DitherDraws& draws,
    uint64_t first_block, uint32_t integer, int lane, int lanes, T* target) {
  using Step = CodedStep<T, kBits>;
  const auto begin = [&](int s) { return (s * lanes + lane) * Step::kItems; };
  // All reads first, before that of the range is needed.
  typename Step::Word words[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    words[s] = load_step<kBits, Step::kItems>(source, begin(s));
  }
  if (!decodes_plainly(range, max_code_of(kBits), Number<T>::kLargest)) {
    return false;
  }
  const bool dithered = draws.enabled() && has_dither(range);
  const DitherScale scale(range, dithered, Step::kFraction);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const Step step(words[s], draws, first_block, dithered, begin(s), integer);
    float values[Step::kItems];
#pragma unroll
    for (int i = 0; i < Step::kItems; ++i) {
      values[i] = scale.value(step.number(i));
    }
    store_16_bytes(target + begin(s), values);
  }
  return true;
}

// The same of any group.
template <typename T, int kBits>
__device__ __forceinline__ void decode_group(const uint8_t* source, Range range,
                                             const DitherDraws& draws,
                                             uint64_t first_block, int count,
                                             int lane, int lanes, T* target) {
  using Step = CodedStep<T, kBits>;
  constexpr int kItems = Step::kItems;
  constexpr uint32_t kMaxCode = max_code_of(kBits);
  const bool dithered = draws.enabled() && has_dither(range);
  const DitherScale scale(range, dithered, Step::kFraction);
#pragma unroll 1
  for (int s = 0; s < kSteps; ++s) {
    const int begin = (s * lanes + lane) * kItems;
    // A word ends inside of its block, and blocks are always whole.
    if (begin >= count) continue;
    const auto word = load_step<kBits, kItems>(source, begin);
    const Step step(word, draws, first_block, dithered, begin, kIntegerFloat);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t code =
          static_cast<uint32_t>(word >> (i * kBits)) & kMaxCode;
      const float value =
          range.special()
              ? decode_special(code, range, kMaxCode)
              : clamp_finite(scale.value(step.number(i)), Number<T>::kLargest);
      if (begin + i < count) target[begin + i] = Number<T>::store(value);
    }
  }
}

// Codes of kBits, see quantize_kernel().
template <typename T, int kBits, int kGroup>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* __restrict__ codes,
                      const uint32_t* __restrict__ ranges,
                      T* __restrict__ output, Launch launch, CodeLayout layout,
                      DitherSource dither) {
  const GroupSize<kGroup> size(launch);
  const int lanes = size.template lanes<kDecodedItems<T>>();
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = size.template group_of<kDecodedItems<T>>(thread);
  if (index >= launch.groups) return;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const Group group = locate(launch, index, size.elements());
  const RowCodes row = layout.row<kBits>(group.row);
  if (row.bits == 0) return;
  const Range range = Range::unpack(ranges[index]);
  const DitherDraws draws(dither);
  const int64_t group_block = group.start / kBlock;
  const uint8_t* source = codes + row.begin + group_block * row.bits;
  const uint64_t first_block =
      static_cast<uint64_t>(group.row) * launch.row_blocks + group_block;
  T* target = output + group.row * launch.row_numel + group.start;
  with_width<kBits>(row.bits, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if (!launch.vectorized || group.count != size.elements() ||
        !decode_plain_group<T, kWidth>(source, range, draws, first_block,
                                       opaque_integer_float(group.count), lane,
                                       lanes, target)) {
      decode_group<T, kWidth>(source, range, draws, first_block, group.count,
                              lane, lanes, target);
    }
  });
}

// Calls `body` with the bit width (kAnyBits for those of the one kernel) and
// the group size as constants. Groups of a rare size take the kernel of all
// widths.
template <typename Body>
void dispatch_format(const Geometry& geometry, const CodeLayout& layout,
                     const Body& body) {
  dispatch_group_size(geometry.group_size, [&](auto group) {
    if constexpr (decltype(group)::value != kAnyGroup) {
      if (layout.bits == 1) return body(Constant<1>{}, group);
      if (layout.bits == 2) return body(Constant<2>{}, group);
      if (layout.bits == 4) return body(Constant<4>{}, group);
      if (layout.bits == 8) return body(Constant<8>{}, group);
    }
    body(Constant<kAnyBits>{}, group);
  });
}

}  // namespace

namespace cuda {

void quantize(const Memory& input, const Memory& codes, const Memory& ranges,
              const Geometry& geometry, const CodeLayout& whole,
              const Rounding& rounding) {
  CodeLayout layout = whole;
  if (rounding.rotated && rotates(geometry, 1)) {
    if (rotated::quantize(input, codes, ranges, geometry, whole,
                          rounding.random)) {
      return;
    }
    layout.least_bits = kMaxRotatedBits + 1;
  }
  const cudaStream_t stream = current_stream();
  auto* code_bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* range_words = static_cast<uint32_t*>(ranges.mutable_data_ptr());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    dispatch_format(geometry, layout, [&](auto width, auto group) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kGroup = decltype(group)::value;
      for_each_launch(geometry, source, [&](const Launch& launch, int64_t row) {
        layout.first_row = row;
        quantize_kernel<T, kBits, kGroup>
            <<<grid_size<kSharedItems>(launch), kThreads, 0, stream>>>(
                source + row * geometry.row_numel, code_bytes,
                range_words + row * geometry.groups_per_row(), launch, layout,
                rounding.random,
                static_cast<uint64_t>(row * launch.row_blocks));
        check_launch();
      });
    });
  });
}

void dequantize(const Memory& codes, const Memory& ranges, const Memory& output,
                const Geometry& geometry, const CodeLayout& whole,
                const DrawnBits& drawn) {
  CodeLayout layout = whole;
  if (drawn.rotated && rotates(geometry, 1)) {
    if (rotated::dequantize(codes, ranges, output, geometry, whole, drawn)) {
      return;
    }
    layout.least_bits = kMaxRotatedBits + 1;
  }
  const DitherSource draws(drawn, geometry);
  const cudaStream_t stream = current_stream();
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* range_words =
      static_cast<const uint32_t*>(ranges.const_data_ptr());
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    dispatch_format(geometry, layout, [&](auto width, auto group) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kGroup = decltype(group)::value;
      for_each_launch(geometry, target, [&](const Launch& launch, int64_t row) {
        layout.first_row = row;
        dequantize_kernel<T, kBits, kGroup>
            <<<grid_size<kDecodedItems<T>>(launch), kThreads, 0, stream>>>(
                code_bytes, range_words + row * geometry.groups_per_row(),
                target + row * geometry.row_numel, launch, layout,
                draws.advanced(row * launch.row_blocks));
        check_launch();
      });
    });
  });
}

}  // namespace cuda
}  // namespace mmactnn
