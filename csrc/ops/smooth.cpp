#include "../common/smooth.h"

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/channels.h"
#include "allocate.h"
#include "channel_checks.h"
#include "registration.h"

namespace mmactnn {

// Input and codes.
MMACTNN_KERNEL(smooth_derivative, const Memory&, const Memory&, const Smooth&,
               const DerivativeCodes&, const CountedStream&);
// Gradient of the output, codes and gradient of the input.
MMACTNN_KERNEL(smooth_derivative_backward, const Memory&, const Memory&,
               const Memory&, const DerivativeCodes&, const CountedStream&);
// Codes, ranges and output; weight and bias of a normalisation, and channels
// if there is one of them.
MMACTNN_KERNEL(smooth_decode, const Memory&, const Memory&, const Memory&,
               const Memory&, const Memory&, const Channels&, const Geometry&,
               int, const Smooth&, const DrawnBits&);
// Gradient of the output, codes, ranges and gradient of the input; the rest as
// above.
MMACTNN_KERNEL(smooth_decode_backward, const Memory&, const Memory&,
               const Memory&, const Memory&, const Memory&, const Memory&,
               const Channels&, const Geometry&, int, const Smooth&,
               const DrawnBits&);

namespace {

Smooth checked_function(int64_t function,
                        const std::vector<double>& parameters) {
  STD_TORCH_CHECK(function >= 0 && function < kSmoothFunctions,
                  "function must be from 0 to ", kSmoothFunctions - 1, ", got ",
                  function);
  STD_TORCH_CHECK(parameters.size() == 2, "a function has 2 parameters, got ",
                  parameters.size());
  return {static_cast<int>(function), static_cast<float>(parameters[0]),
          static_cast<float>(parameters[1])};
}

DerivativeCodes checked_codes(double low, double high, int64_t bits,
                              bool dithered) {
  check_bits(bits);
  STD_TORCH_CHECK(high > low, "high must exceed low, got ", high, " and ", low);
  const uint32_t max_code = max_code_of(static_cast<int>(bits));
  return {static_cast<float>(low), static_cast<float>((high - low) / max_code),
          static_cast<int>(bits), fraction_bits(max_code), dithered};
}

int64_t code_bytes(int64_t numel, int64_t bits) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  return blocks * bits + flags_of(blocks);
}

Tensor smooth_derivative(Tensor input, int64_t function,
                         std::vector<double> parameters, double low,
                         double high, int64_t bits, int64_t seed,
                         int64_t offset, std::optional<Tensor> offset_tensor) {
  check_dtype("input", input);
  check_dense("input", input);
  const Smooth smooth = checked_function(function, parameters);
  const DerivativeCodes format = checked_codes(low, high, bits, true);
  const CountedStream random =
      checked_stream(seed, offset, offset_tensor, input);
  const Tensor codes =
      empty(input, {code_bytes(input.numel(), bits)}, ScalarType::Byte);
  if (input.numel() != 0) {
    OnDevice(input).run(smooth_derivative_kernel, input, codes, smooth, format,
                        random);
  }
  return codes;
}

Tensor smooth_derivative_backward(Tensor grad_output, Tensor codes, double low,
                                  double high, int64_t bits,
                                  std::vector<int64_t> drawn,
                                  std::optional<Tensor> offset_tensor) {
  check_dtype("grad_output", grad_output);
  check_dense("grad_output", grad_output);
  const DrawnBits random = checked_drawn(drawn, offset_tensor, grad_output);
  const DerivativeCodes format = checked_codes(low, high, bits, random.enabled);
  const int64_t bytes = code_bytes(grad_output.numel(), bits);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 1 &&
                      codes.is_contiguous() && codes.size(0) == bytes,
                  "codes must be a contiguous uint8 tensor of ", bytes,
                  " bytes");
  check_same_device("codes", codes, grad_output);
  const Tensor grad_input = empty_dense_like(grad_output);
  if (grad_output.numel() != 0) {
    OnDevice(grad_output)
        .run(smooth_derivative_backward_kernel, grad_output, codes, grad_input,
             format, random.random);
  }
  return grad_input;
}

