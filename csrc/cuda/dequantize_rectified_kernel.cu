#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/divider.h"
#include "../common/geometry.h"
#include "../common/norm_act.h"
#include "../common/portability.h"
#include "../common/rectified_codec.h"
#include "bounds.h"
#include "channel_index.h"
#include "code_floats.h"
#include "dither_floats.h"
#include "launch.h"
#include "packed_block.h"
#include "rotated.h"

namespace mmactnn {
namespace {

// Pieces that one thread decodes: their reads are small, and many of them
// have to be under way.
constexpr int kDecodedPieces = 4;

// Elements of a piece, which is written at once: a block or half of one. With
// two words a thread, neighbours would write parts of the same sectors.
template <typename T>
constexpr int kPieceItems = 16 / sizeof(T);

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
  DitherSource dither;
};

// The elements of a block or piece, within a row.
struct Elements {
  uint32_t first;
  int count;
};

// Scale and shift of a block's elements, by channel.
struct Affine {
  const float* weight;  // null: none
  const float* bias;    // null: none
  ChannelIndex channels;
  // Pieces that a thread decodes one after the other are of the same channels.
  bool repeats;

  // Weight and bias of elements, the last one's again past their end.
  template <int kItems>
  struct Block {
    float weight[kItems];
    float bias[kItems];

    // See PlaneAffine.
    template <int, typename Body>
    __device__ __forceinline__ void with(const Body& body) const {
      body([&](int i) { return ChannelNorm{0.0f, 1.0f, weight[i], bias[i]}; });
    }
  };

  template <int kItems>
  __device__ __forceinline__ void load(Elements elements,
                                       Block<kItems>& block) const {
    ChannelIndex::Place place = channels.of(elements.first);
    if (place.left >= kItems) {
      const float weights = load_channel(weight, place.channel, kNoWeight);
      const float biases = load_channel(bias, place.channel, kNoBias);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        block.weight[i] = weights;
        block.bias[i] = biases;
      }
    } else if (channels.vectorized && elements.count >= kItems) {
      const ChannelWords<kItems> weights(weight + place.channel);
      const ChannelWords<kItems> biases(bias + place.channel);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        block.weight[i] = weights.item[i];
        block.bias[i] = biases.item[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        block.weight[i] = load_channel(weight, place.channel, kNoWeight);
        block.bias[i] = load_channel(bias, place.channel, kNoBias);
        if (i + 1 < elements.count) place = channels.next(place);
      }
    }
  }
};

// The same of a piece whose elements are of one channel or of two.
struct PlaneAffine {
  float weight[2];
  float bias[2];
  int left;  // elements of the first channel

  template <int kItems>
  __device__ __forceinline__ void load(const Affine& affine,
                                       Elements elements) {
    const ChannelIndex::Place place = affine.channels.of(elements.first);
    left = static_cast<int>(min(place.left, static_cast<uint32_t>(kItems)));
    const uint32_t second = place.channel + (left < kItems ? 1u : 0u);
    weight[0] = load_channel(affine.weight, place.channel, kNoWeight);
    bias[0] = load_channel(affine.bias, place.channel, kNoBias);
    weight[1] = load_channel(affine.weight, second, kNoWeight);
    bias[1] = load_channel(affine.bias, second, kNoBias);
  }
  // Calls `body` with the scale and shift of element `i` as a function: most
  // pieces are of one channel.
  template <int kItems, typename Body>
  __device__ __forceinline__ void with(const Body& body) const {
    if (left >= kItems) {
      body([&](int) { return ChannelNorm{0.0f, 1.0f, weight[0], bias[0]}; });
    } else {
      body([&](int i) {
        const bool second = i >= left;
        return ChannelNorm{0.0f, 1.0f, second ? weight[1] : weight[0],
                           second ? bias[1] : bias[0]};
      });
    }
  }
};

struct NoParameters {};

// The positive kind of split codes, normalised values that become outputs. A
// decoder decodes the piece that comes after those it has decoded before. With
// kPlanes, parameters of a piece are read ahead of its codes' use.
template <typename T, int kBits, int kItems, bool kPlanes>
class SplitDecoder {
 public:
  static constexpr int kRanges = 2;
  using Parameters = Affine;
  using Ahead = std::conditional_t<kPlanes, PlaneAffine, NoParameters>;

  __device__ __forceinline__ SplitDecoder(const Affine& affine, int bits)
      : affine_(affine), bits_(bits) {}

