#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "../common/codec.h"
#include "../common/geometry.h"
#include "block.h"
#include "group.h"
#include "launch.h"
#include "workspace.h"

namespace mmactnn {
namespace {

template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads)
    group_range_energy_kernel(const T* __restrict__ input,
                              float* __restrict__ energies, Launch launch) {
  const GroupSize<kGroup> size(launch);
  const int lanes = size.template lanes<kSharedItems>();
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t index = size.template group_of<kSharedItems>(thread);
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const bool active = index < launch.groups;
  const Group group = locate(launch, active ? index : 0, size.elements());
  Share<T> share;
  load_group(input + group.row * launch.row_numel + group.start, group.count,
             lane, lanes, launch.vectorized, share);
  const Extent extent = find_extent(share, lanes);
  if (active && lane == 0)
    energies[index] = group_range_energy(extent, group.count);
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

}  // namespace

namespace cuda {

void sample_range_energy(const Memory& input, const Memory& sums,
                         const Geometry& geometry) {
  const Workspace groups(geometry.groups());
  const cudaStream_t stream = current_stream();
  float* energies = groups.data();
  if (input.numel() != 0) {
    dispatch_dtype(input.dtype(), [&](auto type) {
      using T = typename decltype(type)::type;
      const T* source = static_cast<const T*>(input.const_data_ptr());
      dispatch_group_size(geometry.group_size, [&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        for_each_launch(
            geometry, source, [&](const Launch& launch, int64_t row) {
              group_range_energy_kernel<T, kGroup>
                  <<<grid_size<kSharedItems>(launch), kThreads, 0, stream>>>(
                      source + row * geometry.row_numel,
                      energies + row * geometry.groups_per_row(), launch);
              check_launch();
            });
      });
    });
  }
  sum_rows_kernel<<<static_cast<unsigned int>(
                        std::min(geometry.rows, kMaxIndex)),
                    kThreads, 0, stream>>>(
      energies, static_cast<float*>(sums.mutable_data_ptr()), geometry.rows,
      geometry.groups_per_row());
  check_launch();
}

}  // namespace cuda
}  // namespace mmactnn
