// Registration of an op for both devices, and choice of its kernel.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>

#include "../common/memory.h"
#include "tensor_checks.h"

// setup.py defines the version in builds with kernels for the GPU.
#ifdef MMACTNN_CUDA_VERSION
#define MMACTNN_WITH_CUDA(...) __VA_ARGS__
#else
#define MMACTNN_WITH_CUDA(...)
#endif

namespace mmactnn {

// Kernels of an op for each device, with arguments of these types.
template <typename... Arguments>
struct Kernel {
  using Launcher = void(Arguments...);

  Launcher* cpu;
  Launcher* cuda;  // null in a build without kernels for the GPU
};

// Makes the device of a tensor the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : on_gpu_(!tensor.is_cpu()) {
    if (on_gpu_) guard_.emplace(tensor.get_device_index());
  }

  template <typename... Types, typename... Arguments>
  void run(const Kernel<Types...>& kernel, Arguments&&... arguments) const {
    (on_gpu_ ? kernel.cuda : kernel.cpu)(std::forward<Arguments>(arguments)...);
  }

 private:
  bool on_gpu_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace mmactnn

// Declares cpu::name and cuda::name, which cpu/ and cuda/ define, and the
// Kernel name_kernel of both. Types of arguments follow the name.
#define MMACTNN_KERNEL(name, ...)                               \
  namespace cpu {                                               \
  void name(__VA_ARGS__);                                       \
  }                                                             \
  MMACTNN_WITH_CUDA(namespace cuda { void name(__VA_ARGS__); }) \
  inline constexpr Kernel<__VA_ARGS__> name##_kernel {          \
    &cpu::name, MMACTNN_WITH_CUDA(&cuda::name)                  \
  }

// Begins a body of `m.impl(...)`, which runs for every device with kernels.
#define MMACTNN_IMPL(m) MMACTNN_IMPL_NUMBERED(m, __COUNTER__)
#define MMACTNN_IMPL_NUMBERED(m, number) MMACTNN_IMPL_NAMED(m, number)
#define MMACTNN_IMPL_NAMED(m, number)                                   \
  static void mmactnn_implement##number(                                \
      torch::stable::detail::StableLibrary&);                           \
  STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, library) {                    \
    mmactnn_implement##number(library);                                 \
  }                                                                     \
  MMACTNN_WITH_CUDA(STABLE_TORCH_LIBRARY_IMPL(mmactnn, CUDA, library) { \
    mmactnn_implement##number(library);                                 \
  })                                                                    \
  static void mmactnn_implement##number(torch::stable::detail::StableLibrary& m)