  // The value of the code is in the lower bits - 1 of its bits.
  static MMACTNN_HOST_DEVICE constexpr int value_bits() { return kBits - 1; }
  static MMACTNN_HOST_DEVICE constexpr uint32_t offset() { return 0; }
  // Outputs are clamped, and those of float32 need not be.
  static MMACTNN_HOST_DEVICE constexpr float largest_value() { return FLT_MAX; }
  static MMACTNN_HOST_DEVICE constexpr bool checked() {
    return !std::is_same_v<T, float>;
  }

  // `where()` returns the Elements of the piece.
  template <typename Where>
  __device__ __forceinline__ Ahead read_ahead(const Where& where) const {
    Ahead ahead;
    if constexpr (kPlanes) ahead.template load<kItems>(affine_, where());
    return ahead;
  }
  template <typename Where>
  __device__ __forceinline__ void begin(const Ahead& ahead,
                                        const Where& where) {
    if constexpr (kPlanes) {
      block_ = ahead;
    } else {
      if (!loaded_ || !affine_.repeats) affine_.load(where(), block_);
      loaded_ = true;
    }
  }
  __device__ __forceinline__ uint32_t max_code() const {
    return max_split_code(bits_);
  }
  __device__ __forceinline__ bool kept(uint32_t code) const {
    return split_positive(code, bits_);
  }
  // The code of the value of an element that passes, and that value.
  __device__ __forceinline__ uint32_t value_code(uint32_t code) const {
    return split_value_code(code, bits_);
  }
  __device__ __forceinline__ float value(uint32_t value_code, Range range,
                                         float decoded) const {
    return range.special() ? decode_special(value_code, range, max_code())
                           : decoded;
  }
  // Calls `body` with the output as a function of an element and its value.
  template <typename Body>
  __device__ __forceinline__ void with_outputs(const Body& body) const {
    block_.template with<kItems>([&](const auto& norm) {
      body([&](int i, float value) { return norm(i).scale(value); });
    });
  }
  // An infinite output stays infinite.
  __device__ __forceinline__ float clamp(float output) const {
    return clamp_if_finite(output, Number<T>::kLargest);
  }

 private:
  const Affine& affine_;
  int bits_;
  bool loaded_ = false;
  std::conditional_t<kPlanes, PlaneAffine, Affine::Block<kItems>> block_;
};

// A row that ends within a block is decoded by the general one.
template <typename T, int kBits, int kItems>
using PlaneSplitDecoder = SplitDecoder<T, kBits, kItems, kBits != kAnyBits>;
template <typename T, int kBits, int kItems>
using ColumnSplitDecoder = SplitDecoder<T, kBits, kItems, false>;

// Zeroed codes.
template <typename T, int kBits, int kItems>
class ZeroedDecoder {
 public:
  static constexpr int kRanges = 1;
  using Parameters = NoParameters;
  using Ahead = NoParameters;

  __device__ __forceinline__ ZeroedDecoder(const NoParameters&, int bits)
      : bits_(bits) {}

  static MMACTNN_HOST_DEVICE constexpr int value_bits() { return kBits; }
  static MMACTNN_HOST_DEVICE constexpr uint32_t offset() { return 1; }
  static MMACTNN_HOST_DEVICE constexpr float largest_value() {
    return Number<T>::kLargest;
  }
  static MMACTNN_HOST_DEVICE constexpr bool checked() { return false; }

  template <typename Where>
  __device__ __forceinline__ Ahead read_ahead(const Where&) const {
    return {};
  }
  template <typename Where>
  __device__ __forceinline__ void begin(const Ahead&, const Where&) {}
  __device__ __forceinline__ uint32_t max_code() const {
    return max_zeroed_code(bits_);
  }
  __device__ __forceinline__ bool kept(uint32_t code) const {
    return code != 0u;
  }
  __device__ __forceinline__ uint32_t value_code(uint32_t code) const {
    return code;
  }
  __device__ __forceinline__ float value(uint32_t value_code, Range range,
                                         float decoded) const {
    return range.special() ? decode_zeroed_special(value_code - 1u, range)
                           : clamp_finite(decoded, Number<T>::kLargest);
  }
  template <typename Body>
  __device__ __forceinline__ void with_outputs(const Body& body) const {
    body([](int, float value) { return value; });
  }
  __device__ __forceinline__ float clamp(float output) const { return output; }

 private:
  int bits_;
};

// Whether a number of the block is not finite.
template <typename T>
__device__ __forceinline__ bool any_infinite(const PackedBlock<T>& block) {
  PackedBounds<T> bounds(block);
  bounds.include(block);
  return !bounds.of_lanes(1).all_finite();
}

