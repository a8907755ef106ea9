#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "../common/allocate.h"
#include "../common/codec.h"
#include "../common/geometry.h"
#include "../common/tensor_checks.h"
#include "block.h"
#include "group.h"
#include "launch.h"

namespace mmactnn {
namespace {

template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads)
    group_spread_kernel(const T* __restrict__ input, float* __restrict__ spread,
                        Launch launch) {
  constexpr int kLanes = kLanesPerGroup<kGroup>;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = thread / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool active = index < launch.groups;
  const Group group = locate<kGroup>(launch, active ? index : 0);
  Share<T> share;
  load_group<kGroup>(input + group.row * launch.row_numel + group.start,
                     group.count, lane, launch.vectorized, share);
  const Extent extent = find_extent<kGroup>(share);
  if (active && lane == 0) spread[index] = group_spread(extent, group.count);
}

// A thread block sums a row.
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const float* __restrict__ groups, float* __restrict__ sums,
                    int64_t rows, int64_t groups_per_row) {
  constexpr int kAtOnce = 8;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* source = groups + row * groups_per_row;
    double sum = 0.0;
    for (int64_t g = threadIdx.x; g < groups_per_row; g += kThreads * kAtOnce) {
      float own[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t place = g + u * kThreads;
        own[u] = place < groups_per_row ? source[place] : 0.0f;
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) sum += own[u];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
      sums[row] = static_cast<float>(fmin(sum, static_cast<double>(FLT_MAX)));
    }
  }
}

Tensor row_spread(Tensor input, int64_t group_size) {
  const Geometry geometry = input_geometry(input, group_size);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor sums = empty(input, {geometry.rows}, ScalarType::Float);
  if (geometry.rows == 0) return sums;
  Tensor groups = empty(input, {geometry.groups()}, ScalarType::Float);
  const cudaStream_t stream = current_stream(input.get_device_index());
  auto* spread = static_cast<float*>(groups.mutable_data_ptr());
  if (input.numel() != 0) {
    dispatch_dtype(input.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const T* source = static_cast<const T*>(input.const_data_ptr());
      dispatch_group_size(geometry.group_size, [&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        for_each_launch(
            geometry, source, [&](const Launch& launch, int64_t row) {
              group_spread_kernel<T, kGroup>
                  <<<grid_size(launch.groups, kLanesPerGroup<kGroup>), kThreads,
                     0, stream>>>(source + row * geometry.row_numel,
                                  spread + row * geometry.groups_per_row(),
                                  launch);
              check_launch();
            });
      });
    });
  }
  sum_rows_kernel<<<static_cast<unsigned int>(
                        std::min(geometry.rows, kMaxIndex)),
                    kThreads, 0, stream>>>(
      spread, static_cast<float*>(sums.mutable_data_ptr()), geometry.rows,
      geometry.groups_per_row());
  check_launch();
  return sums;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("row_spread", TORCH_BOX(&mmactnn::row_spread));
}
