// Random bits and packed codes of consecutive blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/random_bits.h"
#include "../common/rounding.h"
#include "group.h"
#include "parallel.h"

namespace mmactnn {

// The 16 random bits of each element of blocks that follow each other. Blocks
// lie side by side in every step, so that the compiler can vectorise it.
inline void random_bits(PairStream stream, uint64_t first_block, int64_t count,
                        uint16_t* random) {
  for (int64_t b = 0; b < count; ++b) {
    const BlockBits bits(stream, first_block + static_cast<uint64_t>(b));
    for (int i = 0; i < kBlock; ++i) {
      random[b * kBlock + i] = static_cast<uint16_t>(bits.bits16(i));
    }
  }
}

// The codes of `blocks` blocks, a byte each, as `bits` bits each; and back.
void pack_codes(const uint8_t* codes, int64_t blocks, int bits,
                uint8_t* packed);
void unpack_codes(const uint8_t* packed, int64_t blocks, int bits,
                  uint8_t* codes);

// The first block of a group, of all that have codes.
inline int64_t first_block(const Geometry& geometry, const Group& group) {
  return group.row * geometry.blocks_per_row() + group.start / kBlock;
}

// Draws the random bits of the elements of groups again.
class GroupDither {
 public:
  GroupDither(const DrawnBits& drawn, const Geometry& geometry)
      : enabled_(drawn.enabled),
        stream_(drawn.random.current_pair()),
        geometry_(geometry),
        first_block_(drawn.first_row * geometry.blocks_per_row()) {}

  // Returns false, without any bits, if codes alone are decoded.
  bool operator()(const Group& group, uint16_t* random) const {
    if (!enabled_) return false;
    const int64_t block = first_block_ + first_block(geometry_, group);
    random_bits(stream_, static_cast<uint64_t>(block),
                (group.count + kBlock - 1) / kBlock, random);
    return true;
  }

 private:
  bool enabled_;
  PairStream stream_;
  const Geometry& geometry_;
  int64_t first_block_;
};

// Packs the codes of a group; those past its end are 0.
inline void store_group(uint8_t* unpacked, const Geometry& geometry,
                        const Group& group, int bits, uint8_t* codes) {
  const int64_t blocks = (group.count + kBlock - 1) / kBlock;
  std::fill(unpacked + group.count, unpacked + blocks * kBlock, uint8_t{0});
  const int64_t block = first_block(geometry, group);
  pack_codes(unpacked, blocks, bits, codes + block * bits);
}

// Calls `body(index, group, codes)` with the codes of every group.
template <typename Body>
void for_each_group(const uint8_t* packed, const Geometry& geometry, int bits,
                    const Body& body) {
  parallel_for(geometry.groups(), kGrainElements / geometry.group_size,
               [&](int64_t begin, int64_t end) {
                 uint8_t codes[kMaxGroup];
                 for (int64_t index = begin; index < end; ++index) {
                   const Group group = locate(geometry, index);
                   unpack_codes(packed + first_block(geometry, group) * bits,
                                (group.count + kBlock - 1) / kBlock, bits,
                                codes);
                   body(index, group, codes);
                 }
               });
}

}  // namespace mmactnn
