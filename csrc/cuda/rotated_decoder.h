// Decoding of rotated groups, of which a thread holds a block each.
#pragma once

#include <cstdint>

#include "../common/geometry.h"
#include "../common/memory.h"
#include "../common/random_bits.h"
#include "../common/rotation.h"
#include "launch.h"
#include "rotation.h"

namespace mmactnn {

struct SplitRange {
  float mean;          // of the elements that do not pass
  float passing_mean;  // of those that do
  float scale;

  __device__ __forceinline__ Range passing() const {
    return {passing_mean, scale};
  }
};

// Codes and ranges in device memory.
struct RotatedSource {
  const uint8_t* codes;
  const uint32_t* last;  // word of the codes
  const void* ranges;
  RotatedCodes format;
  CountedStream random;
  uint64_t first_group;  // that random bits count from

  RotatedSource(const void* codes, int64_t bytes, const void* ranges,
                const Geometry& geometry, RotatedCodes format,
                const DrawnBits& drawn)
      : codes(static_cast<const uint8_t*>(codes)),
        last(static_cast<const uint32_t*>(codes) + bytes / 4 - 1),
        ranges(ranges),
        format(format),
        random(drawn.random),
        first_group(static_cast<uint64_t>(drawn.first_row *
                                          geometry.groups_per_row())) {
    STD_TORCH_CHECK(is_aligned(codes, 4),
                    "rotated codes must start on a 4-byte boundary");
  }
  RotatedSource(const Memory& codes, const Memory& ranges,
                const Geometry& geometry, RotatedCodes format,
                const DrawnBits& drawn)
      : RotatedSource(codes.const_data_ptr(), codes.numel(),
                      ranges.const_data_ptr(), geometry, format, drawn) {}

  // The codes of a block that follows others from byte `begin` on.
  __device__ __forceinline__ uint32_t load_word(int64_t block,
                                                int64_t begin = 0) const {
    return load_block_codes(codes + begin, block, format.stride, last);
  }
  __device__ __forceinline__ Range plain_range(int64_t group) const {
    return Range::unpack(static_cast<const uint32_t*>(ranges)[group]);
  }
  __device__ __forceinline__ SplitRange split_range(int64_t group) const {
    const auto* numbers = static_cast<const uint16_t*>(ranges) + 3 * group;
    const auto number = [&](int i) {
      return bits_float(uint32_t{numbers[i]} << 16);
    };
    return {number(0), number(1), number(2)};
  }
};

// Coefficients of a block, and their way back to multiples of a scale.
class RotatedDecoder {
 public:
  explicit __device__ __forceinline__
  RotatedDecoder(const RotatedSource& source)
      : codes_(source.format),
        stream_(source.random.current_pair()),
        first_group_(source.first_group) {}

  // Factor of transform()'s results.
  __device__ __forceinline__ float unit() const { return codes_.unit(); }
  __device__ __forceinline__ BlockPairs spread(uint32_t word) const {
    return codes_.spread(word);
  }
  __device__ __forceinline__ void transform(const BlockPairs& spread,
                                            const PairSigns& signs,
                                            float (&y)[kBlock]) const {
    hadamard_.transform(codes_.levels(spread), signs, y);
  }
  // `group(u)` counts the groups of the codes.
  template <int kCount, typename GroupOf>
  __device__ __forceinline__ BlockSigns<kCount> signs(
      const GroupOf& group) const {
    return BlockSigns<kCount>(stream_, [&](int u) {
      return first_group_ + static_cast<uint64_t>(group(u));
    });
  }

 private:
  RotatedDecode codes_;
  Hadamard hadamard_;
  PairStream stream_;
  uint64_t first_group_;
};

}  // namespace mmactnn
