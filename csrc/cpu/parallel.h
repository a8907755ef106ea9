// Loops over the threads of torch.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace mmactnn {

// Calls `body(begin, end)` for ranges of at least `grain` from 0 to `end`.
template <typename Body>
void parallel_for(int64_t end, int64_t grain, const Body& body) {
  const auto call = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const Body*>(context))(first, last);
  };
  const bool failed =
      torch_parallel_for(0, end, grain, call, const_cast<Body*>(&body)) != 0;
  STD_TORCH_CHECK(!failed, "a loop over the threads of torch failed");
}

}  // namespace mmactnn
