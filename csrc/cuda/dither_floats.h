// Codes, and the random bits that they were rounded with, as floats.
#pragma once

#include <cstdint>

#include "../common/codec.h"
#include "../common/dither.h"
#include "../common/geometry.h"
#include "../common/random_bits.h"
#include "../common/rounding.h"
#include "launch.h"

namespace mmactnn {

// Argument of kernels that decode, see DrawnBits.
struct DitherSource {
  bool enabled;
  CountedStream random;
  uint64_t first_block;  // of the launch

  DitherSource(const DrawnBits& drawn, const Geometry& geometry)
      : enabled(drawn.enabled),
        random(drawn.random),
        first_block(static_cast<uint64_t>(drawn.first_row *
                                          geometry.blocks_per_row())) {}

  DitherSource advanced(int64_t blocks) const {
    DitherSource source = *this;
    source.first_block += static_cast<uint64_t>(blocks);
    return source;
  }
};

// Complements of the random bits of a block, or of half of one; zeros where
// codes alone are decoded.
struct DitherBits {
  uint32_t word[2];

  // Of element `i`.
  __device__ __forceinline__ uint32_t bits16(int i) const {
    // An index that is not known would put the words into memory.
    const uint32_t own = i < 4 ? word[0] : word[1];
    return __funnelshift_r(own, own, 8 * (i % 4)) & 0xFFFFu;
  }
  // The second half of a block alone.
  __device__ __forceinline__ DitherBits half(bool second) const {
    return {{second ? word[1] : word[0], 0u}};
  }
};

// Draws the random bits of blocks again.
class DitherDraws {
 public:
  explicit __device__ __forceinline__ DitherDraws(const DitherSource& source)
      : enabled_(source.enabled),
        stream_(source.random.current_pair()),
        first_block_(source.first_block) {}

  __device__ __forceinline__ bool enabled() const { return enabled_; }
  __device__ __forceinline__ DitherBits of(uint64_t block) const {
    if (!enabled_) return {{0u, 0u}};
    const BlockBits bits(stream_, first_block_ + block);
    return {{~bits.word[0], ~bits.word[1]}};
  }

 private:
  bool enabled_;
  PairStream stream_;
  uint64_t first_block_;
};

// Values are (number - origin) * unit + low for a float that has the last bits
// of a code and, below it, those of DitherBits: `fraction` bits, and dithered
// values as in DitherRange.
struct DitherScale {
  float origin;
  float unit;
  float low;

  // The code less `offset` is that of the value.
  __device__ __forceinline__ DitherScale(Range range, bool dithered,
                                         int fraction, uint32_t offset = 0) {
    const DitherRange scaled = dither_range(range, fraction);
    const uint32_t half = dithered ? 1u << (fraction - 1) : 0u;
    origin = bits_float(kIntegerFloat + (offset << fraction) + half);
    unit = scaled.step;
    low = dithered ? scaled.low : range.low;
  }

  // One of both by its members: a reference to one of two objects would put
  // them into memory.
  static __device__ __forceinline__ DitherScale select(bool second,
                                                       const DitherScale& a,
                                                       const DitherScale& b) {
    DitherScale selected = a;
    selected.unit = second ? b.unit : a.unit;
    selected.low = second ? b.low : a.low;
    return selected;
  }

  __device__ __forceinline__ float value(float number) const {
    return __fmaf_rn(add(number, -origin), unit, low);
  }
};

__device__ __forceinline__ float dither_float(uint32_t code, uint32_t bits16,
                                              int fraction) {
  return bits_float(kIntegerFloat | code << fraction |
                    bits16 >> (16 - fraction));
}

// Numbers for DitherScale of kItems codes in a word, each of kWidth bits from
// the lowest of kStride bits on. `integer` is opaque_integer_float().
template <int kStride, int kItems, int kWidth, typename Word>
class DitherFloats {
 public:
  static constexpr int kFraction = fraction_bits(max_code_of(kWidth));

  __device__ __forceinline__ DitherFloats(Word word, const DitherBits& bits,
                                          uint32_t integer)
      : word_(word), bits_(bits), integer_(integer) {}

  __device__ __forceinline__ float number(int i) const {
    if constexpr (kFraction < 16) {
      const auto code =
          static_cast<uint32_t>(word_ >> (i * kStride)) & max_code_of(kWidth);
      return dither_float(code, bits_.bits16(i), kFraction);
    } else {
      // The bytes of the element's bits, of its code and of the exponent.
      const uint32_t codes =
          (static_cast<uint32_t>(word_ >> shift(i)) & mask(shift(i))) |
          integer_;
      const uint32_t first = i % 4;
      const uint32_t selector =
          0x7000u | (4u + byte(i)) << 8 | (first + 1u) % 4u << 4 | first;
      return bits_float(__byte_perm(bits_.word[i / 4], codes, selector));
    }
  }

 private:
  // Codes that a shift puts to the bottom of one of the three lower bytes
  // share it.
  static constexpr bool kShared = kStride <= 4;

  static __device__ __forceinline__ constexpr int byte(int i) {
    return !kShared ? 0 : i * kStride / 8 < 2 ? i * kStride / 8 : 2;
  }
  static __device__ __forceinline__ constexpr int shift(int i) {
    return i * kStride - 8 * byte(i);
  }
  static __device__ __forceinline__ constexpr uint32_t mask(int shifted) {
    uint32_t bits = 0;
    for (int i = 0; i < kItems; ++i) {
      if (shift(i) == shifted) bits |= max_code_of(kWidth) << (8 * byte(i));
    }
    return bits;
  }

  Word word_;
  DitherBits bits_;
  uint32_t integer_;
};

}  // namespace mmactnn
