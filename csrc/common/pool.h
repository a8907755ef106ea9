// Max pooling: how windows lie over a tensor, and the search for a window's
// maximum and for the windows whose maximum an element is.
//
// A maximum is remembered as its tap, the position inside of the window, in
// 4 bits; two outputs share a byte, the first in the lower bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "codec.h"
#include "divider.h"
#include "portability.h"

namespace mmactnn {

constexpr int32_t kMaxTaps = 16;

// One of the two dimensions that windows move along.
struct PoolAxis {
  int32_t input;   // elements
  int32_t output;  // windows
  int32_t kernel;  // taps of a window
  int32_t padding;
  Divider stride;
  Divider dilation;

  // The element under tap 0 of a window; maybe outside.
  MMACTNN_HOST_DEVICE int32_t start(int32_t window) const {
    return window * static_cast<int32_t>(stride.divisor) - padding;
  }

  // The first and the last window that may hold an element.
  MMACTNN_HOST_DEVICE int32_t first_window(int32_t element) const {
    const int32_t extent =
        (kernel - 1) * static_cast<int32_t>(dilation.divisor);
    const int32_t distance = element + padding - extent;
    if (distance <= 0) return 0;
    return static_cast<int32_t>(
               stride.quotient(static_cast<uint32_t>(distance - 1))) +
           1;
  }
  MMACTNN_HOST_DEVICE int32_t last_window(int32_t element) const {
    const int32_t window = static_cast<int32_t>(
        stride.quotient(static_cast<uint32_t>(element + padding)));
    return window < output ? window : output - 1;
  }

  // The tap of such a window that lies over the element, or -1.
  MMACTNN_HOST_DEVICE int32_t tap(int32_t element, int32_t window) const {
    const int32_t distance = element - start(window);
    const int32_t tap = static_cast<int32_t>(
        dilation.quotient(static_cast<uint32_t>(distance)));
    return tap * static_cast<int32_t>(dilation.divisor) == distance ? tap : -1;
  }
};

// Both tensors are [outer, height, width, inner] in memory: `inner` is 1, or
// the number of channels of channels_last tensors.
struct Pool {
  int64_t outer;
  int64_t inner;
  PoolAxis height;
  PoolAxis width;

  int64_t input_plane() const {
    return int64_t{height.input} * width.input * inner;
  }
  int64_t output_plane() const {
    return int64_t{height.output} * width.output * inner;
  }
};

template <typename T>
struct Maximum {
  T value;
  uint32_t tap;
};

// The maximum of a window, as torch finds it: the first of equals, but the
// last NaN if there is any. `input` is the element [0, 0] of the plane, whose
// neighbours are `inner` apart. `Number` turns T into float and back.
template <typename T, typename Number, typename Index>
MMACTNN_HOST_DEVICE Maximum<T> find_maximum(const T* input, const Pool& pool,
                                            int32_t row_window,
                                            int32_t column_window) {
  const int32_t row_start = pool.height.start(row_window);
  const int32_t column_start = pool.width.start(column_window);
  const Index inner = static_cast<Index>(pool.inner);
  float best = -INFINITY;
  Maximum<T> maximum{Number::store(best), 0};
  bool found = false;
  for (int32_t i = 0; i < pool.height.kernel; ++i) {
    const int32_t row =
        row_start + i * static_cast<int32_t>(pool.height.dilation.divisor);
    if (row < 0 || row >= pool.height.input) continue;
    for (int32_t j = 0; j < pool.width.kernel; ++j) {
      const int32_t column =
          column_start + j * static_cast<int32_t>(pool.width.dilation.divisor);
      if (column < 0 || column >= pool.width.input) continue;
      const T item =
          input[(static_cast<Index>(row) * pool.width.input + column) * inner];
      const float value = Number::load(item);
      if (!found || value > best || is_nan(value)) {
        found = true;
        best = value;
        maximum = {item, static_cast<uint32_t>(i * pool.width.kernel + j)};
      }
    }
  }
  return maximum;
}

// The gradient of the element [row, column] of a plane: the sum over the
// windows whose maximum it is, in the order of the windows. `plane` is the
// index of the output plane's element [0, 0].
template <typename T, typename Number, typename Index>
MMACTNN_HOST_DEVICE T gather_gradient(const T* grad_output,
                                      const uint8_t* indices, const Pool& pool,
                                      Index plane, int32_t row,
                                      int32_t column) {
  const int32_t last_row = pool.height.last_window(row);
  const int32_t first_column = pool.width.first_window(column);
  const int32_t last_column = pool.width.last_window(column);
  const Index inner = static_cast<Index>(pool.inner);
  float sum = 0.0f;
  for (int32_t i = pool.height.first_window(row); i <= last_row; ++i) {
    const int32_t row_tap = pool.height.tap(row, i);
    if (row_tap < 0) continue;
    for (int32_t j = first_column; j <= last_column; ++j) {
      const int32_t column_tap = pool.width.tap(column, j);
      if (column_tap < 0) continue;
      const Index output =
          plane + (static_cast<Index>(i) * pool.width.output + j) * inner;
      const int32_t tap = (indices[output >> 1] >> ((output & 1) * 4)) & 15;
      if (tap == row_tap * pool.width.kernel + column_tap) {
        sum = add(sum, Number::load(grad_output[output]));
      }
    }
  }
  return Number::store(sum);
}

}  // namespace mmactnn
