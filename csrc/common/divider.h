// Division by a number that stays the same.
#pragma once

#include <cstdint>

#include "portability.h"

namespace mmactnn {

// Quotients of 32-bit numbers by a multiplication (Granlund and Montgomery,
// "Division by invariant integers using multiplication", PLDI 1994).
struct Divider {
  uint32_t divisor;
  uint32_t magic;
  uint32_t shift;

  explicit Divider(uint32_t d) : divisor(d), magic(0), shift(0) {
    while (shift < 32 && (uint64_t{1} << shift) < d) ++shift;
    magic = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }

  MMACTNN_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    // n < 2^31, so that the sum cannot overflow.
#ifdef __CUDA_ARCH__
    return (__umulhi(n, magic) + n) >> shift;
#else
    return n / divisor;
#endif
  }
};

}  // namespace mmactnn
