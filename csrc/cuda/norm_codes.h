// Decoding of a normalised input, and of the mask of its rectifier, in kernels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/norm.h"
#include "../common/rectified_codec.h"
#include "blocks.h"
#include "code_floats.h"
#include "launch.h"
#include "packed.h"
#include "packed_block.h"

namespace mmactnn {

template <typename T, int kItems>
__device__ __forceinline__ void store_items(T* target, const T* values) {
  if constexpr (kItems == kBlock) {
    store_block<T, true>(target, kBlock, values);
  } else {
    target[0] = values[0];
  }
}

// The tensors of one payload, in device memory.
struct NormPayload {
  const uint8_t* codes;
  const uint8_t* act_codes;  // of NormCodes::kMask
  const uint8_t* ranges;
  int64_t row_numel;
  uint32_t row_blocks;
  uint32_t row_groups;
  int group_shift;  // binary logarithm of the blocks of a group
  int bits;
  int act_bits;
};

// Codes of kItems elements that a thread reads: a block where kItems is 8, else
// one element at any place.
template <typename T, int kBits, NormCodes kCodes, int kItems>
struct NormPiece {
  static constexpr bool kSplit = kCodes == NormCodes::kSplit;
  static constexpr bool kMask = kCodes == NormCodes::kMask;
  using Ranges = std::conditional_t<kSplit, uint64_t, uint32_t>;
  // Blocks are counted in 32 bits.
  using Offset = std::conditional_t<kItems == kBlock, uint32_t, int64_t>;

  Offset offset;  // pieces of the tensor before this one
  Packed<T, kItems> grads;
  CodeWord<kBits> codes;
  CodeWord<kBits> act_codes;
  Ranges ranges;

  // `piece` counts from the start of the row.
  __device__ __forceinline__ void load(const NormPayload& payload,
                                       const T* grad_output, uint32_t row,
                                       uint32_t piece) {
    const int bits = kBits == kAnyBits ? payload.bits : kBits;
    const int act_bits = kBits == kAnyBits ? payload.act_bits : kBits;
    uint32_t block = piece;
    if constexpr (kItems == kBlock) {
      offset = row * payload.row_blocks + block;
      codes = load_word<kBits>(payload.codes + int64_t{offset} * bits, bits);
      if constexpr (kMask) {
        act_codes = load_word<kBits>(
            payload.act_codes + int64_t{offset} * act_bits, act_bits);
      }
    } else {
      block = piece / kBlock;
      const int64_t row_block = int64_t{row} * payload.row_blocks;
      offset = row * payload.row_numel + piece;
      codes = code_at(payload.codes + row_block * bits, piece, bits);
      if constexpr (kMask) {
        act_codes =
            code_at(payload.act_codes + row_block * act_bits, piece, act_bits);
      }
    }
    grads.load(in(grad_output));
    const uint32_t group =
        row * payload.row_groups + (block >> payload.group_shift);
    ranges = reinterpret_cast<const Ranges*>(payload.ranges)[group];
  }

  // Address of the piece in a tensor.
  template <typename U>
  __device__ __forceinline__ U* in(U* data) const {
    return data + int64_t{offset} * kItems;
  }

  // Code of element `i`.
  __device__ __forceinline__ uint32_t code(int i, int bits) const {
    return static_cast<uint32_t>(codes >> (i * bits)) & max_code_of(bits);
  }
  __device__ __forceinline__ bool positive(int i, int bits,
                                           int act_bits) const {
    if constexpr (kSplit) return split_positive(code(i, bits), bits);
    if constexpr (kMask) {
      return (static_cast<uint32_t>(act_codes >> (i * act_bits)) &
              max_code_of(act_bits)) != 0u;
    }
    return true;
  }

  // Calls `body(i, passed, grad, normal)` with every element: whether its
  // gradient passes the rectifier, the gradient and the normalised input. With
  // kPassed the latter may be any number where the gradient does not pass. In
  // a group with NaN or inf an element that does not pass is given as a 0 that
  // does, so that products with it equal those in reference.py.
  template <bool kPassed, typename Body>
  __device__ __forceinline__ void for_each(const NormPayload& payload,
                                           const Body& body) const {
    const int bits = kBits == kAnyBits ? payload.bits : kBits;
    const int act_bits = kBits == kAnyBits ? payload.act_bits : kBits;
    const Range first = Range::unpack(static_cast<uint32_t>(ranges));
    Range second = first;
    bool special = first.special();
    if constexpr (kSplit) {
      second = Range::unpack(static_cast<uint32_t>(ranges >> 32));
      special |= second.special();
    }
    if (special) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const uint32_t whole = code(i, bits);
        const Range range =
            kSplit && split_positive(whole, bits) ? second : first;
        const uint32_t value = kSplit ? split_value_code(whole, bits) : whole;
        const uint32_t max_code =
            kSplit ? max_split_code(bits) : max_code_of(bits);
        body(i, true, positive(i, bits, act_bits) ? grads.value(i) : 0.0f,
             range.special() ? decode_special(value, range, max_code)
                             : decode_fused(value, range));
      }
    } else if constexpr (kSplit && kBits == 2) {
      // One bit a value: four numbers, of which the bits choose.
      const float low[2] = {first.low, second.low};
      const float high[2] = {decode_fused(1, first), decode_fused(1, second)};
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const bool upper = (codes & 1u << (2 * i)) != 0u;
        const bool passed = (codes & 2u << (2 * i)) != 0u;
        const float of_passed = upper ? high[1] : low[1];
        body(i, passed, grads.value(i),
             kPassed || passed ? of_passed : (upper ? high[0] : low[0]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const bool passed = positive(i, bits, act_bits);
        const uint32_t whole = code(i, bits);
        if constexpr (kSplit) {
          const Range range = kPassed || passed ? second : first;
          body(i, passed, grads.value(i),
               decode_fused(split_value_code(whole, bits), range));
        } else {
          body(i, passed, grads.value(i), decode_fused(whole, first));
        }
      }
    }
  }

  // The gradients that pass, 0 for the others, and the normalised input.
  __device__ __forceinline__ void decode(const NormPayload& payload,
                                         float* grad, float* normal) const {
    for_each<false>(payload, [&](int i, bool passed, float value, float x) {
      grad[i] = passed ? value : 0.0f;
      normal[i] = x;
    });
  }

  // Writes the gradients that pass the rectifier.
  __device__ __forceinline__ void store_passed(const NormPayload& payload,
                                               T* grad) const {
    const int bits = kBits == kAnyBits ? payload.bits : kBits;
    const int act_bits = kBits == kAnyBits ? payload.act_bits : kBits;
    grads.store(in(grad), [&](int i) { return positive(i, bits, act_bits); });
  }
};

}  // namespace mmactnn
