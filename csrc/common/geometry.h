// How a tensor is cut into rows, groups and blocks.
//
// A row is one sample (dimension 0) in memory order; groups of `group_size`
// elements and blocks of 8 begin anew with every row, so that any range of
// samples can be decoded alone. The codes of a block take `bits` bytes, the
// first element in the lowest bits; a row's codes end with its last block.
#pragma once

#include <cstdint>

#include "codec.h"
#include "portability.h"

namespace mmactnn {

struct Geometry {
  int64_t rows;
  int64_t row_numel;
  int64_t group_size;
  int64_t bits;

  MMACTNN_HOST_DEVICE int64_t groups_per_row() const {
    return (row_numel + group_size - 1) / group_size;
  }
  MMACTNN_HOST_DEVICE int64_t blocks_per_row() const {
    return (row_numel + kBlock - 1) / kBlock;
  }
  MMACTNN_HOST_DEVICE int64_t row_bytes() const {
    return blocks_per_row() * bits;
  }
  MMACTNN_HOST_DEVICE int64_t groups() const { return rows * groups_per_row(); }
};

}  // namespace mmactnn
