// How kernels read a normalised input, and the mask of its rectifier, from
// codes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/norm.h"
#include "../common/rectified_codec.h"
#include "blocks.h"
#include "launch.h"

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

template <int kBits>
using CodeWord =
    std::conditional_t<kBits == kAnyBits, uint64_t,
                       std::conditional_t<kBits <= 4, uint32_t, uint64_t>>;

// The codes of a block.
template <int kBits>
__device__ __forceinline__ CodeWord<kBits> load_codes(const uint8_t* codes,
                                                      int bits) {
  if constexpr (kBits == 2) {
    return *reinterpret_cast<const uint16_t*>(codes);
  } else if constexpr (kBits == 4) {
    return *reinterpret_cast<const uint32_t*>(codes);
  } else {
    constexpr int kBytes = kBits == kAnyBits ? kMaxBits : kBits;
    CodeWord<kBits> word = 0;
#pragma unroll
    for (int byte = 0; byte < kBytes; ++byte) {
      if (kBits != kAnyBits || byte < bits) {
        word |= static_cast<CodeWord<kBits>>(codes[byte]) << (8 * byte);
      }
    }
    return word;
  }
}

// The product is exact, so that the sum rounds once, as decode() does; only
// beyond the largest number could one tell.
__device__ __forceinline__ float decode_fused(uint32_t code, Range range) {
  return __fmaf_rn(static_cast<float>(code), range.step, range.low);
}

// What a thread reads of kItems elements: a block where kItems is 8, else one
// element that may lie anywhere.
template <typename T, int kBits, NormCodes kCodes, int kItems>
struct NormPiece {
  static constexpr bool kSplit = kCodes == NormCodes::kSplit;
  static constexpr bool kMask = kCodes == NormCodes::kMask;
  using Ranges = std::conditional_t<kSplit, uint64_t, uint32_t>;

  T grads[kItems];
  CodeWord<kBits> codes;
  CodeWord<kBits> act_codes;
  Ranges ranges;

  // `piece` counts from the start of the row.
  __device__ __forceinline__ void load(const NormPayload& payload,
                                       const T* grad_output, uint32_t row,
                                       uint32_t piece) {
    const int bits = kBits == kAnyBits ? payload.bits : kBits;
    const int act_bits = kBits == kAnyBits ? payload.act_bits : kBits;
    const int64_t row_block = static_cast<int64_t>(row) * payload.row_blocks;
    uint32_t block;
    if constexpr (kItems == kBlock) {
      block = piece;
      const int64_t index = row_block + block;
      load_block<T, true>(grad_output + index * kBlock, kBlock, grads);
      codes = load_codes<kBits>(payload.codes + index * bits, bits);
      if constexpr (kMask) {
        act_codes =
            load_codes<kBits>(payload.act_codes + index * act_bits, act_bits);
      }
    } else {
      block = piece / kBlock;
      grads[0] = grad_output[row * payload.row_numel + piece];
      codes = code_at(payload.codes + row_block * bits, piece, bits);
      if constexpr (kMask) {
        act_codes =
            code_at(payload.act_codes + row_block * act_bits, piece, act_bits);
      }
    }
    const int64_t group = static_cast<int64_t>(row) * payload.row_groups +
                          (block >> payload.group_shift);
    ranges = reinterpret_cast<const Ranges*>(payload.ranges)[group];
  }

  // Of element `i`.
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

  // The gradients that pass the rectifier, 0 for the others, and the
  // normalised input. With kPassed that of the others may be any finite
  // number, unless it would make a product with 0 NaN.
  template <bool kPassed>
  __device__ __forceinline__ void decode(const NormPayload& payload,
                                         float* grad, float* normal) const {
    const int bits = kBits == kAnyBits ? payload.bits : kBits;
    const int act_bits = kBits == kAnyBits ? payload.act_bits : kBits;
    const Range first = Range::unpack(static_cast<uint32_t>(ranges));
    Range second = first;
    bool special = first.special();
    if constexpr (kSplit) {
      second = Range::unpack(static_cast<uint32_t>(ranges >> 32));
      special |= second.special();
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float value = Number<T>::load(grads[i]);
      grad[i] = positive(i, bits, act_bits) ? value : 0.0f;
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
        normal[i] = range.special() ? decode_special(value, range, max_code)
                                    : decode_fused(value, range);
      }
    } else if constexpr (kSplit && kBits == 2) {
      // One bit a value: four numbers, of which the bits choose.
      const float low[2] = {first.low, second.low};
      const float high[2] = {decode_fused(1, first), decode_fused(1, second)};
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const bool upper = (codes >> (2 * i) & 1u) != 0u;
        const float of_passed = upper ? high[1] : low[1];
        normal[i] = kPassed || positive(i, bits, act_bits)
                        ? of_passed
                        : (upper ? high[0] : low[0]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if constexpr (kSplit) {
          const Range range =
              kPassed || positive(i, bits, act_bits) ? second : first;
          normal[i] =
              decode_fused(split_value_code(code(i, bits), bits), range);
        } else {
          normal[i] = decode_fused(code(i, bits), first);
        }
      }
    }
  }

  // Writes the gradients that pass the rectifier.
  __device__ __forceinline__ void store_passed(const NormPayload& payload,
                                               T* grad, uint32_t row,
                                               uint32_t piece) const {
    const int bits = kBits == kAnyBits ? payload.bits : kBits;
    const int act_bits = kBits == kAnyBits ? payload.act_bits : kBits;
    T passed[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      passed[i] =
          positive(i, bits, act_bits) ? grads[i] : Number<T>::store(0.0f);
    }
    store_items<T, kItems>(
        grad + row * payload.row_numel + static_cast<int64_t>(piece) * kItems,
        passed);
  }
};

}  // namespace mmactnn
