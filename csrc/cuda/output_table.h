// Outputs of a piece whose elements are of one channel, where the codes are so
// few that all they can stand for is computed first, and the codes choose.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../common/codec.h"
#include "../common/norm_act.h"
#include "../common/rectified_codec.h"
#include "code_floats.h"
#include "launch.h"
#include "packed_block.h"

namespace mmactnn {

// Whether split codes of a width are read by a table.
template <typename T, int kBits>
constexpr bool kTabled = sizeof(T) == 2 && (kBits == 2 || kBits == 3);

// Bytes of both words by the four digits of `selector`, of which 8 stands for
// the sign of byte 0, eight times, and so on.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high,
                                            uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;"
      : "=r"(result)
      : "r"(low), "r"(high), "r"(selector));
  return result;
}

// Four codes that follow each other, and nothing above them, as bytes.
template <int kBits>
__device__ __forceinline__ uint32_t codes_as_bytes(uint32_t codes) {
  constexpr uint32_t kTwo = max_code_of(2 * kBits);
  codes = (codes | codes << (16 - 2 * kBits)) & (kTwo | kTwo << 16);
  return (codes | codes << (8 - kBits)) & (max_code_of(kBits) * 0x01010101u);
}

// Outputs for all split codes of a range, in a channel of some weight and bias.
template <typename T, int kBits>
class OutputTable {
 public:
  __device__ __forceinline__ OutputTable(Range range, float weight,
                                         float bias) {
    const ChannelNorm norm{0.0f, 1.0f, weight, bias};
    const auto largest = static_cast<float>(max_split_code(kBits));
    // False for NaN, as are the other comparisons.
    plain_ = multiply(largest, range.step) <= FLT_MAX;
    float outputs[kOutputs];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      outputs[i] = norm.scale(decode_fused(i, range));
      plain_ = plain_ && fabsf(outputs[i]) <= Number<T>::kLargest;
    }
    table_.set(outputs);
  }

  // Whether no code is special and no output is beyond the numbers of T.
  __device__ __forceinline__ bool plain() const { return plain_; }

  // The outputs of the codes of a block: 0 of those that are not positive.
  __device__ __forceinline__ PackedBlock<T> outputs(
      CodeWord<kBits> codes) const {
    PackedBlock<T> block;
    choose(codes & max_code_of(4 * kBits), block.word);
    choose(codes >> (4 * kBits), block.word + 2);
    return block;
  }

 private:
  static constexpr int kOutputs = 1 << (kBits - 1);

  __device__ __forceinline__ void choose(uint32_t codes,
                                         uint32_t* words) const {
    const uint32_t bytes = codes_as_bytes<kBits>(codes);
    // Number n of two words is in their bytes 2n and 2n + 1.
    constexpr uint32_t kScale = 0x22u;
    constexpr uint32_t kOffset = 0x10101010u;
    if constexpr (kBits == 2) {
      // The outputs of codes that are not positive, 0 and 1, come first.
      const uint32_t selectors = bytes * kScale + kOffset;
      words[0] = permute(0u, table_.word[0], selectors);
      words[1] = permute(0u, table_.word[0], selectors >> 16);
    } else {
      constexpr uint32_t kValues = max_split_code(kBits) * 0x01010101u;
      const uint32_t selectors = (bytes & kValues) * kScale + kOffset;
      const uint32_t signs = bytes << (8 - kBits);
      words[0] = permute(table_.word[0], table_.word[1], selectors) &
                 permute(signs, 0u, 0x9988u);
      words[1] = permute(table_.word[0], table_.word[1], selectors >> 16) &
                 permute(signs, 0u, 0xBBAAu);
    }
  }

  PackedBlock<T, kOutputs> table_;
  bool plain_;
};

}  // namespace mmactnn
