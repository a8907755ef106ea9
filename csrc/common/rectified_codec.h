// Codes that tell the positive values of a rectifier's input or output from
// the others exactly, and round within each kind.
//
// Split, of b bits: the highest bit is set for the elements whose rectified
// value is not zero, and the lower b - 1 bits are a code of the value (that of
// a normalised input, positive or not) in the range of the elements of its
// kind. A group has two ranges, that of the others first.
//
// Zeroed, of b bits: code 0 stands for exactly zero, and code c for value
// c - 1 of the range of the elements that are not zero.
//
// Both take 2 to 8 bits, and both ranges follow codec.h. A kind that no
// element of the group belongs to has the range (0, 0). NaN counts as
// positive, so that its gradient passes, as in torch.
#pragma once

#include "codec.h"
#include "portability.h"

namespace mmactnn {

constexpr int kMinRectifiedBits = 2;

// Whether a rectifier lets the gradient of this sum pass; `value` is rounded
// to the dtype of the output.
MMACTNN_HOST_DEVICE bool is_positive(float value) { return !(value <= 0.0f); }

// The range of one kind of a group's elements, (0, 0) if it has none.
MMACTNN_HOST_DEVICE Range make_kind_range(Extent extent, uint32_t max_code) {
  const bool none = extent.all_finite && extent.low > extent.high;
  return none ? Range{0.0f, 0.0f} : make_range(extent, max_code);
}

// The highest code of the values of a kind.
MMACTNN_HOST_DEVICE constexpr uint32_t max_split_code(int bits) {
  return max_code_of(bits - 1);
}
MMACTNN_HOST_DEVICE constexpr uint32_t max_zeroed_code(int bits) {
  return max_code_of(bits) - 1u;
}

MMACTNN_HOST_DEVICE uint32_t join_split(uint32_t code, bool positive,
                                        int bits) {
  return code | (positive ? 1u << (bits - 1) : 0u);
}
MMACTNN_HOST_DEVICE bool split_positive(uint32_t code, int bits) {
  return (code >> (bits - 1)) != 0u;
}
MMACTNN_HOST_DEVICE uint32_t split_value_code(uint32_t code, int bits) {
  return code & max_split_code(bits);
}

// Bits of which a zeroed code has any where the element passes: the highest
// one of rotated codes (rotation.h).
MMACTNN_HOST_DEVICE constexpr uint32_t passing_bits(int bits, bool rotated) {
  return rotated ? 1u << (bits - 1) : max_code_of(bits);
}

// Special code of the positive kind where minus infinity cannot occur, so that
// three codes are enough.
MMACTNN_HOST_DEVICE uint32_t encode_zeroed_special(float value, Range range) {
  if (is_nan(value) || is_nan(range.low)) return 2u;
  return is_finite(value) ? 0u : 1u;
}
MMACTNN_HOST_DEVICE float decode_zeroed_special(uint32_t code, Range range) {
  if (code == 0u) return range.low;
  return bits_float(code == 1u ? 0x7F800000u : 0x7FC00000u);
}

}  // namespace mmactnn
