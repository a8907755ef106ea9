// Checks of widths that samples have of their own.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../common/geometry.h"
#include "tensor_checks.h"

namespace mmactnn {

// `total_bits` is the sum of one width for each row; every such sum fits into
// 32 bits.
inline void check_total_bits(int64_t total_bits, int64_t rows) {
  STD_TORCH_CHECK(total_bits >= rows && total_bits <= rows * kMaxBits,
                  "total_bits must be from ", rows, " to ", rows * kMaxBits,
                  " for ", rows, " rows, got ", total_bits);
  STD_TORCH_CHECK(rows <= INT32_MAX / kMaxBits, "there may be at most ",
                  INT32_MAX / kMaxBits, " rows, got ", rows);
}

inline void check_row_integers(const char* name, const Tensor& tensor,
                               ScalarType dtype, const char* dtype_name,
                               const Tensor& like, int64_t rows) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.dim() == 1 &&
                      tensor.is_contiguous() && tensor.size(0) == rows,
                  name, " must be a contiguous ", dtype_name, " tensor of ",
                  rows, " numbers, one a sample");
  check_same_device(name, tensor, like);
}

// The layout of codes of a width for each row, on the device of `like`.
inline CodeLayout checked_row_layout(const Tensor& like,
                                     const Geometry& geometry,
                                     const Tensor& row_bits,
                                     const Tensor& row_starts,
                                     int64_t total_bits) {
  check_row_integers("row_bits", row_bits, ScalarType::Byte, "uint8", like,
                     geometry.rows);
  check_row_integers("row_starts", row_starts, ScalarType::Int, "int32", like,
                     geometry.rows);
  return {geometry.padded_blocks_per_row(),
          0,
          kAnyBits,
          static_cast<const uint8_t*>(row_bits.const_data_ptr()),
          static_cast<const int32_t*>(row_starts.const_data_ptr()),
          total_bits};
}

// The same for codes that are to be decoded, of these or more rows.
inline CodeLayout checked_row_layout_of(const Tensor& codes,
                                        const Geometry& geometry,
                                        const Tensor& row_bits,
                                        const Tensor& row_starts) {
  check_code_bytes(codes);
  const int64_t row_blocks = geometry.padded_blocks_per_row();
  STD_TORCH_CHECK(codes.dim() == 1, "codes must have one dimension, got ",
                  codes.dim());
  STD_TORCH_CHECK(
      row_blocks == 0 ? codes.size(0) == 0 : codes.size(0) % row_blocks == 0,
      "codes must be of a multiple of ", row_blocks, " bytes for this size, ",
      "got ", codes.size(0));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % 8 == 0,
                  "codes must start on an 8-byte boundary");
  return checked_row_layout(codes, geometry, row_bits, row_starts,
                            row_blocks == 0 ? 0 : codes.size(0) / row_blocks);
}

}  // namespace mmactnn
