// Channels of the elements of a block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/divider.h"
#include "launch.h"

namespace mmactnn {

// Index of channels for the blocks of 8 elements of a row, which has less than
// 2^31 elements.
struct ChannelIndex {
  Divider by_period;  // elements of a channel or, channels last, channels
  uint32_t channels;
  bool last;
  // Blocks begin where 8 of every parameter lie on a 16-byte boundary.
  bool vectorized;

  // Channel of an element, and the run of that channel from there.
  struct Place {
    uint32_t channel;
    uint32_t left;  // elements of this channel that follow each other from here
  };

  __device__ __forceinline__ Place of(uint32_t element) const {
    const uint32_t quotient = by_period.quotient(element);
    const uint32_t rest = element - quotient * by_period.divisor;
    return last ? Place{rest, 1u} : Place{quotient, by_period.divisor - rest};
  }
  __device__ __forceinline__ Place next(Place place) const {
    if (place.left > 1u) return {place.channel, place.left - 1u};
    const uint32_t channel = place.channel + 1u;
    return {channel < channels ? channel : 0u, last ? 1u : by_period.divisor};
  }
};

// `parameters` are those of all channels; null for those that a layer lacks.
inline ChannelIndex index_channels(
    const Channels& channels, std::initializer_list<const void*> parameters) {
  const bool aligned = std::all_of(
      parameters.begin(), parameters.end(),
      [](const void* data) { return data != nullptr && is_aligned(data, 16); });
  STD_TORCH_CHECK(channels.row_numel() <= kMaxIndex,
                  "a sample may have at most ", kMaxIndex, " elements, got ",
                  channels.row_numel());
  return {Divider(static_cast<uint32_t>(channels.last ? channels.count
                                                      : channels.plane)),
          static_cast<uint32_t>(channels.count), channels.last,
          channels.last && aligned && channels.count % kBlock == 0};
}

// A parameter that a layer may not have.
__device__ __forceinline__ float load_channel(const float* source,
                                              uint32_t channel, float none) {
  return source == nullptr ? none : source[channel];
}

// Parameters of the channels of a block, or of half of one where vectorized().
template <int kItems = kBlock>
struct ChannelWords {
  float item[kItems];

  explicit __device__ __forceinline__ ChannelWords(const float* source) {
    constexpr int kPerWord = 4;
#pragma unroll
    for (int w = 0; w < kItems; w += kPerWord) {
      const auto word =
          *reinterpret_cast<const Vector<float, kPerWord>*>(source + w);
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) item[w + i] = word.item[i];
    }
  }
};

}  // namespace mmactnn
