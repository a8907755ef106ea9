#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/geometry.h"
#include "allocate.h"
#include "registration.h"
#include "row_checks.h"

namespace mmactnn {

// Input, codes and ranges. Rows that have no place in the codes are left out.
MMACTNN_KERNEL(quantize, const Memory&, const Memory&, const Memory&,
               const Geometry&, const CodeLayout&, const Rounding&);
// Codes, ranges and output.
MMACTNN_KERNEL(dequantize, const Memory&, const Memory&, const Memory&,
               const Geometry&, const CodeLayout&, const DrawnBits&);

namespace {

Tensor encode(const Tensor& input, const Tensor& codes,
              const Geometry& geometry, const CodeLayout& layout,
              const Rounding& rounding) {
  const Tensor ranges = empty_ranges(input, geometry);
  if (input.numel() != 0) {
    OnDevice(input).run(quantize_kernel, input, codes, ranges, geometry, layout,
                        rounding);
  }
  return ranges;
}

Tensor decode(const Tensor& codes, const Tensor& ranges,
              const std::vector<int64_t>& size,
              const std::vector<int64_t>& stride, ScalarType dtype,
              const Geometry& geometry, const CodeLayout& layout,
              const DrawnBits& drawn) {
  check_rotated_group(drawn.rotated, geometry.group_size);
  const Tensor output = empty_strided(codes, size, stride, dtype);
  check_dtype("dtype", output);
  check_dense("the output", output);
  if (output.numel() != 0) {
    OnDevice(codes).run(dequantize_kernel, codes, ranges, output, geometry,
                        layout, drawn);
  }
  return output;
}

std::tuple<Tensor, Tensor> quantize(Tensor input, int64_t bits,
                                    int64_t group_size, int64_t seed,
                                    int64_t offset,
                                    std::optional<Tensor> offset_tensor,
                                    bool rotated) {
  const Geometry geometry = input_geometry(input, group_size);
  check_bits(bits);
  const Rounding rounding =
      checked_rounding(seed, offset, offset_tensor, rotated, group_size, input);
  const Tensor codes = empty_codes(input, geometry, bits);
  const Tensor ranges =
      encode(input, codes, geometry, uniform_layout(geometry, bits), rounding);
  return {codes, ranges};
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor input, Tensor row_bits,
                                         Tensor row_starts, int64_t total_bits,
                                         int64_t group_size, int64_t seed,
                                         int64_t offset,
                                         std::optional<Tensor> offset_tensor,
                                         bool rotated) {
  const Geometry geometry = input_geometry(input, group_size);
  check_total_bits(total_bits, geometry.rows);
  const CodeLayout layout =
      checked_row_layout(input, geometry, row_bits, row_starts, total_bits);
  const Rounding rounding =
      checked_rounding(seed, offset, offset_tensor, rotated, group_size, input);
  const Tensor codes = empty_row_codes(input, geometry, total_bits);
  const Tensor ranges = encode(input, codes, geometry, layout, rounding);
  return {codes, ranges};
}

Tensor dequantize(Tensor codes, Tensor ranges, std::vector<int64_t> size,
                  std::vector<int64_t> stride, ScalarType dtype, int64_t bits,
                  int64_t group_size, std::vector<int64_t> drawn,
                  std::optional<Tensor> offset_tensor) {
  const Geometry geometry = output_geometry(ranges, size, group_size);
  return decode(codes, ranges, size, stride, dtype, geometry,
                checked_layout(codes, geometry, bits),
                checked_drawn(drawn, offset_tensor, codes));
}

Tensor dequantize_rows(Tensor codes, Tensor ranges, Tensor row_bits,
                       Tensor row_starts, std::vector<int64_t> size,
                       std::vector<int64_t> stride, ScalarType dtype,
                       int64_t group_size, std::vector<int64_t> drawn,
                       std::optional<Tensor> offset_tensor) {
  const Geometry geometry = output_geometry(ranges, size, group_size);
  return decode(codes, ranges, size, stride, dtype, geometry,
                checked_row_layout_of(codes, geometry, row_bits, row_starts),
                checked_drawn(drawn, offset_tensor, codes));
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "quantize(Tensor input, int bits, int group_size, int seed, "
      "int offset, Tensor? offset_tensor=None, bool rotated=False) -> "
      "(Tensor codes, Tensor "
      "ranges)");
  m.def(
      "dequantize(Tensor codes, Tensor ranges, int[] size, int[] stride, "
      "ScalarType dtype, int bits, int group_size, int[] drawn=[], "
      "Tensor? offset_tensor=None) -> Tensor");
  m.def(
      "quantize_rows(Tensor input, Tensor row_bits, Tensor row_starts, "
      "int total_bits, int group_size, int seed, int offset, "
      "Tensor? offset_tensor=None, bool rotated=False) -> (Tensor codes, "
      "Tensor ranges)");
  m.def(
      "dequantize_rows(Tensor codes, Tensor ranges, Tensor row_bits, "
      "Tensor row_starts, int[] size, int[] stride, ScalarType dtype, "
      "int group_size, int[] drawn=[], Tensor? offset_tensor=None) -> "
      "Tensor");
}

MMACTNN_IMPL(m) {
  m.impl("quantize", TORCH_BOX(&mmactnn::quantize));
  m.impl("dequantize", TORCH_BOX(&mmactnn::dequantize));
  m.impl("quantize_rows", TORCH_BOX(&mmactnn::quantize_rows));
  m.impl("dequantize_rows", TORCH_BOX(&mmactnn::dequantize_rows));
}
