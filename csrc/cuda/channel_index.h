// Which channels the elements of a block are of.
#pragma once

#include <cstdint>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/divider.h"
#include "launch.h"

namespace mmactnn {

// Of the blocks of 8 elements of a row, which has less than 2^31 elements.
struct ChannelIndex {
  Divider by_period;  // elements of a channel or, channels last, channels
  uint32_t channels;
  bool last;
  bool vectorized;  // blocks begin where 8 parameters lie on a 16-byte boundary

  // What the elements from the first of a block on are of.
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

// `aligned`: whether the parameters of all channels are on 16-byte boundaries.
inline ChannelIndex index_channels(const Channels& channels, bool aligned) {
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

// Those of 4 consecutive channels, from a 16-byte boundary on.
constexpr int kChannelsPerWord = 4;
using ChannelWord = Vector<float, kChannelsPerWord>;

__device__ __forceinline__ ChannelWord load_channels(const float* source,
                                                     uint32_t channel,
                                                     float none) {
  if (source == nullptr) return {{none, none, none, none}};
  return *reinterpret_cast<const ChannelWord*>(source + channel);
}

}  // namespace mmactnn
