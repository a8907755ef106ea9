// The schema of every op. Kernels are registered beside their code in cpu/
// and cuda/, fake kernels in mmactnn/ops/_fake.py; shapes, dtypes and meaning
// are documented with the Python functions in mmactnn/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mmactnn, m) {
  m.def(
      "quantize(Tensor input, int bits, int group_size, int seed, "
      "int offset, Tensor? count=None) -> (Tensor codes, Tensor ranges)");
  m.def(
      "dequantize(Tensor codes, Tensor ranges, int[] size, int[] stride, "
      "ScalarType dtype, int bits, int group_size) -> Tensor");
  m.def(
      "quantize_rows(Tensor input, Tensor row_bits, Tensor row_starts, "
      "int total_bits, int group_size, int seed, int offset, "
      "Tensor? count=None) -> (Tensor codes, Tensor ranges)");
  m.def(
      "dequantize_rows(Tensor codes, Tensor ranges, Tensor row_bits, "
      "Tensor row_starts, int[] size, int[] stride, ScalarType dtype, "
      "int group_size) -> Tensor");
  m.def("row_spread(Tensor input, int group_size) -> Tensor");
  m.def(
      "split_bits(Tensor sensitivity, int total_bits) "
      "-> (Tensor row_bits, Tensor row_starts)");
  m.def(
      "relu_mask(Tensor input, float? max=None, float? slope=None) -> "
      "(Tensor output, Tensor mask)");
  m.def(
      "relu_mask_(Tensor(a!) input, float? max=None, float? slope=None) -> "
      "Tensor mask");
  m.def(
      "relu_mask_backward(Tensor grad_output, Tensor mask, "
      "float? slope=None) -> Tensor");
  m.def(
      "relu_codes(Tensor input, int bits, int group_size, int seed, "
      "int offset, Tensor? count=None) -> "
      "(Tensor output, Tensor codes, Tensor ranges)");
  m.def(
      "relu_codes_(Tensor(a!) input, int bits, int group_size, int seed, "
      "int offset, Tensor? count=None) -> (Tensor codes, Tensor ranges)");
  m.def(
      "relu_codes_backward(Tensor grad_output, Tensor codes, int bits) -> "
      "Tensor");
  m.def(
      "channel_stats(Tensor input, float eps, float momentum, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var) -> "
      "(Tensor mean, Tensor var, Tensor invstd)");
  m.def(
      "norm_act(Tensor input, Tensor? residual, Tensor mean, Tensor invstd, "
      "Tensor? weight, Tensor? bias, bool relu, int bits, int act_bits, "
      "int group_size, int seed, int offset, Tensor? count=None) -> "
      "(Tensor output, Tensor codes, Tensor ranges, Tensor act_codes, Tensor "
      "act_ranges)");
  m.def(
      "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool of_batch, float momentum, "
      "float eps, bool relu, int bits, int act_bits, int group_size, int seed, "
      "int offset, Tensor? count=None) -> Tensor[]");
  m.def(
      "batch_norm_act_(Tensor(a!) input, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor(b!)? running_mean, Tensor(c!)? running_var, "
      "Tensor(d!)? num_batches_tracked, bool of_batch, float momentum, "
      "float eps, bool relu, int bits, int act_bits, int group_size, int seed, "
      "int offset, Tensor? count=None) -> Tensor[]");
  m.def(
      "frozen_norm_act_(Tensor(a!) input, Tensor? residual, Tensor mean, "
      "Tensor var, Tensor? weight, Tensor? bias, float eps, bool relu) -> ()");
  m.def(
      "norm_grad_sums(Tensor grad_output, Tensor codes, Tensor ranges, "
      "int bits, int group_size, bool relu) -> Tensor sums");
  m.def(
      "norm_add_grad_sums(Tensor grad_output, Tensor codes, Tensor ranges, "
      "Tensor act_codes, int bits, int act_bits, int group_size) -> "
      "(Tensor grad, Tensor sums)");
  m.def(
      "norm_grad_input(Tensor grad_output, Tensor codes, Tensor ranges, "
      "Tensor scale, Tensor means, int bits, int group_size, bool relu) -> "
      "Tensor");
  m.def(
      "batch_norm_act_backward(Tensor grad_output, Tensor codes, "
      "Tensor ranges, Tensor? act_codes, Tensor? weight, Tensor invstd, "
      "bool relu, bool of_batch, bool needs_input, int bits, int act_bits, "
      "int group_size) -> Tensor[]");
  m.def(
      "dequantize_split(Tensor codes, Tensor ranges, Tensor? weight, "
      "Tensor? bias, int[] size, int[] stride, ScalarType dtype, int bits, "
      "int group_size) -> Tensor");
  m.def(
      "dequantize_zeroed(Tensor codes, Tensor ranges, int[] size, "
      "int[] stride, ScalarType dtype, int bits, int group_size) -> Tensor");
  m.def(
      "dropout(Tensor input, float p, int seed, int offset, "
      "Tensor? count=None) -> Tensor");
  m.def(
      "dropout_(Tensor(a!) input, float p, int seed, int offset, "
      "Tensor? count=None) -> ()");
  m.def(
      "max_pool2d(Tensor input, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int[] output_size, "
      "bool channels_last) -> (Tensor output, Tensor indices)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor indices, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int[] input_size, bool channels_last) -> Tensor");
  m.def(
      "conv_chain(Tensor[] inputs, Tensor?[] parameters, "
      "Tensor(a!)?[] buffers, Tensor plan, Tensor settings, int[] formats, "
      "int seed, int offset) -> (Tensor[] outputs, Tensor[] codes, "
      "Tensor[] kept, Tensor layouts)");
  m.def(
      "conv_chain_backward(Tensor?[] grad_outputs, Tensor?[] codes, "
      "int[] formats, Tensor?[] parameters, Tensor[] kept, Tensor layouts, "
      "Tensor plan, int[] needs, int[] needs_inputs, bool wide, bool observed, "
      "ScalarType dtype) -> Tensor?[]");
}
