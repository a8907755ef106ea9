// Arithmetic of a fused normalisation that host and device share.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "codec.h"
#include "portability.h"

namespace mmactnn {

// Kinds of codes for the gradients of a normalisation.
enum class NormCodes {
  kPlain,  // plain codes, no rectifier
  kSplit,  // split codes, whose kinds are the mask of the rectifier
  kMask,   // plain codes, and the zeroed ones of the rectifier's output
};

// Calls `body` with them as a constant.
template <typename Body>
void dispatch_codes(NormCodes codes, const Body& body) {
  switch (codes) {
    case NormCodes::kPlain:
      return body(std::integral_constant<NormCodes, NormCodes::kPlain>{});
    case NormCodes::kSplit:
      return body(std::integral_constant<NormCodes, NormCodes::kSplit>{});
    case NormCodes::kMask:
      return body(std::integral_constant<NormCodes, NormCodes::kMask>{});
  }
}

// The gradient of a normalisation's input from that of its output, the
// normalised input, and the means over the channel of the first and of the
// product of both. Each operation is rounded by itself, as in reference.py.
MMACTNN_HOST_DEVICE float norm_grad(float grad, float normal, float mean_grad,
                                    float mean_product, float scale) {
  const float centred = add(grad, -mean_grad);
  return multiply(add(centred, -multiply(normal, mean_product)), scale);
}

// Code of one element of a row; those of a block follow one another without
// gaps, and so do blocks.
MMACTNN_HOST_DEVICE uint32_t code_at(const uint8_t* row, int64_t element,
                                     int bits) {
  const int64_t first = element * bits;
  const int shift = static_cast<int>(first & 7);
  uint32_t word = row[first >> 3];
  if (shift + bits > 8)
    word |= static_cast<uint32_t>(row[(first >> 3) + 1]) << 8;
  return (word >> shift) & max_code_of(bits);
}

// The running statistic after one more batch.
MMACTNN_HOST_DEVICE double update_running(double running, double batch,
                                          double momentum) {
  return running + momentum * (batch - running);
}

struct ChannelStats {
  float mean;
  float var;  // biased
  float invstd;
};

MMACTNN_HOST_DEVICE float invstd_of(double var, double eps) {
  return static_cast<float>(1.0 / sqrt(var + eps));
}

// From sums in double; of channels without elements the statistics are 0.
MMACTNN_HOST_DEVICE ChannelStats finish_stats(double mean, double squares,
                                              double count, double eps) {
  const double var = count > 0.0 ? squares / count : 0.0;
  return {static_cast<float>(mean), static_cast<float>(var),
          invstd_of(var, eps)};
}

}  // namespace mmactnn
