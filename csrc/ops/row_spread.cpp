#include <cstdint>

#include "../common/geometry.h"
#include "allocate.h"
#include "registration.h"

namespace mmactnn {

// Input and spread of its rows, of which there is at least one.
MMACTNN_KERNEL(row_spread, const Memory&, const Memory&, const Geometry&);

namespace {

Tensor row_spread(Tensor input, int64_t group_size) {
  const Geometry geometry = input_geometry(input, group_size);
  const Tensor spread = empty(input, {geometry.rows}, ScalarType::Float);
  if (geometry.rows != 0) {
    OnDevice(input).run(row_spread_kernel, input, spread, geometry);
  }
  return spread;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def("row_spread(Tensor input, int group_size) -> Tensor");
}

MMACTNN_IMPL(m) { m.impl("row_spread", TORCH_BOX(&mmactnn::row_spread)); }
