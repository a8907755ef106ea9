// Codes of the kinds of a group's elements that a rectifier makes.
#pragma once

#include <cstdint>

#include "../common/codec.h"
#include "../common/rectified_codec.h"
#include "group.h"
#include "rotation.h"

namespace mmactnn {

// Finds the range of one kind of elements, and codes them; the codes of the
// others stay as they are.
template <typename Of, typename Special>
Range encode_kind(const float* values, int64_t count, uint32_t max_code,
                  const uint16_t* random, const Of& of, const Special& special,
                  uint8_t* codes) {
  float kind[kMaxGroup];
  int64_t kind_count = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (of(i)) kind[kind_count++] = values[i];
  }
  const Range range = make_kind_range(find_extent(kind, kind_count), max_code);
  const float scale = encode_scale(range, max_code);
  for (int64_t i = 0; i < count; ++i) {
    if (!of(i)) continue;
    codes[i] = static_cast<uint8_t>(
        range.special() ? special(values[i], range)
                        : encode(values[i], range, scale, random[i], max_code));
  }
  return range;
}

// Zeroed codes of a rectifier's output.
inline Range encode_zeroed(const float* output, const bool* positive,
                           int64_t count, int bits, const uint16_t* random,
                           uint8_t* codes) {
  const Range range = encode_kind(
      output, count, max_zeroed_code(bits), random,
      [&](int64_t i) { return positive[i]; },
      [](float value, Range kind) {
        return encode_zeroed_special(value, kind);
      },
      codes);
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = positive[i] ? static_cast<uint8_t>(codes[i] + 1) : 0;
  }
  return range;
}

// The same, rotated.
inline Range encode_zeroed_rotated(const float* output, const bool* positive,
                                   PairStream stream, uint64_t group, int bits,
                                   uint8_t* codes) {
  const RotatedRange range = encode_rotated(output, positive, Blocked::kNothing,
                                            stream, group, bits - 1, codes);
  for (int i = 0; i < kRotation; ++i) {
    codes[i] = static_cast<uint8_t>(join_split(codes[i], positive[i], bits));
  }
  return range.one_kind();
}

}  // namespace mmactnn
