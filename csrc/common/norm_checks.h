// The arguments that the gradients of a normalisation share, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "channels.h"
#include "geometry.h"

namespace mmactnn {

struct NormArguments {
  Channels channels;
  Geometry geometry;
  const Tensor* codes;
  const Tensor* ranges;
  const Tensor* act_codes;  // null if there are none
  int64_t bits;
  int64_t act_bits;  // `bits` if there are none
};

inline NormArguments check_norm_codes(const Tensor& grad_output,
                                      const Tensor& codes, const Tensor& ranges,
                                      int64_t bits, int64_t group_size,
                                      bool split) {
  const Channels channels = channels_of("grad_output", grad_output);
  const Geometry geometry = code_geometry("codes", codes, channels, group_size,
                                          bits, split, grad_output);
  check_code_ranges(ranges, geometry, split, grad_output);
  return {channels, geometry, &codes, &ranges, nullptr, bits, bits};
}

inline void check_act_codes(const Tensor& grad_output, const Tensor& act_codes,
                            int64_t act_bits, int64_t group_size,
                            NormArguments& arguments) {
  code_geometry("act_codes", act_codes, arguments.channels, group_size,
                act_bits, true, grad_output);
  arguments.act_codes = &act_codes;
  arguments.act_bits = act_bits;
}

}  // namespace mmactnn
