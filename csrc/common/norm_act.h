// Normalisation with addition and ReLU of one element. Host and device share
// every operation, each of which is rounded by itself, as in reference.py.
#pragma once

#include <type_traits>

#include "codec.h"
#include "portability.h"

namespace mmactnn {

// Kinds of payloads for the backward pass.
enum class NormActPayload {
  kPlain,           // plain codes of the normalised input
  kSplit,           // split ones, where a rectifier follows at once
  kPlainAndZeroed,  // plain ones, and zeroed ones of the output, where a
                    // residual and a rectifier follow
};

// Calls `body` with it as a constant.
template <typename Body>
void dispatch_payload(NormActPayload payload, const Body& body) {
  switch (payload) {
    case NormActPayload::kPlain:
      return body(
          std::integral_constant<NormActPayload, NormActPayload::kPlain>{});
    case NormActPayload::kSplit:
      return body(
          std::integral_constant<NormActPayload, NormActPayload::kSplit>{});
    case NormActPayload::kPlainAndZeroed:
      return body(std::integral_constant<NormActPayload,
                                         NormActPayload::kPlainAndZeroed>{});
  }
}

// Stand-ins for a missing weight and bias, which change no value: adding -0
// preserves both zeros.
constexpr float kNoWeight = 1.0f;
constexpr float kNoBias = -0.0f;

struct ChannelNorm {
  float mean;
  float invstd;
  float weight;
  float bias;

  MMACTNN_HOST_DEVICE float normalise(float value) const {
    return multiply(add(value, -mean), invstd);
  }
  MMACTNN_HOST_DEVICE float scale(float normal) const {
    return add(multiply(normal, weight), bias);
  }
};

}  // namespace mmactnn
