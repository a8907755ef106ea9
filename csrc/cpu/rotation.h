// Rotated codes of one group, see common/rotation.h.
#pragma once

#include <cstdint>

#include "../common/codec.h"
#include "../common/dither.h"
#include "../common/geometry.h"
#include "../common/philox.h"
#include "../common/random_bits.h"
#include "../common/rotation.h"

namespace mmactnn {

struct RotatedRange {
  float mean[2];  // of the elements that do not pass, and of those that do
  float scale;

  // As the range of codes whose elements are all of one kind, the second.
  Range one_kind() const { return {mean[1], scale}; }
  // As three bfloat16 numbers.
  void store(uint16_t* target) const;
  static RotatedRange load(const uint16_t* source);
};

// What is coded of the elements that do not pass a rectifier.
enum class Blocked { kValue, kNothing };

// Codes of the coefficients of a group, a byte each. `passes` is null if all
// elements are of one kind.
RotatedRange encode_rotated(const float* values, const bool* passes,
                            Blocked blocked, PairStream stream, uint64_t group,
                            int bits, uint8_t* codes);

// Multiples of `scale` that are added to means, from the lowest `bits` bits of
// the codes of a group.
void decode_rotated(const uint8_t* codes, PairStream stream, uint64_t group,
                    int bits, int32_t* multiples);

// Decodes groups of a tensor.
class RotatedDecoder {
 public:
  // `bits` are those for values. Unless codes are `rotated` it is false.
  RotatedDecoder(const DrawnBits& drawn, const Geometry& geometry, int bits,
                 bool rotated)
      : rotated_(rotated),
        stream_(drawn.random.current_pair()),
        first_group_(drawn.first_row * geometry.groups_per_row()),
        bits_(bits) {}

  explicit operator bool() const { return rotated_; }
  void operator()(int64_t index, const uint8_t* codes,
                  int32_t* multiples) const {
    decode_rotated(codes, stream_, static_cast<uint64_t>(first_group_ + index),
                   bits_, multiples);
  }

 private:
  bool rotated_;
  PairStream stream_;
  int64_t first_group_;
  int bits_;
};

inline float rotated_value(int32_t multiple, float scale, float mean) {
  return multiply_add(static_cast<float>(multiple), scale, mean);
}

}  // namespace mmactnn