// Elements that need neither special codes nor a clamp; returns false for
// others.
template <typename T, int kBits, int kItems, typename Decoder>
__device__ __forceinline__ bool decode_plainly(
    const Decoder& decoder, CodeWord<kBits> word, Range range, bool dithered,
    const DitherBits& random, uint32_t integer, PackedBlock<T, kItems>& items) {
  if (!decodes_plainly(range, decoder.max_code(), Decoder::largest_value())) {
    return false;
  }
  using Floats =
      DitherFloats<kBits, kItems, Decoder::value_bits(), CodeWord<kBits>>;
  const Floats floats(word, random, integer);
  const DitherScale scale(range, dithered, Floats::kFraction,
                          Decoder::offset());
  float values[kItems];
  decoder.with_outputs([&](const auto& output) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const auto code =
          static_cast<uint32_t>(word >> (i * kBits)) & max_code_of(kBits);
      values[i] =
          decoder.kept(code) ? output(i, scale.value(floats.number(i))) : 0.0f;
    }
  });
  items.set(values);
  if constexpr (Decoder::checked()) return !any_infinite(items);
  return true;
}

template <typename T, int kBits, int kItems, typename Decoder>
__device__ __forceinline__ void decode_any(const Decoder& decoder,
                                           CodeWord<kBits> word, Range range,
                                           bool dithered,
                                           const DitherBits& random, int bits,
                                           PackedBlock<T, kItems>& items) {
  const int fraction = fraction_bits(decoder.max_code());
  const DitherScale scale(range, dithered, fraction, Decoder::offset());
  float values[kItems];
  decoder.with_outputs([&](const auto& output) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const auto code =
          static_cast<uint32_t>(word >> (i * bits)) & max_code_of(bits);
      const uint32_t value_code = decoder.value_code(code);
      const float decoded =
          scale.value(dither_float(value_code, random.bits16(i), fraction));
      values[i] = decoder.kept(code)
                      ? decoder.clamp(output(
                            i, decoder.value(value_code, range, decoded)))
                      : 0.0f;
    }
  });
  items.set(values);
}

// The last range of a group is that of the values that are not 0.
template <typename Decoder>
__device__ __forceinline__ uint32_t load_range(const uint32_t* ranges,
                                               int64_t group) {
  return ranges[group * Decoder::kRanges + Decoder::kRanges - 1];
}

// A piece of a tensor of whole groups only, an aligned one: pieces are at their
// places whatever rows they are in.
template <typename T, int kBits, typename Decoder>
struct CodedPiece {
  static constexpr int kItems = kPieceItems<T>;
  static constexpr int kPerBlock = kBlock / kItems;

  CodeWord<kBits> word;  // its first code is the lowest
  uint32_t range;

  static __device__ __forceinline__ uint32_t count(const Decode<T>& op) {
    return op.blocks * kPerBlock;
  }
  static __device__ __forceinline__ Elements elements(const Decode<T>& op,
                                                      uint32_t piece) {
    const uint32_t block = piece / kPerBlock;
    const uint32_t row = op.by_row_blocks.quotient(block);
    const uint32_t place = block - row * op.by_row_blocks.divisor;
    return {place * kBlock + piece % kPerBlock * kItems, kItems};
  }
  // Random bits of the piece.
  static __device__ __forceinline__ DitherBits random(const DitherDraws& draws,
                                                      uint32_t piece) {
    const DitherBits bits = draws.of(piece / kPerBlock);
    return kPerBlock == 1 ? bits : bits.half(piece % kPerBlock != 0u);
  }

  __device__ __forceinline__ void load(const Decode<T>& op, uint32_t piece) {
    const uint32_t block = piece / kPerBlock;
    word = load_word<kBits>(op.codes + static_cast<int64_t>(block) * kBits,
                            kBits) >>
           (piece % kPerBlock * kItems * kBits);
    range = load_range<Decoder>(op.ranges, block >> op.group_shift);
  }
};

