// Launchers for rotated codes (common/rotation.h). Their kernels go by whole
// groups, a block of 8 elements for each thread of a warp.
#pragma once

#include "../common/channels.h"
#include "../common/geometry.h"
#include "../common/memory.h"
#include "../common/norm_act_arguments.h"
#include "../common/norm_codes.h"
#include "../common/random_bits.h"

namespace mmactnn::rotated {

// Both leave out rows of more bits than rotated codes have, and return whether
// there are none.
bool quantize(const Memory& input, const Memory& codes, const Memory& ranges,
              const Geometry& geometry, const CodeLayout& layout,
              const CountedStream& random);
bool dequantize(const Memory& codes, const Memory& ranges, const Memory& output,
                const Geometry& geometry, const CodeLayout& layout,
                const DrawnBits& drawn);

// The others are those of the ops.
void relu_codes(const Memory& input, const Memory& output, const Memory& codes,
                const Memory& ranges, const Geometry& geometry, int bits,
                const CountedStream& random);
void dequantize_split(const Memory& codes, const Memory& ranges,
                      const Memory& weight, const Memory& bias,
                      const Memory& output, const Geometry& geometry,
                      const Channels& channels, int bits,
                      const DrawnBits& drawn);
void dequantize_zeroed(const Memory& codes, const Memory& ranges,
                       const Memory& output, const Geometry& geometry, int bits,
                       const DrawnBits& drawn);
// If `codes_alone` is set, only the codes of the normalised input are written.
void norm_act(const NormActArguments& arguments, const Channels& channels,
              const NormActOutputs& outputs, bool codes_alone);
void norm_grad_sums(const Memory& grad_output, const NormArguments& arguments,
                    const NormSums& sums);
void norm_grad_input(const Memory& grad_output, const NormArguments& arguments,
                     const NormFactors& factors, const Memory& grad_input);

}  // namespace mmactnn::rotated
