// Cross entropy of logits that are interpolated to the size of their labels,
// and its gradient, pixel by pixel: the large logits never exist.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "portability.h"

namespace mmactnn {

// Places between two neighbours of an axis: that of `high` has `weight`, that
// of `low` the rest.
struct Tap {
  int32_t low;
  int32_t high;
  float weight;

  // Weight of one place.
  MMACTNN_HOST_DEVICE float of(int32_t place) const {
    return (place == low ? 1.0f - weight : 0.0f) +
           (place == high ? weight : 0.0f);
  }
};

// Half-open range of places.
struct Readers {
  int32_t begin;
  int32_t end;
};

// Bilinear interpolation along an axis, as torch's without antialiasing.
struct ResizedAxis {
  int32_t input;
  int32_t output;
  float scale;  // steps of the input for one of the output
  bool align_corners;

  static ResizedAxis of(int64_t input, int64_t output, bool align_corners) {
    float scale = 0.0f;
    if (!align_corners) {
      scale = static_cast<float>(input) / static_cast<float>(output);
    } else if (output > 1) {
      scale = static_cast<float>(input - 1) / static_cast<float>(output - 1);
    }
    return {static_cast<int32_t>(input), static_cast<int32_t>(output), scale,
            align_corners};
  }

  MMACTNN_HOST_DEVICE Tap tap(int32_t place) const {
    const float at = static_cast<float>(place);
    const float source =
        align_corners ? scale * at : fmaxf(scale * (at + 0.5f) - 0.5f, 0.0f);
    const int32_t floor = static_cast<int32_t>(source);
    const int32_t low = floor < input - 1 ? floor : input - 1;
    const float weight = source - static_cast<float>(low);
    return {low, low < input - 1 ? low + 1 : low,
            fminf(fmaxf(weight, 0.0f), 1.0f)};
  }

  // A range of the output that holds all places with a tap at `place`, and
  // few others.
  MMACTNN_HOST_DEVICE Readers readers(int32_t place) const {
    if (scale == 0.0f) return {0, output};
    const float shift = align_corners ? 0.0f : 0.5f;
    const float first = (static_cast<float>(place) - 1.0f + shift) / scale;
    const float last = (static_cast<float>(place) + 1.0f + shift) / scale;
    // A place more at both ends, as divisions are rounded.
    const float begin = floorf(first - shift) - 1.0f;
    const float end = ceilf(last - shift) + 2.0f;
    const float limit = static_cast<float>(output);
    return {
        place == 0 ? 0 : static_cast<int32_t>(fmaxf(begin, 0.0f)),
        place == input - 1 ? output : static_cast<int32_t>(fminf(end, limit))};
  }
};

// Labels [N, H, W].
struct Labels {
  const void* data;
  bool bytes;  // uint8, else int64

  MMACTNN_HOST_DEVICE int64_t at(int64_t index) const {
    return bytes ? static_cast<const uint8_t*>(data)[index]
                 : static_cast<const int64_t*>(data)[index];
  }
};

// Logits [N, C, h, w] of any strides, in elements.
struct LogitsLayout {
  int64_t images;
  int64_t classes;
  int64_t image_stride;
  int64_t class_stride;
  int64_t row_stride;
  int64_t column_stride;
};

struct ResizedLoss {
  LogitsLayout logits;
  ResizedAxis height;
  ResizedAxis width;
  Labels labels;
  const float* class_weight;  // [C]; null for ones
  int64_t ignore_index;

  MMACTNN_HOST_DEVICE int64_t pixels() const {
    return int64_t{height.output} * width.output;
  }

  // Weight of a pixel by its label; NaN if there is no such class.
  MMACTNN_HOST_DEVICE float weight_of(int64_t label) const {
    if (label == ignore_index) return 0.0f;
    if (label < 0 || label >= logits.classes) return NAN;
    return class_weight == nullptr ? 1.0f : class_weight[label];
  }
};

// Four logits of a class around a pixel.
struct Corners {
  float value[2][2];

  // Interpolated in the order of torch's operations.
  MMACTNN_HOST_DEVICE float blend(float row_weight, float column_weight) const {
    const float left = 1.0f - column_weight;
    const float top = left * value[0][0] + column_weight * value[0][1];
    const float bottom = left * value[1][0] + column_weight * value[1][1];
    return (1.0f - row_weight) * top + row_weight * bottom;
  }
};

// Their places in the plane of a class.
struct CornerOffsets {
  int64_t offset[2][2];