// The channels of a tensor, if there are parameters of them.
Channels checked_channels(const char* name, const Tensor& tensor,
                          const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& bias) {
  if (!weight && !bias) return {};
  const Channels channels = channels_of(name, tensor);
  if (weight) check_per_channel("weight", *weight, channels, tensor);
  if (bias) check_per_channel("bias", *bias, channels, tensor);
  return channels;
}

Tensor smooth_decode(Tensor codes, Tensor ranges, std::vector<int64_t> size,
                     std::vector<int64_t> stride, ScalarType dtype,
                     int64_t function, std::vector<double> parameters,
                     int64_t bits, int64_t group_size,
                     std::vector<int64_t> drawn,
                     std::optional<Tensor> offset_tensor,
                     std::optional<Tensor> weight, std::optional<Tensor> bias) {
  const Geometry geometry = output_geometry(ranges, size, group_size);
  const CodeLayout layout = checked_layout(codes, geometry, bits);
  const Smooth smooth = checked_function(function, parameters);
  const Tensor output = empty_strided(codes, size, stride, dtype);
  check_dtype("dtype", output);
  check_dense("the output", output);
  const Channels channels =
      checked_channels("the output", output, weight, bias);
  if (output.numel() != 0) {
    OnDevice(codes).run(smooth_decode_kernel, codes, ranges, output, weight,
                        bias, channels, geometry, layout.bits, smooth,
                        checked_drawn(drawn, offset_tensor, codes));
  }
  return output;
}

Tensor smooth_decode_backward(Tensor grad_output, Tensor codes, Tensor ranges,
                              int64_t function, std::vector<double> parameters,
                              int64_t bits, int64_t group_size,
                              std::vector<int64_t> drawn,
                              std::optional<Tensor> offset_tensor,
                              std::optional<Tensor> weight,
                              std::optional<Tensor> bias) {
  const Geometry geometry = input_geometry(grad_output, group_size);
  const auto sizes = grad_output.sizes();
  output_geometry(ranges, {sizes.begin(), sizes.end()}, group_size);
  const CodeLayout layout = checked_layout(codes, geometry, bits);
  const Smooth smooth = checked_function(function, parameters);
  const Channels channels =
      checked_channels("grad_output", grad_output, weight, bias);
  const Tensor grad_input = empty_dense_like(grad_output);
  if (grad_output.numel() != 0) {
    OnDevice(grad_output)
        .run(smooth_decode_backward_kernel, grad_output, codes, ranges,
             grad_input, weight, bias, channels, geometry, layout.bits, smooth,
             checked_drawn(drawn, offset_tensor, codes));
  }
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "smooth_derivative(Tensor input, int function, float[] parameters, "
      "float low, float high, int bits, int seed, int offset, "
      "Tensor? offset_tensor=None) -> Tensor");
  m.def(
      "smooth_derivative_backward(Tensor grad_output, Tensor codes, float low, "
      "float high, int bits, int[] drawn=[], Tensor? offset_tensor=None) -> "
      "Tensor");
  m.def(
      "smooth_decode(Tensor codes, Tensor ranges, int[] size, int[] stride, "
      "ScalarType dtype, int function, float[] parameters, int bits, "
      "int group_size, int[] drawn=[], Tensor? offset_tensor=None, "
      "Tensor? weight=None, Tensor? bias=None) -> Tensor");
  m.def(
      "smooth_decode_backward(Tensor grad_output, Tensor codes, "
      "Tensor ranges, int function, float[] parameters, int bits, "
      "int group_size, int[] drawn=[], Tensor? offset_tensor=None, "
      "Tensor? weight=None, Tensor? bias=None) -> Tensor");
}

MMACTNN_IMPL(m) {
  m.impl("smooth_derivative", TORCH_BOX(&mmactnn::smooth_derivative));
  m.impl("smooth_derivative_backward",
         TORCH_BOX(&mmactnn::smooth_derivative_backward));
  m.impl("smooth_decode", TORCH_BOX(&mmactnn::smooth_decode));
  m.impl("smooth_decode_backward", TORCH_BOX(&mmactnn::smooth_decode_backward));
}
