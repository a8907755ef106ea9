// Layout of the channels of a tensor.
#pragma once

#include <cstdint>

namespace mmactnn {

// A tensor [N, C, *] in memory: rows (samples) of `count` channels of `plane`
// elements each, either channel after channel or, where `last` is set,
// element by element with the channels innermost.
struct Channels {
  int64_t rows;
  int64_t count;
  int64_t plane;
  bool last;

  int64_t row_numel() const { return count * plane; }
  int64_t numel() const { return rows * row_numel(); }
  // Elements of each channel.
  int64_t channel_numel() const { return rows * plane; }
};

}  // namespace mmactnn
