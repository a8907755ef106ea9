
#include <algorithm>
#include <cstdint>
#include <queue>
#include <tuple>
#include <vector>

#include "../common/bit_gain.h"
#include "../common/codec.h"
#include "../common/memory.h"

namespace mmactnn {
namespace {

// The next bit that a row could get.
struct NextBit {
  uint32_t gain;
  int bits;  // of the row so far
  int64_t row;

  // Whether this bit comes after another one. Of equal gains that of the row
  // with fewer bits comes first, then that of the lower row.
  bool operator<(const NextBit& other) const {
    return std::tuple(gain, -bits, -row) <
           std::tuple(other.gain, -other.bits, -other.row);
  }
};

}  // namespace

namespace cpu {

void allocate_sample_bits(const Memory& sensitivity, const Memory& row_bits,
                          const Memory& row_starts, int64_t total_bits) {
  const int64_t rows = sensitivity.numel();
  const auto* values = static_cast<const float*>(sensitivity.const_data_ptr());
  auto* bits = static_cast<uint8_t*>(row_bits.mutable_data_ptr());
  auto* starts = static_cast<int32_t*>(row_starts.mutable_data_ptr());
  std::fill(bits, bits + rows, uint8_t{1});

  std::vector<NextBit> first;
  first.reserve(rows);
  for (int64_t row = 0; row < rows; ++row) {
    first.push_back({gain_key(clamp_sensitivity(values[row]), 1), 1, row});
  }
  std::priority_queue<NextBit> queue({}, std::move(first));
  for (int64_t left = total_bits - rows; left > 0; --left) {
    const NextBit next = queue.top();
    queue.pop();
    const int width = ++bits[next.row];
    if (width < kMaxBits) {
      const float value = clamp_sensitivity(values[next.row]);
      queue.push({gain_key(value, width), width, next.row});
    }
  }

  int32_t start = 0;
  for (int64_t row = 0; row < rows; ++row) {
    starts[row] = start;
    start += bits[row];
  }
}

}  // namespace cpu
}  // namespace mmactnn
