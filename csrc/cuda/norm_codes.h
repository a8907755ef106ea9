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
#include "dither_floats.h"
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
  uint32_t act_passing;  // see passing_bits()
  DitherSource dither;
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

  Offset offset;   // pieces of the tensor before this one
  uint32_t block;  // blocks of the tensor before that of this piece
  uint32_t first;  // element of the block that the piece begins with
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
    uint32_t row_block = piece;
    if constexpr (kItems == kBlock) {
      offset = row * payload.row_blocks + piece;
      codes = load_word<kBits>(payload.codes + int64_t{offset} * bits, bits);
      if constexpr (kMask) {
        act_codes = load_word<kBits>(
            payload.act_codes + int64_t{offset} * act_bits, act_bits);
      }
    } else {
      row_block = piece / kBlock;
      const int64_t row_start = int64_t{row} * payload.row_blocks;
      offset = row * payload.row_numel + piece;
      codes = code_at(payload.codes + row_start * bits, piece, bits);
      if constexpr (kMask) {
        act_codes =
            code_at(payload.act_codes + row_start * act_bits, piece, act_bits);
      }
    }
    block = row * payload.row_blocks + row_block;
    first = kItems == kBlock ? 0u : piece % kBlock;
    grads.load(in(grad_output));
    const uint32_t group =
        row * payload.row_groups + (row_block >> payload.group_shift);
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
  __device__ __forceinline__ bool positive(int i, int bits, int act_bits,
                                           uint32_t passing) const {
    if constexpr (kSplit) return split_positive(code(i, bits), bits);
    if constexpr (kMask) {
      return (static_cast<uint32_t>(act_codes >> (i * act_bits)) & passing) !=
             0u;
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
                                           const DitherDraws& draws,
                                           const Body& body) const {
    const int bits = kBits == kAnyBits ? payload.bits : kBits;
    const int act_bits = kBits == kAnyBits ? payload.act_bits : kBits;
    const uint32_t max_code = kSplit ? max_split_code(bits) : max_code_of(bits);
    const Range lower = Range::unpack(static_cast<uint32_t>(ranges));
    Range upper = lower;
    bool special = lower.special();
    if constexpr (kSplit) {
      upper = Range::unpack(static_cast<uint32_t>(ranges >> 32));
      special |= upper.special();
    }
    const int fraction = fraction_bits(max_code);
    const DitherScale scale(lower, draws.enabled(), fraction);
    DitherScale upper_scale = scale;
    if constexpr (kSplit) {
      upper_scale = DitherScale(upper, draws.enabled(), fraction);
    }
    const DitherBits random = draws.of(block);
    const auto any_number = [&](int i, uint32_t value) {
      const int element = kItems == kBlock ? i : static_cast<int>(first);
      return dither_float(value, random.bits16(element), fraction);
    };
    if (special) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const uint32_t whole = code(i, bits);
        const bool above = kSplit && split_positive(whole, bits);
        const uint32_t value = kSplit ? split_value_code(whole, bits) : whole;
        const Range range{above ? upper.low : lower.low,
                          above ? upper.step : lower.step};
        const DitherScale own = DitherScale::select(above, scale, upper_scale);
        const float normal = range.special()
                                 ? decode_special(value, range, max_code)
                                 : own.value(any_number(i, value));
        body(i, true,
             positive(i, bits, act_bits, payload.act_passing) ? grads.value(i)
                                                              : 0.0f,
             normal);
      }
      return;
    }
    const auto decode_all = [&](const auto& number) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const bool passed = positive(i, bits, act_bits, payload.act_passing);
        const DitherScale own = DitherScale::select(
            kSplit && (kPassed || passed), scale, upper_scale);
        body(i, passed, grads.value(i), own.value(number(i)));
      }
    };
    if constexpr (kBits != kAnyBits) {
      constexpr int kWidth = kSplit ? kBits - 1 : kBits;
      const DitherFloats<kBits, kItems, kWidth, CodeWord<kBits>> floats(
          codes, random, opaque_integer_float(bits));
      decode_all([&](int i) { return floats.number(i); });
    } else {
      decode_all([&](int i) {
        const uint32_t whole = code(i, bits);
        return any_number(i, kSplit ? split_value_code(whole, bits) : whole);
      });
    }
  }

  // The gradients that pass, 0 for the others, and the normalised input.
  __device__ __forceinline__ void decode(const NormPayload& payload,
                                         const DitherDraws& draws, float* grad,
                                         float* normal) const {
    for_each<false>(payload, draws,
                    [&](int i, bool passed, float value, float x) {
                      grad[i] = passed ? value : 0.0f;
                      normal[i] = x;
                    });
  }

  // Writes the gradients that pass the rectifier.
  __device__ __forceinline__ void store_passed(const NormPayload& payload,
                                               T* grad) const {
    const int bits = kBits == kAnyBits ? payload.bits : kBits;
    const int act_bits = kBits == kAnyBits ? payload.act_bits : kBits;
    grads.store(in(grad), [&](int i) {
      return positive(i, bits, act_bits, payload.act_passing);
    });
  }
};

}  // namespace mmactnn
