// Elementwise kernels that go by blocks of 8 elements in memory order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/codec.h"
#include "parallel.h"

namespace mmactnn {

constexpr int64_t kGrainBlocks = 4096;

// Calls `body(block, source, target, count)` with the up to 8 elements of
// every block. `target` may be `source`.
template <typename T, typename Body>
void for_each_block(const T* source, T* target, int64_t numel,
                    const Body& body) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  parallel_for(blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block * kBlock;
      const int64_t count = std::min<int64_t>(kBlock, numel - start);
      body(block, source + start, target + start, count);
    }
  });
}

}  // namespace mmactnn
