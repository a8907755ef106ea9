#include <cstdint>
#include <optional>
#include <vector>

#include "allocate.h"
#include "channel_checks.h"
#include "rectified_checks.h"
#include "registration.h"

namespace mmactnn {

// Codes, ranges, weight, bias and output; channels of the output; bits.
MMACTNN_KERNEL(dequantize_split, const Memory&, const Memory&, const Memory&,
               const Memory&, const Memory&, const Geometry&, const Channels&,
               int, const DrawnBits&);
// Codes, ranges and output; bits.
MMACTNN_KERNEL(dequantize_zeroed, const Memory&, const Memory&, const Memory&,
               const Geometry&, int, const DrawnBits&);

namespace {

// The geometry of rectified codes that are to be decoded to `sizes`.
Geometry check_rectified(const Tensor& codes, const Tensor& ranges,
                         const std::vector<int64_t>& sizes, int64_t bits,
                         int64_t group_size, bool split,
                         const DrawnBits& drawn) {
  check_rotated_group(drawn.rotated, group_size);
  check_rectified_bits("bits", bits);
  const Geometry geometry = geometry_of_size(sizes, group_size);
  checked_layout(codes, geometry, bits);
  const bool rotated =
      drawn.rotated && rotates(geometry, static_cast<int>(bits) - 1);
  check_code_ranges(ranges, geometry, range_width(split, rotated), codes);
  return geometry;
}

Tensor dequantize_split(Tensor codes, Tensor ranges,
                        std::optional<Tensor> weight,
                        std::optional<Tensor> bias, std::vector<int64_t> size,
                        std::vector<int64_t> stride, ScalarType dtype,
                        int64_t bits, int64_t group_size,
                        std::vector<int64_t> drawn,
                        std::optional<Tensor> offset_tensor) {
  const DrawnBits random = checked_drawn(drawn, offset_tensor, codes);
  const Geometry geometry =
      check_rectified(codes, ranges, size, bits, group_size, true, random);
  const Tensor output = empty_strided(codes, size, stride, dtype);
  const Channels channels = channels_of("the output", output);
  if (weight) check_per_channel("weight", *weight, channels, codes);
  if (bias) check_per_channel("bias", *bias, channels, codes);
  if (output.numel() != 0) {
    OnDevice(codes).run(dequantize_split_kernel, codes, ranges, weight, bias,
                        output, geometry, channels, static_cast<int>(bits),
                        random);
  }
  return output;
}

Tensor dequantize_zeroed(Tensor codes, Tensor ranges, std::vector<int64_t> size,
                         std::vector<int64_t> stride, ScalarType dtype,
                         int64_t bits, int64_t group_size,
                         std::vector<int64_t> drawn,
                         std::optional<Tensor> offset_tensor) {
  const DrawnBits random = checked_drawn(drawn, offset_tensor, codes);
  const Geometry geometry =
      check_rectified(codes, ranges, size, bits, group_size, false, random);
  const Tensor output = empty_strided(codes, size, stride, dtype);
  check_dtype("dtype", output);
  check_dense("the output", output);
  if (output.numel() != 0) {
    OnDevice(codes).run(dequantize_zeroed_kernel, codes, ranges, output,
                        geometry, static_cast<int>(bits), random);
  }
  return output;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "dequantize_split(Tensor codes, Tensor ranges, Tensor? weight, "
      "Tensor? bias, int[] size, int[] stride, ScalarType dtype, int bits, "
      "int group_size, int[] drawn=[], Tensor? offset_tensor=None) -> "
      "Tensor");
  m.def(
      "dequantize_zeroed(Tensor codes, Tensor ranges, int[] size, "
      "int[] stride, ScalarType dtype, int bits, int group_size, "
      "int[] drawn=[], Tensor? offset_tensor=None) -> Tensor");
}

MMACTNN_IMPL(m) {
  m.impl("dequantize_split", TORCH_BOX(&mmactnn::dequantize_split));
  m.impl("dequantize_zeroed", TORCH_BOX(&mmactnn::dequantize_zeroed));
}