// Decodes those pieces of a thread whose bits in `others` are set, however
// their codes may be.
template <typename T, int kBits, typename Decoder>
__device__ __forceinline__ void decode_others(
    const Decode<T>& op, const typename Decoder::Parameters& parameters,
    const DitherDraws& draws, uint32_t first, uint32_t others) {
  using Piece = CodedPiece<T, kBits, Decoder>;
#pragma unroll 1
  for (; others != 0u; others &= others - 1u) {
    const uint32_t piece = first + (__ffs(others) - 1) * kThreads;
    Piece coded;
    coded.load(op, piece);
    Decoder decoder(parameters, kBits);
    const auto where = [&] { return Piece::elements(op, piece); };
    decoder.begin(decoder.read_ahead(where), where);
    PackedBlock<T, Piece::kItems> packed;
    decode_any<T, kBits>(decoder, coded.word, Range::unpack(coded.range),
                         draws.enabled(), Piece::random(draws, piece), kBits,
                         packed);
    packed.store(op.output + static_cast<int64_t>(piece) * Piece::kItems);
  }
}

// The thread blocks that a multiprocessor has registers for, at least: reads
// that are under way together take many.
template <typename T>
constexpr int kDecodeResident = sizeof(T) == 2 ? 5 : 4;

template <typename T, int kBits, typename Decoder>
__global__ void __launch_bounds__(kThreads, kDecodeResident<T>)
    dequantize_whole_kernel(const Decode<T> op,
                            const typename Decoder::Parameters parameters) {
  using Piece = CodedPiece<T, kBits, Decoder>;
  const uint32_t first = blockIdx.x * (kThreads * kDecodedPieces) + threadIdx.x;
  const uint32_t last = Piece::count(op) - 1u;
  Decoder decoder(parameters, kBits);
  Piece pieces[kDecodedPieces];
  typename Decoder::Ahead ahead[kDecodedPieces];
  // Without a branch, which would wait for the reads in it.
#pragma unroll
  for (int p = 0; p < kDecodedPieces; ++p) {
    const uint32_t piece = min(first + p * kThreads, last);
    pieces[p].load(op, piece);
    ahead[p] = decoder.read_ahead([&] { return Piece::elements(op, piece); });
  }
  // The compiler would put reads off until there are more registers.
  __syncwarp();
  const DitherDraws draws(op.dither);
  const uint32_t integer = opaque_integer_float(op.blocks);
  uint32_t others = 0;
#pragma unroll
  for (int p = 0; p < kDecodedPieces; ++p) {
    const uint32_t piece = first + p * kThreads;
    if (piece > last) continue;
    decoder.begin(ahead[p], [&] { return Piece::elements(op, piece); });
    PackedBlock<T, Piece::kItems> packed;
    if (decode_plainly<T, kBits>(
            decoder, pieces[p].word, Range::unpack(pieces[p].range),
            draws.enabled(), Piece::random(draws, piece), integer, packed)) {
      packed.store(op.output + static_cast<int64_t>(piece) * Piece::kItems);
    } else {
      others |= 1u << p;
    }
  }
  decode_others<T, kBits, Decoder>(op, parameters, draws, first, others);
}

// Any tensor, codes of any width.
template <typename T, typename Decoder>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const Decode<T> op,
                      const typename Decoder::Parameters parameters) {
  Decoder decoder(parameters, op.bits);
  const DitherDraws draws(op.dither);
  const uint32_t first = blockIdx.x * (kThreads * kDecodedPieces) + threadIdx.x;
#pragma unroll 1
  for (int b = 0; b < kDecodedPieces; ++b) {
    const uint32_t block = first + b * kThreads;
    if (block >= op.blocks) return;
    const uint32_t row = op.by_row_blocks.quotient(block);
    const uint32_t place = block - row * op.by_row_blocks.divisor;
    const uint64_t word = load_word<kAnyBits>(
        op.codes + static_cast<int64_t>(block) * op.bits, op.bits);
    const int64_t group = static_cast<int64_t>(row) * op.groups_per_row +
                          (place >> op.group_shift);
    const Range range = Range::unpack(load_range<Decoder>(op.ranges, group));
    const uint32_t element = place * kBlock;
    const auto row_left = static_cast<uint32_t>(op.row_numel) - element;
    const int left = row_left < kBlock ? static_cast<int>(row_left) : kBlock;
    decoder.begin({}, [&] { return Elements{element, left}; });
    PackedBlock<T> packed;
    decode_any<T, kAnyBits>(decoder, word, range, draws.enabled(),
                            draws.of(block), op.bits, packed);
    T* target = op.output + static_cast<int64_t>(row) * op.row_numel + element;
    if (op.vectorized && left >= kBlock) {
      packed.store(target);
    } else {
      packed.store(target, left);
    }
  }
}

