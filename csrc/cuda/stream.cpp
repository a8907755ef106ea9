#include "stream.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace mmactnn {
namespace {

using StreamGetter = int32_t (*)(int32_t, void**);

// The symbol lives in libtorch_cuda.so. Linking to it would keep the same
// binary from loading where torch has no CUDA, so it is looked up in the
// library that torch has already loaded.
StreamGetter find_stream_getter() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  STD_TORCH_CHECK(library != nullptr,
                  "mmactnn: libtorch_cuda.so is not loaded: this torch was "
                  "built without CUDA");
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(symbol != nullptr,
                  "mmactnn: libtorch_cuda.so has no "
                  "aoti_torch_get_current_cuda_stream; torch >= 2.10 has it");
  return reinterpret_cast<StreamGetter>(symbol);
}

}  // namespace

int32_t current_device() {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  STD_TORCH_CHECK(error == cudaSuccess, "mmactnn: ", cudaGetErrorString(error));
  return device;
}

cudaStream_t current_stream() {
  static const StreamGetter getter = find_stream_getter();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(current_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace mmactnn
