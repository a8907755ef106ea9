#include <algorithm>
#include <cstdint>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/frozen_norm.h"
#include "blocks.h"
#include "channel_index.h"
#include "launch.h"

namespace mmactnn {
namespace {

// Limit up to which constants fit into shared memory.
constexpr int64_t kMaxChannels = 4096;

// Elements that the threads of a thread block take side by side.
constexpr int64_t kAcross = int64_t{kThreads} * kBlock;

template <typename T>
struct FrozenNorm {
  T* values;
  const T* residual;
  FrozenParameters parameters;
  bool relu;
  ChannelIndex channels;
  int64_t rows;
  int64_t row_numel;
  bool vectorized;

  // `constant(i)` is that of element `i` of the block.
  template <bool kFull, typename Constant>
  __device__ __forceinline__ void run(int64_t base, int count,
                                      const Constant& constant) const {
    T block[kBlock];
    T added[kBlock];
    load_block<T, kFull>(values + base, count, block);
    if (residual != nullptr) {
      load_block<T, kFull>(residual + base, count, added);
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      float value = constant(i).apply(Number<T>::load(block[i]));
      if (residual != nullptr) {
        value = add(value, Number<T>::load(added[i]));
      }
      block[i] = Number<T>::store(relu ? rectify(value) : value);
    }
    store_block<T, kFull>(values + base, count, block);
  }
};

// Iteration of threads over a tensor of whole blocks: adjacent threads cover
// `width` elements, each blockIdx.y the next `width`, and all advance by
// `stride` until `end`. All blocks of a thread have the same channels.
struct FrozenWalk {
  int64_t width;
  int64_t stride;
  int64_t end;
};

// kChannels: kBlock, or 1 where a block is of one channel.
template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads)
    frozen_walk_kernel(const FrozenNorm<T> op, const FrozenWalk walk) {
  const int64_t start = blockIdx.x * kAcross + threadIdx.x * kBlock;
  if (start >= walk.width) return;
  FrozenChannel own[kChannels];
  if constexpr (kChannels == kBlock) {
    // kAcross is a multiple of the channels.
    const uint32_t first = op.channels.of(threadIdx.x * kBlock).channel;
    const ChannelWords<> mean(op.parameters.mean + first);
    const ChannelWords<> var(op.parameters.var + first);
    const ChannelWords<> weight(op.parameters.weight + first);
    const ChannelWords<> bias(op.parameters.bias + first);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      own[i] = FrozenChannel::of(mean.item[i], var.item[i], op.parameters.eps,
                                 weight.item[i], bias.item[i]);
    }
  } else {
    own[0] = op.parameters.channel(
        op.channels.of(static_cast<uint32_t>(start)).channel);
  }
  for (int64_t base = blockIdx.y * walk.width + start; base < walk.end;
       base += walk.stride) {
    op.template run<true>(base, kBlock,
                          [&](int i) { return own[i % kChannels]; });
  }
}

// Any tensor. A thread block makes the constants of all channels first.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    frozen_norm_kernel(const FrozenNorm<T> op) {
  extern __shared__ FrozenChannel constants[];
  for (uint32_t c = threadIdx.x; c < op.channels.channels; c += kThreads) {
    constants[c] = op.parameters.channel(c);
  }
  __syncthreads();
  for (int64_t row = blockIdx.y; row < op.rows; row += gridDim.y) {
    for (int64_t start = blockIdx.x * kAcross + threadIdx.x * kBlock;
         start < op.row_numel; start += gridDim.x * kAcross) {
      ChannelIndex::Place place = op.channels.of(static_cast<uint32_t>(start));
      const auto constant = [&](int) {
        const FrozenChannel own = constants[place.channel];
        place = op.channels.next(place);
        return own;
      };
      const int64_t base = row * op.row_numel + start;
      const int64_t left = op.row_numel - start;
      if (op.vectorized && left >= kBlock) {
        op.template run<true>(base, kBlock, constant);
      } else {
        op.template run<false>(
            base, left < kBlock ? static_cast<int>(left) : kBlock, constant);
      }
    }
  }
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many thread blocks as there are `steps` for a thread block that takes
// kSteps, but so many of them that all multiprocessors are busy.
int64_t count_blocks(int64_t steps, int64_t across) {
  // Few enough for the constants to cost little, and for the last thread
  // blocks not to run alone.
  constexpr int64_t kSteps = 8;
  constexpr int64_t kBlocks = 16;  // for each multiprocessor
  const int64_t busy = ceil_divide(kBlocks * processor_count(), across);
  return std::min(std::max(ceil_divide(steps, kSteps), busy), steps);
}

template <typename T>
void launch(const FrozenNorm<T>& op, const Channels& channels,
            cudaStream_t stream) {
  const int64_t across = ceil_divide(op.row_numel, kAcross);
  const int64_t numel = op.rows * op.row_numel;
  const auto grid = [](int64_t x, int64_t y) {
    return dim3(static_cast<unsigned int>(x),
                static_cast<unsigned int>(std::min<int64_t>(y, 65535)));
  };
  if (op.vectorized && !channels.last && channels.plane % kBlock == 0) {
    const dim3 blocks = grid(across, count_blocks(op.rows, across));
    frozen_walk_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(
        op, {op.row_numel, blocks.y * op.row_numel, numel});
  } else if (op.vectorized && op.channels.vectorized &&
             kAcross % channels.count == 0) {
    // Rows do not matter: all begin with the same channel.
    const dim3 blocks = grid(count_blocks(ceil_divide(numel, kAcross), 1), 1);
    frozen_walk_kernel<T, kBlock><<<blocks, kThreads, 0, stream>>>(
        op, {numel, blocks.x * kAcross, numel});
  } else {
    const dim3 blocks = grid(across, count_blocks(op.rows, across));
    frozen_norm_kernel<T>
        <<<blocks, kThreads, channels.count * sizeof(FrozenChannel), stream>>>(
            op);
  }
  check_launch();
}

}  // namespace

namespace cuda {

void frozen_norm_act(const Memory& input, const Channels& channels,
                     const Memory& residual, const FrozenParameters& parameters,
                     bool relu) {
  STD_TORCH_CHECK(channels.count <= kMaxChannels, "there may be at most ",
                  kMaxChannels, " channels, got ", channels.count);
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* values = static_cast<T*>(input.mutable_data_ptr());
    const T* others = static_cast<const T*>(residual.const_data_ptr());
    const bool vectorized = is_aligned(values, 16) &&
                            channels.row_numel() % kBlock == 0 &&
                            (others == nullptr || is_aligned(others, 16));
    const FrozenNorm<T> op{
        values,
        others,
        parameters,
        relu,
        index_channels(channels, {parameters.mean, parameters.var,
                                  parameters.weight, parameters.bias}),
        channels.rows,
        channels.row_numel(),
        vectorized};
    launch(op, channels, current_stream());
  });
}

}  // namespace cuda
}  // namespace mmactnn