// Calls `body` with a width that whole groups have a kernel of, or kAnyBits.
template <typename Body>
void dispatch_widths(bool whole, int bits, const Body& body) {
  if (whole && bits == 2) {
    body(Constant<2>{});
  } else if (whole && bits == 3) {
    body(Constant<3>{});
  } else if (whole && bits == 4) {
    body(Constant<4>{});
  } else if (whole && bits == 8) {
    body(Constant<8>{});
  } else {
    body(Constant<kAnyBits>{});
  }
}

// Decodes everything.
template <template <typename, int, int> typename DecoderOf, typename Parameters>
void decode_into(const Memory& codes, const Memory& ranges,
                 const Memory& output, const Geometry& geometry, int bits,
                 const DrawnBits& drawn, const Parameters& parameters) {
  const DitherSource draws(drawn, geometry);
  const int64_t row_blocks = geometry.blocks_per_row();
  STD_TORCH_CHECK(geometry.row_numel <= kMaxIndex, "a sample may have at most ",
                  kMaxIndex, " elements, got ", geometry.row_numel);
  // A grid that is not whole ends before 32-bit indices do, of halves of
  // blocks, too.
  constexpr int64_t kPerGridBlock = int64_t{kThreads} * kDecodedPieces;
  const int64_t max_rows = (kMaxIndex - kPerGridBlock) / (2 * row_blocks);
  const cudaStream_t stream = current_stream();
  const auto* code_bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* range_words =
      static_cast<const uint32_t*>(ranges.const_data_ptr());
  int group_shift = 0;
  while ((int64_t{kBlock} << group_shift) < geometry.group_size) ++group_shift;
  dispatch_dtype(output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = static_cast<T*>(output.mutable_data_ptr());
    const bool vectorized =
        is_aligned(target, 16) && geometry.row_numel * sizeof(T) % 16 == 0;
    const bool whole =
        vectorized && geometry.row_numel % geometry.group_size == 0;
    dispatch_widths(whole, bits, [&](auto width) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kItems = kBits == kAnyBits ? kBlock : kPieceItems<T>;
      using Decoder = DecoderOf<T, kBits, kItems>;
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
            bits,
            vectorized,
            draws.advanced(row * row_blocks)};
        const int64_t pieces = blocks * (kBlock / kItems);
        const auto grid = static_cast<unsigned int>(
            (pieces + kPerGridBlock - 1) / kPerGridBlock);
        if constexpr (kBits == kAnyBits) {
          dequantize_kernel<T, Decoder>
              <<<grid, kThreads, 0, stream>>>(op, parameters);
        } else {
          dequantize_whole_kernel<T, kBits, Decoder>
              <<<grid, kThreads, 0, stream>>>(op, parameters);
        }
        check_launch();
      }
    });
  });
}

}  // namespace

namespace cuda {

void dequantize_split(const Memory& codes, const Memory& ranges,
                      const Memory& weight, const Memory& bias,
                      const Memory& output, const Geometry& geometry,
                      const Channels& channels, int bits,
                      const DrawnBits& drawn) {
  if (drawn.rotated && rotates(geometry, bits - 1)) {
    return rotated::dequantize_split(codes, ranges, weight, bias, output,
                                     geometry, channels, bits, drawn);
  }
  const auto* weights = static_cast<const float*>(weight.const_data_ptr());
  const auto* biases = static_cast<const float*>(bias.const_data_ptr());
  const ChannelIndex index = index_channels(channels, {weights, biases});
  // A thread's next piece is kThreads pieces, here whole pixels, further on.
  const bool repeats =
      index.vectorized && geometry.row_numel % kBlock == 0 &&
      kThreads * 16 / output.element_size() % channels.count == 0;
  const Affine affine{weights, biases, index, repeats};
  if (!channels.last && channels.plane >= kBlock) {
    decode_into<PlaneSplitDecoder>(codes, ranges, output, geometry, bits, drawn,
                                   affine);
  } else {
    decode_into<ColumnSplitDecoder>(codes, ranges, output, geometry, bits,
                                    drawn, affine);
  }
}

void dequantize_zeroed(const Memory& codes, const Memory& ranges,
                       const Memory& output, const Geometry& geometry, int bits,
                       const DrawnBits& drawn) {
  if (drawn.rotated && rotates_zeroed(geometry, bits)) {
    return rotated::dequantize_zeroed(codes, ranges, output, geometry, bits,
                                      drawn);
  }
  decode_into<ZeroedDecoder>(codes, ranges, output, geometry, bits, drawn,
                             NoParameters{});
}

}  // namespace cuda
}  // namespace mmactnn
