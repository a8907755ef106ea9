// Common parts of launchers: the current stream, launch limits and the dtypes
// as C++ types of the device. The device of the tensors is the current one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cfloat>
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/portability.h"
#include "stream.h"

namespace mmactnn {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
// Grid dimension x and 32-bit indices inside of a launch both end here;
// launchers cut larger tensors into several launches.
constexpr int64_t kMaxIndex = INT64_C(0x7FFFFFFF);

// After every launch. torch's own check would need a symbol of
// libtorch_cuda.so, see current_stream().
inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess,
                  "mmactnn: a CUDA kernel failed to "
                  "launch: ",
                  cudaGetErrorString(error));
}

// Multiprocessors of the device.
inline int processor_count() {
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(
      &processors, cudaDevAttrMultiProcessorCount, current_device());
  STD_TORCH_CHECK(error == cudaSuccess, "mmactnn: ", cudaGetErrorString(error));
  return processors;
}

template <typename T>
struct Number;

template <>
struct Number<float> {
  static constexpr float kLargest = FLT_MAX;
  static MMACTNN_HOST_DEVICE float load(float x) { return x; }
  static MMACTNN_HOST_DEVICE float store(float x) { return x; }
};

template <>
struct Number<__half> {
  static constexpr float kLargest = 65504.0f;
  static MMACTNN_HOST_DEVICE float load(__half x) { return __half2float(x); }
  static MMACTNN_HOST_DEVICE __half store(float x) {
    return __float2half_rn(x);
  }
};

template <>
struct Number<__nv_bfloat16> {
  static constexpr float kLargest = 0x1.FEp127f;
  static MMACTNN_HOST_DEVICE float load(__nv_bfloat16 x) {
    return __bfloat162float(x);
  }
  static MMACTNN_HOST_DEVICE __nv_bfloat16 store(float x) {
    return __float2bfloat16_rn(x);
  }
};

// `kCount` numbers that move as one word of at most 16 bytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T item[kCount];
};

template <typename Body>
void dispatch_dtype(Dtype dtype, const Body& body) {
  dispatch_types<float, __half, __nv_bfloat16>(dtype, body);
}

MMACTNN_HOST_DEVICE bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace mmactnn
