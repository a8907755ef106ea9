#include <cstdint>
#include <tuple>

#include "allocate.h"
#include "registration.h"
#include "row_checks.h"

namespace mmactnn {

// Sensitivity of at least one row, bits and starts of the rows; all bits.
MMACTNN_KERNEL(allocate_sample_bits, const Memory&, const Memory&,
               const Memory&, int64_t);

namespace {

std::tuple<Tensor, Tensor> allocate_sample_bits(Tensor sensitivity,
                                                int64_t total_bits) {
  STD_TORCH_CHECK(sensitivity.scalar_type() == ScalarType::Float &&
                      sensitivity.dim() == 1 && sensitivity.is_contiguous(),
                  "sensitivity must be a contiguous float32 tensor of one "
                  "dimension");
  const int64_t rows = sensitivity.size(0);
  check_total_bits(total_bits, rows);
  const Tensor row_bits = empty(sensitivity, {rows}, ScalarType::Byte);
  const Tensor row_starts = empty(sensitivity, {rows}, ScalarType::Int);
  if (rows != 0) {
    OnDevice(sensitivity)
        .run(allocate_sample_bits_kernel, sensitivity, row_bits, row_starts,
             total_bits);
  }
  return {row_bits, row_starts};
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "allocate_sample_bits(Tensor sensitivity, int total_bits) "
      "-> (Tensor row_bits, Tensor row_starts)");
}

MMACTNN_IMPL(m) {
  m.impl("allocate_sample_bits", TORCH_BOX(&mmactnn::allocate_sample_bits));
}
