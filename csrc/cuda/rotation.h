// Rotations of groups by a warp, on tensor cores: thread i holds block i.
#pragma once

#include <cstdint>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/rotation.h"
#include "launch.h"

namespace mmactnn {

constexpr int kPairs = kBlock / 2;

// Elements i and i + 4 of a block, in the lower and the upper half of a word:
// as float16, or as integers.
struct BlockPairs {
  uint32_t pair[kPairs];
};

// Masks that change the signs of the pairs of a block of float16 numbers.
class PairSigns {
 public:
  // Bit i of `signs` is set for a minus of element i.
  explicit __device__ __forceinline__ PairSigns(uint32_t signs)
      : spread_(signs | signs << 12) {}

  __device__ __forceinline__ uint32_t flip(int i, uint32_t pair) const {
    return pair ^ (spread_ << (15 - i) & 0x80008000u);
  }

 private:
  uint32_t spread_;
};

// Products with Hadamard matrices of order 16: the bits of an element's place
// are those of a row and of a column of a 16 x 16 matrix, in the order in which
// the tensor core's operands hold them (A is over bits 1 to 4, B over the
// rest). The matrix depends on the common bits of two places alone, and is the
// same in any order.
class Hadamard {
 public:
  __device__ __forceinline__ Hadamard() {
    const uint32_t column = threadIdx.x % 4 * 2;
    const uint32_t row = threadIdx.x % kWarp / 4;
    constexpr uint32_t kOnes = 0x3C003C00u;
    plus_ = kOnes ^ (__popc(row & column) % 2u) << 15 ^
            (__popc(row & (column + 1u)) % 2u) << 31;
  }

  // y = A S B S A x. Sums must be exact in float16 after the first matrix and
  // in float after the others; before the third they are rounded to float16.
  __device__ __forceinline__ void transform(const BlockPairs& x,
                                            const PairSigns& signs,
                                            float (&y)[kBlock]) const {
    // The entries of the eight rows and columns from the eighth on have the
    // signs of the first eight, but for those where both are.
    const uint32_t minus = plus_ ^ 0x80008000u;
    uint32_t z[kPairs];
    multiply_columns(x.pair, plus_, z[0], z[1]);
    multiply_columns(x.pair, minus, z[2], z[3]);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      z[i] = signs.flip(i, z[i]);
      asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;"
                   : "+r"(z[i]));
    }
    multiply(plus_, plus_, plus_, minus, z[0], z[1], y[0], y[4], y[1], y[5]);
    multiply(plus_, plus_, plus_, minus, z[2], z[3], y[2], y[6], y[3], y[7]);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const __half2 pair = __floats2half2_rn(y[i], y[i + kPairs]);
      z[i] = signs.flip(i, *reinterpret_cast<const uint32_t*>(&pair));
    }
    multiply(z[0], z[1], z[2], z[3], plus_, plus_, y[0], y[4], y[1], y[5]);
    multiply(z[0], z[1], z[2], z[3], plus_, minus, y[2], y[6], y[3], y[7]);
  }

 private:
  // 8 columns of the product with the matrix from the right, from its entries
  // in the first eight rows, `plus_`, and in the others.
  __device__ __forceinline__ void multiply_columns(const uint32_t (&x)[kPairs],
                                                   uint32_t others,
                                                   uint32_t& z0,
                                                   uint32_t& z1) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    asm volatile(
        "{\n\t"
        ".reg .b32 half<2>;\n\t"
        "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 "
        "{half0, half1}, {%2, %3}, {%6}, {%8, %8};\n\t"
        "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 "
        "{%0, %1}, {%4, %5}, {%7}, {half0, half1};\n\t"
        "}"
        : "=r"(z0), "=r"(z1)
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(plus_), "r"(others),
          "r"(0));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
        "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %8};"
        : "=r"(z0), "=r"(z1)
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(plus_), "r"(others),
          "r"(0));
