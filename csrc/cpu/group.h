// Access of CPU kernels to a tensor, group by group.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "../common/codec.h"
#include "../common/geometry.h"

namespace mmactnn {

constexpr int64_t kMaxGroup = 512;
constexpr int64_t kGrainElements = 32768;

struct Group {
  int64_t row;
  int64_t start;  // its first element within the row
  int64_t count;  // its elements: group_size, or fewer at the end of a row
};

inline Group locate(const Geometry& geometry, int64_t index) {
  const int64_t groups_per_row = geometry.groups_per_row();
  const int64_t start = (index % groups_per_row) * geometry.group_size;
  return {index / groups_per_row, start,
          std::min(geometry.group_size, geometry.row_numel - start)};
}

template <typename T>
void load_group(const T* input, const Geometry& geometry, const Group& group,
                float* values) {
  const T* source = input + group.row * geometry.row_numel + group.start;
  for (int64_t i = 0; i < group.count; ++i) {
    values[i] = static_cast<float>(source[i]);
  }
}

inline Extent find_extent(const float* values, int64_t count) {
  float low = FLT_MAX, high = -FLT_MAX, poison = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
    poison += values[i] * 0.0f;  // NaN as soon as one value is not finite
  }
  const bool all_finite = !is_nan(poison);
  if (!all_finite) {
    low = FLT_MAX;
    high = -FLT_MAX;
    for (int64_t i = 0; i < count; ++i) {
      if (is_finite(values[i])) {
        low = std::min(low, values[i]);
        high = std::max(high, values[i]);
      }
    }
  }
  return {low, high, all_finite};
}

}  // namespace mmactnn
