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

// Where a piece of a row is.
template <int kItems, typename T>
__device__ __forceinline__ T* piece_of(const NormPayload& payload, T* data,
                                       uint32_t row, uint32_t piece) {
  if constexpr (kItems == kBlock) {
    return data + int64_t{row * payload.row_blocks + piece} * kBlock;
  } else {
    return data + row * payload.row_numel + piece;
  }
}

// The product is exact, so that the sum rounds once, as decode() does; only
// beyond the largest number could one tell.
__device__ __forceinline__ float decode_fused(uint32_t code, Range range) {
  return __fmaf_rn(static_cast<float>(code), range.step, range.low);
}

// kItems numbers as they lie in memory. A block is kept in whole registers
// until its numbers are used, two of a 16-bit dtype in each.
template <typename T, int kItems>
struct Packed {
  T item[1];

  __device__ __forceinline__ void load(const T* source) { item[0] = source[0]; }
  __device__ __forceinline__ float value(int) const {
    return Number<T>::load(item[0]);
  }
  template <typename Keep>
  __device__ __forceinline__ void store(T* target, const Keep& keep) const {
    target[0] = keep(0) ? item[0] : Number<T>::store(0.0f);
  }
};

template <typename T>
struct Packed<T, kBlock> {
  static constexpr int kWords = kBlock * sizeof(T) / 16;
  static constexpr int kPerRegister = 4 / sizeof(T);
  using Word = Vector<uint32_t, 4>;

  Word word[kWords];

  __device__ __forceinline__ void load(const T* source) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      word[w] = reinterpret_cast<const Word*>(source)[w];
    }
  }
  __device__ __forceinline__ float value(int i) const {
    const int r = i / kPerRegister;
    const uint32_t bits = word[r / 4].item[r % 4];
    if constexpr (std::is_same_v<T, float>) {
      return bits_float(bits);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return bits_float(i % 2 == 0 ? bits << 16 : bits & 0xFFFF0000u);
    } else {
      const __half2 pair = *reinterpret_cast<const __half2*>(&bits);
      return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
    }
  }
  // Writes the numbers for which `keep(i)`, and 0 for the others.
  template <typename Keep>
  __device__ __forceinline__ void store(T* target, const Keep& keep) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      Word kept;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        uint32_t mask = 0;
#pragma unroll
        for (int k = 0; k < kPerRegister; ++k) {
          const uint32_t item =
              kPerRegister == 1 ? 0xFFFFFFFFu : 0xFFFFu << (16 * k);
          mask |= keep((w * 4 + r) * kPerRegister + k) ? item : 0u;
        }
        kept.item[r] = word[w].item[r] & mask;
      }
      reinterpret_cast<Word*>(target)[w] = kept;
    }
  }
};

// What a thread reads of kItems elements: a block where kItems is 8, else one
// element that may lie anywhere.
template <typename T, int kBits, NormCodes kCodes, int kItems>
struct NormPiece {
  static constexpr bool kSplit = kCodes == NormCodes::kSplit;
  static constexpr bool kMask = kCodes == NormCodes::kMask;
  using Ranges = std::conditional_t<kSplit, uint64_t, uint32_t>;

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
      const uint32_t index = row * payload.row_blocks + block;
      grads.load(grad_output + int64_t{index} * kBlock);
      codes = load_word<kBits>(payload.codes + int64_t{index} * bits, bits);
      if constexpr (kMask) {
        act_codes = load_word<kBits>(
            payload.act_codes + int64_t{index} * act_bits, act_bits);
      }
    } else {
      block = piece / kBlock;
      const int64_t row_block = int64_t{row} * payload.row_blocks;
      grads.load(grad_output + row * payload.row_numel + piece);
      codes = code_at(payload.codes + row_block * bits, piece, bits);
      if constexpr (kMask) {
        act_codes =
            code_at(payload.act_codes + row_block * act_bits, piece, act_bits);
      }
    }
    const uint32_t group =
        row * payload.row_groups + (block >> payload.group_shift);
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

  // Calls `body(i, passed, grad, normal)` with every element: whether its
  // gradient passes the rectifier, the gradient and the normalised input. With
  // kPassed the latter may be any number where the gradient does not pass. In
  // a group with NaN or inf what does not pass is given as a 0 that does, so
  // that products with it are what they are in reference.py.
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
                                               T* grad, uint32_t row,
                                               uint32_t piece) const {
    const int bits = kBits == kAnyBits ? payload.bits : kBits;
    const int act_bits = kBits == kAnyBits ? payload.act_bits : kBits;
    grads.store(piece_of<kItems>(payload, grad, row, piece),
                [&](int i) { return positive(i, bits, act_bits); });
  }
};

}  // namespace mmactnn