#endif
  }

  // 8 columns of a product of 16 x 16 matrices, as float.
  static __device__ __forceinline__ void multiply(uint32_t a0, uint32_t a1,
                                                  uint32_t a2, uint32_t a3,
                                                  uint32_t b0, uint32_t b1,
                                                  float& y0, float& y1,
                                                  float& y2, float& y3) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    asm volatile(
        "{\n\t"
        ".reg .f32 half<4>;\n\t"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{half0, half1, half2, half3}, {%4, %5}, {%8}, {%10, %10, %10, "
        "%10};\n\t"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%6, %7}, {%9}, {half0, half1, half2, half3};\n\t"
        "}"
        : "=f"(y0), "=f"(y1), "=f"(y2), "=f"(y3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(y0), "=f"(y1), "=f"(y2), "=f"(y3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
#endif
  }

  uint32_t plus_;
};

// Signs of a thread's blocks in kCount groups.
template <int kCount>
class BlockSigns {
  static_assert(kCount <= 4, "a warp draws for 4 groups at a time");

 public:
  // `group(u)` counts all groups of the tensor. It must be computed for any u:
  // what it would index would be put into memory.
  template <typename Group>
  __device__ __forceinline__ BlockSigns(PairStream stream, const Group& group) {
    const uint32_t lane = threadIdx.x % kWarp;
    // Each thread of the lower half draws two of a group's eight words, and one
    // of the upper half a group's offset.
    const bool upper = lane >= kOffsets;
    const int which = static_cast<int>(upper ? lane - kOffsets : lane / 4);
    const uint64_t own = group(min(which, kCount - 1));
    const PhiloxPair random = draw_pair(
        stream, upper ? own : own * (kRotationWords / 2) + lane % 4, upper);
    offset_ = rotation_offset(random);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      outer_[u] = of_block(random, u, lane);
      inner_[u] = of_block(random, u, (lane + kSignShift) % kWarp);
    }
  }

  // See rotation_offset(), of the u-th group.
  __device__ __forceinline__ float offset(int u) const {
    return __shfl_sync(0xFFFFFFFFu, offset_, kOffsets + u);
  }
  // Those before and after all matrices, of the u-th group.
  __device__ __forceinline__ PairSigns outer(int u) const {
    return PairSigns(outer_[u]);
  }
  __device__ __forceinline__ float flip_outer(int u, int i, float y) const {
    return bits_float(float_bits(y) ^ (outer_[u] << (31 - i) & 0x80000000u));
  }
  // Those between two matrices.
  __device__ __forceinline__ PairSigns inner(int u) const {
    return PairSigns(inner_[u]);
  }

 private:
  // Signs of a block of the u-th group, from the threads that drew them.
  static __device__ __forceinline__ uint32_t of_block(const PhiloxPair& random,
                                                      int u, uint32_t block) {
    const uint32_t source = u * 4 + block % kRotationWords / 2;
    const uint32_t even = __shfl_sync(0xFFFFFFFFu, random.word[0], source);
    const uint32_t odd = __shfl_sync(0xFFFFFFFFu, random.word[1], source);
    const uint32_t word = block % 2 == 0 ? even : odd;
    return word >> (8 * (block / kRotationWords)) & 0xFFu;
  }

  static constexpr uint32_t kOffsets = kWarp / 2;

  uint32_t outer_[kCount];
  uint32_t inner_[kCount];
  float offset_;  // of one of the groups, in the upper half of the threads
};

// Codes of a width that is known at run time, `stride` bits each of which the
// lowest `bits` are for the coefficient and the highest, if there is another
// one, for the mask.
struct RotatedCodes {
  int stride;
  int bits;
};

// The codes of a block of a group, in the lowest bits. `last` is the last word
// of all codes.
__device__ __forceinline__ uint32_t load_block_codes(const uint8_t* codes,
                                                     int64_t block, int stride,
                                                     const uint32_t* last) {
  const int64_t byte = block * stride;
  const auto* word = reinterpret_cast<const uint32_t*>(codes) + byte / 4;
  const uint32_t* next = word < last ? word + 1 : last;
  return __funnelshift_r(*word, *next, static_cast<int>(byte % 4) * 8);
}

// Writes the codes of a block; `stride` is at most 4.
__device__ __forceinline__ void store_block_codes(uint8_t* codes, int64_t block,
                                                  int stride, uint32_t word) {
  uint8_t* target = codes + block * stride;
  if (stride == 2) {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(word);
  } else if (stride == 4) {
    *reinterpret_cast<uint32_t*>(target) = word;
  } else {
    target[0] = static_cast<uint8_t>(word);
    if (stride == 3) {
      target[1] = static_cast<uint8_t>(word >> 8);
      target[2] = static_cast<uint8_t>(word >> 16);
    }
  }
}

// Coefficients of a block's codes.
class RotatedDecode {
 public:
  explicit __device__ __forceinline__ RotatedDecode(const RotatedCodes& codes)
      : stride_(codes.stride),
        // A code is put to the top of a float16's fraction.
        first_(codes.bits - 10),
        mask_(max_code_of(codes.bits) * 0x00010001u << (10 - codes.bits)) {
    const float middle = 3.0f - 1.0f / static_cast<float>(1 << codes.bits);
    const __half2 both = __float2half2_rn(-middle);
    middle_ = *reinterpret_cast<const uint32_t*>(&both);
    unit_ = static_cast<float>(1 << codes.bits);
  }

  // Multiples of a group's scale, as `unit()` of them.
  __device__ __forceinline__ float unit() const { return unit_; }

  // A word of each pair of elements: their codes below bit 10 of the halves,
  // and the bit above the code in bit 10.
  __device__ __forceinline__ BlockPairs spread(uint32_t word) const {
    // The halves hold four codes each.
    const int four = 4 * stride_;
    const uint32_t halves = (word & ((1u << four) - 1u)) | word >> four << 16;
    BlockPairs result;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int shift = i * stride_ + first_;
      result.pair[i] = __funnelshift_r(halves, halves, shift);
    }
    return result;
  }
  // From spread(): (2 code - (2^bits - 1)) / 2^bits.
  __device__ __forceinline__ BlockPairs levels(const BlockPairs& codes) const {
    BlockPairs result;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t two = (codes.pair[i] & mask_) | 0x40004000u;
      const __half2 sum = __hadd2(*reinterpret_cast<const __half2*>(&two),
                                  *reinterpret_cast<const __half2*>(&middle_));
      result.pair[i] = *reinterpret_cast<const uint32_t*>(&sum);
    }
    return result;
  }

 private:
  int stride_;
  int first_;
  uint32_t mask_;
  uint32_t middle_;
  float unit_;
};

// Whether the bit above the code of element `i` is set, from
// RotatedDecode::spread().
__device__ __forceinline__ bool spread_flag(const BlockPairs& codes, int i) {
  return (codes.pair[i % kPairs] & (i < kPairs ? 0x400u : 0x4000000u)) != 0u;
}

}  // namespace mmactnn
