#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../common/allocate.h"
#include "../common/codec.h"
#include "../common/tensor_checks.h"
#include "launch.h"

namespace mmactnn {
namespace {

// Reads or writes the up to 8 elements of a block.
template <typename T, bool kFull>
__device__ __forceinline__ void load_block(const T* source, int count,
                                           T* values) {
  constexpr int kPerWord = 16 / sizeof(T);
  if constexpr (kFull) {
#pragma unroll
    for (int w = 0; w < kBlock / kPerWord; ++w) {
      const auto word = reinterpret_cast<const Vector<T, kPerWord>*>(source)[w];
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        values[w * kPerWord + i] = word.item[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (i < count) values[i] = source[i];
    }
  }
}

template <typename T, bool kFull>
__device__ __forceinline__ void store_block(T* target, int count,
                                            const T* values) {
  constexpr int kPerWord = 16 / sizeof(T);
  if constexpr (kFull) {
#pragma unroll
    for (int w = 0; w < kBlock / kPerWord; ++w) {
      Vector<T, kPerWord> word;
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        word.item[i] = values[w * kPerWord + i];
      }
      reinterpret_cast<Vector<T, kPerWord>*>(target)[w] = word;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (i < count) target[i] = values[i];
    }
  }
}

// `output` may be `input`: no pointer is __restrict__. As in torch, NaN
// passes in both directions.
template <typename T, bool kFull>
__device__ __forceinline__ void forward_block(const T* input, T* output,
                                              uint8_t* mask, int count) {
  T values[kBlock];
  load_block<T, kFull>(input, count, values);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    if (kFull || i < count) {
      const bool keep = !(Number<T>::load(values[i]) <= 0.0f);
      bits |= static_cast<uint32_t>(keep) << i;
      if (!keep) values[i] = Number<T>::store(0.0f);
    }
  }
  store_block<T, kFull>(output, count, values);
  *mask = static_cast<uint8_t>(bits);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* input, T* output, uint8_t* mask, int64_t numel,
                   bool vectorized) {
  const int64_t block =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t start = block * kBlock;
  if (start >= numel) return;
  const int64_t left = numel - start;
  if (vectorized && left >= kBlock) {
    forward_block<T, true>(input + start, output + start, mask + block, kBlock);
  } else {
    forward_block<T, false>(input + start, output + start, mask + block,
                            left < kBlock ? static_cast<int>(left) : kBlock);
  }
}

template <typename T, bool kFull>
__device__ __forceinline__ void backward_block(const T* grad_output,
                                               uint32_t mask, T* grad_input,
                                               int count) {
  T values[kBlock];
  load_block<T, kFull>(grad_output, count, values);
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    if (!((mask >> i) & 1u)) values[i] = Number<T>::store(0.0f);
  }
  store_block<T, kFull>(grad_input, count, values);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* __restrict__ grad_output,
                    const uint8_t* __restrict__ mask,
                    T* __restrict__ grad_input, int64_t numel,
                    bool vectorized) {
  const int64_t block =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t start = block * kBlock;
  if (start >= numel) return;
  const int64_t left = numel - start;
  if (vectorized && left >= kBlock) {
    backward_block<T, true>(grad_output + start, mask[block],
                            grad_input + start, kBlock);
  } else {
    backward_block<T, false>(grad_output + start, mask[block],
                             grad_input + start,
                             left < kBlock ? static_cast<int>(left) : kBlock);
  }
}

// The number of thread blocks for a tensor of `blocks` blocks of elements.
unsigned int grid_size(int64_t blocks) {
  const int64_t grid = (blocks + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(grid <= kMaxIndex, "a tensor may have at most ",
                  kMaxIndex * kThreads * kBlock, " elements");
  return static_cast<unsigned int>(grid);
}

Tensor forward(const Tensor& input, Tensor& output) {
  check_dtype("input", input);
  check_dense("input", input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor mask = empty_mask(input);
  if (input.numel() == 0) return mask;
  const cudaStream_t stream = current_stream(input.get_device_index());
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    forward_kernel<T><<<grid_size(mask.numel()), kThreads, 0, stream>>>(
        source, target, static_cast<uint8_t*>(mask.mutable_data_ptr()),
        input.numel(), is_aligned(source, 16) && is_aligned(target, 16));
    check_launch();
  });
  return mask;
}

std::tuple<Tensor, Tensor> relu_mask(Tensor input) {
  Tensor output = torch::stable::empty_like(input);
  Tensor mask = forward(input, output);
  return {output, mask};
}

Tensor relu_mask_(Tensor input) { return forward(input, input); }

Tensor relu_mask_backward(Tensor grad_output, Tensor mask) {
  check_dtype("grad_output", grad_output);
  check_dense("grad_output", grad_output);
  check_mask(mask, grad_output.numel());
  const torch::stable::accelerator::DeviceGuard guard(
      grad_output.get_device_index());
  Tensor grad_input = torch::stable::empty_like(grad_output);
  if (grad_output.numel() == 0) return grad_input;
  const cudaStream_t stream = current_stream(grad_output.get_device_index());
  dispatch_dtype(grad_output.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    backward_kernel<T><<<grid_size(mask.numel()), kThreads, 0, stream>>>(
        source, static_cast<const uint8_t*>(mask.const_data_ptr()), target,
        grad_output.numel(), is_aligned(source, 16) && is_aligned(target, 16));
    check_launch();
  });
  return grad_input;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, m) {
  m.impl("relu_mask", TORCH_BOX(&mmactnn::relu_mask));
  m.impl("relu_mask_", TORCH_BOX(&mmactnn::relu_mask_));
  m.impl("relu_mask_backward", TORCH_BOX(&mmactnn::relu_mask_backward));
}
