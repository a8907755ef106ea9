// Random bits for rounding elements.
//
// Each element has 16 uniform bits, which is all that unbiased rounding needs.
// Four elements share a word of 32 bits: element i has bytes i (the lower) and
// i + 1. Rounded neighbours therefore have a covariance, of at most 2^-10 of a
// squared step: the shared byte only matters to one of them if its other byte
// equals that of the threshold, one time in 256.
//
// A call of Philox2x32 serves a block of 8 elements: decoders that draw the
// bits again (dither.h) read blocks in any order.
#pragma once

#include <cstdint>

#include "codec.h"
#include "philox.h"
#include "portability.h"

namespace mmactnn {

// The random bits of a block.
struct BlockBits {
  uint32_t word[2];

  // `block` counts all blocks of the tensor.
  MMACTNN_HOST_DEVICE BlockBits(PairStream stream, uint64_t block) {
    const PhiloxPair random = philox_pair(
        static_cast<uint32_t>(block),
        stream.counter ^ static_cast<uint32_t>(block >> 32), stream.key);
    word[0] = random.word[0];
    word[1] = random.word[1];
  }

  // Random bits of element `i` (0 to 7).
  MMACTNN_HOST_DEVICE uint32_t bits16(int i) const {
    const uint64_t twice = word[i / 4] * UINT64_C(0x100000001);
    return static_cast<uint32_t>(twice >> (8 * (i % 4))) & 0xFFFFu;
  }

#ifdef __CUDACC__
  // See rounding_of(): the two bytes, a zero and the exponent of `integer`,
  // which is kIntegerFloat, at once.
  __device__ __forceinline__ float rounding(int i, int fraction,
                                            uint32_t integer) const {
    const uint32_t first = i % 4;
    const uint32_t selector = 0x7400u | (first + 1) % 4 << 4 | first;
    const uint32_t bits = __byte_perm(word[i / 4], integer, selector);
    return fraction == 16 ? bits_float(bits)
                          : rounding_of(bits & 0xFFFFu, fraction);
  }
#endif
};

}  // namespace mmactnn
