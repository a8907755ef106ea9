// Channels of the elements of a block whose place in a row stays the same.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/portability.h"
#include "launch.h"

namespace mmactnn {

struct ChannelPlaces {
  uint32_t count;  // channels
  uint32_t plane;
  bool last;

  explicit ChannelPlaces(const Channels& channels)
      : count(static_cast<uint32_t>(channels.count)),
        plane(static_cast<uint32_t>(channels.plane)),
        last(channels.last) {}

  __device__ __forceinline__ uint32_t of(uint32_t place) const {
    return last ? place % count : place / plane;
  }
  // Elements of a block from `place` on that are of its first channel; of
  // channels that are not innermost.
  __device__ __forceinline__ int left(uint32_t place) const {
    return static_cast<int>((place / plane + 1) * plane - place);
  }
  // The places of a channel in a row of `width` elements.
  struct Places {
    uint32_t first;
    uint32_t count;
    uint32_t step;
  };
  MMACTNN_HOST_DEVICE Places places(uint32_t channel, uint32_t width) const {
    if (last) return {channel, width / count, count};
    return {channel * plane, plane, 1};
  }
  // Whether each element of a block may have a channel of its own; else there
  // are two at most, one after the other.
  bool of_elements() const { return last || plane < kBlock; }

  // Calls `body` with that as a constant.
  template <typename Body>
  void dispatch(const Body& body) const {
    if (of_elements()) {
      body(std::true_type{});
    } else {
      body(std::false_type{});
    }
  }
};

// Numbers of the channels of a block's elements.
template <bool kElements>
class PlaceValues;

template <>
class PlaceValues<true> {
 public:
  // `none` is that of all channels where there are no numbers.
  __device__ __forceinline__ PlaceValues(const ChannelPlaces& channels,
                                         uint32_t place, const float* numbers,
                                         float none = 0.0f) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      value_[i] = numbers == nullptr ? none : numbers[channels.of(place + i)];
    }
  }
  __device__ __forceinline__ float of(int i) const { return value_[i]; }

 private:
  float value_[kBlock];
};

template <>
class PlaceValues<false> {
 public:
  __device__ __forceinline__ PlaceValues(const ChannelPlaces& channels,
                                         uint32_t place, const float* numbers,
                                         float none = 0.0f) {
    const uint32_t first = channels.of(place);
    const uint32_t last = channels.of(place + kBlock - 1);
    left_ = channels.left(place);
    first_ = numbers == nullptr ? none : numbers[first];
    second_ = numbers == nullptr ? none : numbers[last];
  }
  __device__ __forceinline__ float of(int i) const {
    return i < left_ ? first_ : second_;
  }

 private:
  int left_;  // elements of the first channel
  float first_;
  float second_;
};

}  // namespace mmactnn
