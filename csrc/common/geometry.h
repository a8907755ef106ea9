// Division of a tensor into rows, groups and blocks, and layout of codes.
//
// A row is one sample (dimension 0) in memory order; groups of `group_size`
// elements and blocks of 8 begin anew with every row, so that any range of
// samples can be decoded alone. The codes of a block take `bits` bytes, the
// first element in the lowest bits of a little-endian word.
#pragma once

#include <cstdint>

#include "codec.h"
#include "portability.h"

namespace mmactnn {

struct Geometry {
  int64_t rows;
  int64_t row_numel;
  int64_t group_size;

  MMACTNN_HOST_DEVICE int64_t groups_per_row() const {
    return (row_numel + group_size - 1) / group_size;
  }
  MMACTNN_HOST_DEVICE int64_t blocks_per_row() const {
    return (row_numel + kBlock - 1) / kBlock;
  }
  // The blocks of a row that may have a width of its own: a multiple of 8, so
  // that every row starts on an 8-byte boundary whatever the widths before it.
  MMACTNN_HOST_DEVICE int64_t padded_blocks_per_row() const {
    return (blocks_per_row() + 7) / 8 * 8;
  }
  MMACTNN_HOST_DEVICE int64_t groups() const { return rows * groups_per_row(); }
};

// Location of the codes of one row.
struct RowCodes {
  int bits;       // 0: nowhere, see CodeLayout
  int64_t begin;  // its first byte
};

// A bit width that is known at run time only.
constexpr int kAnyBits = 0;

// Layout of the codes of all rows: of one width and without gaps, or, if
// `row_bits` is set, with a width for each row.
struct CodeLayout {
  int64_t row_blocks;         // of every row, with padding
  int64_t first_row;          // that indices count from
  int bits;                   // of every row, if row_bits is null
  const uint8_t* row_bits;    // of each row
  const int32_t* row_starts;  // the sum of the widths of all rows before
  int64_t total_bits;         // the sum of all widths
  // Widths of rows that are looked at; others count as nowhere.
  int least_bits = 1;
  int most_bits = kMaxBits;

  // Widths are data of the device that no launcher has seen. A row that
  // leaves the codes has none: it is neither written nor read.
  template <int kBits>
  MMACTNN_HOST_DEVICE RowCodes row(int64_t index) const {
    const int64_t row = first_row + index;
    if constexpr (kBits != kAnyBits) {
      return {kBits, row * row_blocks * kBits};
    } else {
      if (row_bits == nullptr) return {bits, row * row_blocks * bits};
      const int width = row_bits[row];
      const int64_t start = row_starts[row];
      const bool fits = width >= least_bits && width <= most_bits &&
                        start >= 0 && start + width <= total_bits;
      return {fits ? width : 0, start * row_blocks};
    }
  }
};

inline CodeLayout uniform_layout(const Geometry& geometry, int64_t bits) {
  return {
      geometry.blocks_per_row(), 0, static_cast<int>(bits), nullptr, nullptr,
      geometry.rows * bits};
}

}  // namespace mmactnn
