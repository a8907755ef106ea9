#include <cstdint>

#include "../common/bit_gain.h"
#include "../common/codec.h"
#include "block.h"
#include "launch.h"

namespace mmactnn {
namespace {

// Steps from one width to the next of a row: from 1 to 2 bits and so on.
constexpr int kSteps = kMaxBits - 1;

// Sum of `counts(sensitivity)`, a number of steps, over all rows; all threads
// take part.
template <typename Counts>
__device__ int count_steps(const float* sensitivity, int rows,
                           const Counts& counts) {
  int count = 0;
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    count += counts(clamp_sensitivity(sensitivity[row]));
  }
  return block_sum(count);
}

__device__ __forceinline__ int steps_above(float sensitivity, uint32_t gain) {
  int count = 0;
#pragma unroll
  for (int bits = 1; bits <= kSteps; ++bits) {
    count += gain_key(sensitivity, bits) > gain;
  }
  return count;
}

// One thread block. Steps are taken in the order of their gains; equal gains
// in the order of the bits before the step, then of the rows. The first
// `steps` of all are found without sorting: those above a gain, and some of
// those that equal it.
__global__ void __launch_bounds__(kThreads)
    allocate_sample_bits_kernel(const float* __restrict__ sensitivity,
                                uint8_t* __restrict__ row_bits,
                                int32_t* __restrict__ row_starts, int rows,
                                int steps) {
  // The smallest gain that no more than `steps` steps are above of.
  uint32_t gain = 0;
  uint32_t end = 0x7F800000u;
  while (gain < end) {
    const uint32_t middle = (gain + end) / 2;
    const int above = count_steps(
        sensitivity, rows, [=](float s) { return steps_above(s, middle); });
    if (above <= steps) {
      end = middle;
    } else {
      gain = middle + 1;
    }
  }
  int left = steps - count_steps(sensitivity, rows,
                                 [=](float s) { return steps_above(s, gain); });
  // Steps that equal it are taken by all rows from 1 to `partial` bits, and
  // by the first `left` rows from there on.
  int partial = 1;
  for (; partial <= kSteps; ++partial) {
    const int equal = count_steps(sensitivity, rows, [=](float s) {
      return static_cast<int>(gain_key(s, partial) == gain);
    });
    if (equal > left) break;
    left -= equal;
  }

  int start = 0;
  for (int first = 0; first < rows; first += kThreads) {
    const int row = first + static_cast<int>(threadIdx.x);
    const float value = row < rows ? clamp_sensitivity(sensitivity[row]) : 0.0f;
    int bits = 0;
    bool candidate = false;
    if (row < rows) {
      bits = 1 + steps_above(value, gain);
      for (int before = 1; before < partial; ++before) {
        bits += gain_key(value, before) == gain;
      }
      candidate = partial <= kSteps && gain_key(value, partial) == gain;
    }
    int candidates, total;
    const int rank = block_exclusive_sum(candidate, &candidates);
    if (candidate && rank < left) ++bits;
    left -= min(left, candidates);
    const int before = block_exclusive_sum(bits, &total);
    if (row < rows) {
      row_bits[row] = static_cast<uint8_t>(bits);
      row_starts[row] = start + before;
    }
    start += total;
  }
}

}  // namespace

namespace cuda {

void allocate_sample_bits(const Memory& sensitivity, const Memory& row_bits,
                          const Memory& row_starts, int64_t total_bits) {
  const int64_t rows = sensitivity.numel();
  allocate_sample_bits_kernel<<<1, kThreads, 0, current_stream()>>>(
      static_cast<const float*>(sensitivity.const_data_ptr()),
      static_cast<uint8_t*>(row_bits.mutable_data_ptr()),
      static_cast<int32_t*>(row_starts.mutable_data_ptr()),
      static_cast<int>(rows), static_cast<int>(total_bits - rows));
  check_launch();
}

}  // namespace cuda
}  // namespace mmactnn
