#include <cstdint>

#include "../common/geometry.h"
#include "allocate.h"
#include "registration.h"

namespace mmactnn {

// Input and energies of its rows, of which there is at least one.
MMACTNN_KERNEL(sample_range_energy, const Memory&, const Memory&,
               const Geometry&);

namespace {

Tensor sample_range_energy(Tensor input, int64_t group_size) {
  const Geometry geometry = input_geometry(input, group_size);
  const Tensor energies = empty(input, {geometry.rows}, ScalarType::Float);
  if (geometry.rows != 0) {
    OnDevice(input).run(sample_range_energy_kernel, input, energies, geometry);
  }
  return energies;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def("sample_range_energy(Tensor input, int group_size) -> Tensor");
}

MMACTNN_IMPL(m) {
  m.impl("sample_range_energy", TORCH_BOX(&mmactnn::sample_range_energy));
}