  static MMACTNN_HOST_DEVICE CornerOffsets of(const LogitsLayout& layout,
                                              const Tap& row,
                                              const Tap& column) {
    const int64_t top = row.low * layout.row_stride;
    const int64_t bottom = row.high * layout.row_stride;
    const int64_t left = column.low * layout.column_stride;
    const int64_t right = column.high * layout.column_stride;
    return {{{top + left, top + right}, {bottom + left, bottom + right}}};
  }

  template <typename T, typename Number>
  MMACTNN_HOST_DEVICE Corners load(const T* plane) const {
    return {
        {{Number::load(plane[offset[0][0]]), Number::load(plane[offset[0][1]])},
         {Number::load(plane[offset[1][0]]),
          Number::load(plane[offset[1][1]])}}};
  }
};

// A large logit as torch stores it, in the dtype of the small ones.
template <typename Number>
MMACTNN_HOST_DEVICE float stored(float value) {
  return Number::load(Number::store(value));
}

// Outputs of the forward pass at a pixel.
struct PixelLoss {
  float loss;
  float log_sum;  // logarithm of the sum of exponentials
  bool hit;       // whether the largest logit is that of the label
};

template <typename T, typename Number>
MMACTNN_HOST_DEVICE PixelLoss loss_at(const ResizedLoss& op, const T* image,
                                      int64_t label, int32_t row,
                                      int32_t column) {
  const Tap row_tap = op.height.tap(row);
  const Tap column_tap = op.width.tap(column);
  const CornerOffsets offsets =
      CornerOffsets::of(op.logits, row_tap, column_tap);
  float largest = -INFINITY, sum = 0.0f, own = 0.0f;
  int64_t winner = -1;
  for (int64_t c = 0; c < op.logits.classes; ++c) {
    const Corners corners =
        offsets.load<T, Number>(image + c * op.logits.class_stride);
    const float value =
        stored<Number>(corners.blend(row_tap.weight, column_tap.weight));
    if (c == label) own = value;
    // Of equal numbers the difference is 0, infinite ones included.
    const float power = value == largest ? 1.0f : expf(-fabsf(value - largest));
    if (value > largest) {
      sum = sum * power + 1.0f;
      largest = value;
      winner = c;
    } else {
      sum += power;
    }
  }
  const float log_sum = largest + logf(sum);
  const float weight = op.weight_of(label);
  return {label == op.ignore_index ? 0.0f : weight * (log_sum - own), log_sum,
          winner == label && label != op.ignore_index};
}

// Sum over a row of pixels of gradients of a class's logits, each times the
// weight that `column` of the small logits has there. `plane` is that of the
// class, `first` the index of the row's first pixel; `scale` is null for ones.
template <typename T, typename Number>
MMACTNN_HOST_DEVICE float row_gradient(const ResizedLoss& op, const T* plane,
                                       const float* log_sums,
                                       const float* scale, int64_t class_index,
                                       int64_t first, int32_t row,
                                       int32_t column) {
  const Tap row_tap = op.height.tap(row);
  const Readers range = op.width.readers(column);
  // Neighbours mostly have the same corners.
  Corners corners{};
  int32_t low = -1;
  float total = 0.0f;
  for (int32_t x = range.begin; x < range.end; ++x) {
    const Tap tap = op.width.tap(x);
    const float weight = tap.of(column);
    if (weight == 0.0f) continue;
    if (tap.low != low) {
      low = tap.low;
      corners =
          CornerOffsets::of(op.logits, row_tap, tap).load<T, Number>(plane);
    }
    const int64_t pixel = first + x;
    const int64_t label = op.labels.at(pixel);
    const float value =
        stored<Number>(corners.blend(row_tap.weight, tap.weight));
    float own = op.weight_of(label);
    if (scale != nullptr) own *= scale[pixel];
    const float target = label == class_index ? 1.0f : 0.0f;
    total += weight * (own * (expf(value - log_sums[pixel]) - target));
  }
  return total;
}

// Sum over rows of such sums, `rows` being those of a plane, [H, w].
MMACTNN_HOST_DEVICE float plane_gradient(const ResizedLoss& op,
                                         const float* rows, int32_t row,
                                         int32_t column) {
  const Readers range = op.height.readers(row);
  float total = 0.0f;
  for (int32_t y = range.begin; y < range.end; ++y) {
    const float weight = op.height.tap(y).of(row);
    if (weight == 0.0f) continue;
    total += weight * rows[int64_t{y} * op.width.input + column];
  }
  return total;
}

}  // namespace mmactnn
