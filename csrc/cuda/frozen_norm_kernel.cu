#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/frozen_norm.h"
#include "../common/tensor_checks.h"
#include "blocks.h"
#include "channel_index.h"
#include "launch.h"

namespace mmactnn {
namespace {

// Of every multiprocessor: few, because each makes the constants of all
// channels; they are in shared memory.
constexpr int kFrozenBlocks = 8;
constexpr int64_t kMaxChannels = 4096;

template <typename T>
struct FrozenNorm {
  T* values;
  const T* residual;
  const float* mean;
  const float* var;
  const float* weight;
  const float* bias;
  float eps;
  bool relu;
  ChannelIndex channels;
  uint32_t rows;
  uint32_t row_numel;
  bool vectorized;
};

// What is known of the blocks of a tensor.
enum class FrozenShape {
  kPlanes,   // whole ones, each of one channel
  kColumns,  // whole ones, and a thread's are of the same channels
  kAny,
};

template <typename T, FrozenShape kShape, bool kFull>
__device__ __forceinline__ void run_block(const FrozenNorm<T>& op,
                                          const FrozenChannel* constants,
                                          const FrozenChannel* own,
                                          int64_t base, uint32_t start,
                                          int count) {
  T values[kBlock];
  T residual[kBlock];
  load_block<T, kFull>(op.values + base, count, values);
  if (op.residual != nullptr) {
    load_block<T, kFull>(op.residual + base, count, residual);
  }
  ChannelIndex::Place place{};
  FrozenChannel constant{};
  if constexpr (kShape != FrozenShape::kColumns) {
    place = op.channels.of(start);
    constant = constants[place.channel];
  }
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    if constexpr (kShape == FrozenShape::kColumns) constant = own[i];
    float value = constant.apply(Number<T>::load(values[i]));
    if (op.residual != nullptr) {
      value = add(value, Number<T>::load(residual[i]));
    }
    values[i] = Number<T>::store(op.relu ? rectify(value) : value);
    if constexpr (kShape == FrozenShape::kAny) {
      place = op.channels.next(place);
      constant = constants[place.channel];
    }
  }
  store_block<T, kFull>(op.values + base, count, values);
}

template <typename T, FrozenShape kShape>
__global__ void __launch_bounds__(kThreads)
    frozen_norm_kernel(const FrozenNorm<T> op) {
  extern __shared__ FrozenChannel constants[];
  for (uint32_t c = threadIdx.x; c < op.channels.channels; c += kThreads) {
    constants[c] = FrozenChannel::of(op.mean[c], op.var[c], op.eps,
                                     load_channel(op.weight, c, kNoWeight),
                                     load_channel(op.bias, c, kNoBias));
  }
  __syncthreads();
  const uint32_t begin = (blockIdx.x * kThreads + threadIdx.x) * kBlock;
  FrozenChannel own[kBlock];
  if constexpr (kShape == FrozenShape::kColumns) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      own[i] = constants[begin % op.channels.channels + i];
    }
  }
  const uint32_t step = gridDim.x * kThreads * kBlock;
  for (uint32_t row = blockIdx.y; row < op.rows; row += gridDim.y) {
    const int64_t first = static_cast<int64_t>(row) * op.row_numel;
    for (uint32_t start = begin; start < op.row_numel; start += step) {
      const uint32_t left = op.row_numel - start;
      if (kShape != FrozenShape::kAny || (op.vectorized && left >= kBlock)) {
        run_block<T, kShape, true>(op, constants, own, first + start, start,
                                   kBlock);
      } else {
        run_block<T, kShape, false>(
            op, constants, own, first + start, start,
            static_cast<int>(min(left, uint32_t{kBlock})));
      }
    }
  }
}

template <typename T>
FrozenShape shape_of(const FrozenNorm<T>& op, const Channels& channels) {
  if (!op.vectorized) return FrozenShape::kAny;
  if (!channels.last) {
    return channels.plane % kBlock == 0 ? FrozenShape::kPlanes
                                        : FrozenShape::kAny;
  }
  // A thread goes on by a multiple of this.
  constexpr int64_t kStep = int64_t{kThreads} * kBlock;
  return channels.count % kBlock == 0 && kStep % channels.count == 0
             ? FrozenShape::kColumns
             : FrozenShape::kAny;
}

template <typename T>
void launch(const FrozenNorm<T>& op, FrozenShape shape, int device,
            cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(
      &processors, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(error == cudaSuccess, "mmactnn: ", cudaGetErrorString(error));
  const int64_t wanted = int64_t{processors} * kFrozenBlocks;
  constexpr int64_t kPerThreads = int64_t{kThreads} * kBlock;
  const int64_t across =
      std::min((op.row_numel + kPerThreads - 1) / kPerThreads, wanted);
  const int64_t along = std::min<int64_t>(
      {op.rows, (wanted + across - 1) / across, int64_t{65535}});
  const dim3 grid(static_cast<unsigned int>(across),
                  static_cast<unsigned int>(along));
  const size_t bytes = op.channels.channels * sizeof(FrozenChannel);
  switch (shape) {
    case FrozenShape::kPlanes:
      frozen_norm_kernel<T, FrozenShape::kPlanes>
          <<<grid, kThreads, bytes, stream>>>(op);
      break;
    case FrozenShape::kColumns:
      frozen_norm_kernel<T, FrozenShape::kColumns>
          <<<grid, kThreads, bytes, stream>>>(op);
      break;
    case FrozenShape::kAny:
      frozen_norm_kernel<T, FrozenShape::kAny>
          <<<grid, kThreads, bytes, stream>>>(op);
  }
  check_launch();
}

void frozen_norm_act_(Tensor input, std::optional<Tensor> residual, Tensor mean,
                      Tensor var, std::optional<Tensor> weight,
                      std::optional<Tensor> bias, double eps, bool relu) {
  const Channels channels =
      check_frozen_norm(input, residual, mean, var, weight, bias);
  if (channels.numel() == 0) return;
  STD_TORCH_CHECK(channels.count <= kMaxChannels, "there may be at most ",
                  kMaxChannels, " channels, got ", channels.count);
  STD_TORCH_CHECK(channels.rows <= kMaxIndex, "there may be at most ",
                  kMaxIndex, " samples, got ", channels.rows);
  const int device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* values = static_cast<T*>(input.mutable_data_ptr());
    const T* others = static_cast<const T*>(data_or_null(residual));
    const bool vectorized = is_aligned(values, 16) &&
                            channels.row_numel() % kBlock == 0 &&
                            (others == nullptr || is_aligned(others, 16));
    const FrozenNorm<T> op{values,
                           others,
                           static_cast<const float*>(mean.const_data_ptr()),
                           static_cast<const float*>(var.const_data_ptr()),
                           static_cast<const float*>(data_or_null(weight)),
                           static_cast<const float*>(data_or_null(bias)),
                           static_cast<float>(eps),
                           relu,
                           index_channels(channels, {}),
                           static_cast<uint32_t>(channels.rows),
                           static_cast<uint32_t>(channels.row_numel()),
                           vectorized};
    launch(op, shape_of(op, channels), device, current_stream(device));
  });
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("frozen_norm_act_", TORCH_BOX(&mmactnn::frozen_norm_act_));
}
