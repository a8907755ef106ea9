
#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "group.h"
#include "number.h"
#include "parallel.h"

namespace mmactnn {
namespace {

template <typename T>
float row_range_energy(const T* input, const Geometry& geometry, int64_t row) {
  const int64_t groups_per_row = geometry.groups_per_row();
  float values[kMaxGroup];
  double sum = 0.0;
  for (int64_t g = 0; g < groups_per_row; ++g) {
    const Group group = locate(geometry, row * groups_per_row + g);
    load_group(input, geometry, group, values);
    sum += group_range_energy(find_extent(values, group.count), group.count);
  }
  return static_cast<float>(std::min<double>(sum, FLT_MAX));
}

}  // namespace

namespace cpu {

void sample_range_energy(const Memory& input, const Memory& energies,
                         const Geometry& geometry) {
  auto* target = static_cast<float*>(energies.mutable_data_ptr());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    const int64_t row_numel = std::max<int64_t>(geometry.row_numel, 1);
    parallel_for(geometry.rows,
                 std::max<int64_t>(kGrainElements / row_numel, 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = begin; row < end; ++row) {
                     target[row] = row_range_energy(source, geometry, row);
                   }
                 });
  });
}

}  // namespace cpu
}  // namespace mmactnn
