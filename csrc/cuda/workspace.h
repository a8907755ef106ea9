// Memory that a launcher needs between its kernels.
#pragma once

#include <cstdint>
#include <memory>

namespace mmactnn {

// Numbers on the current device, from torch's allocator: kernels that have been
// launched on the current stream may still use them when they are gone.
class Workspace {
 public:
  explicit Workspace(int64_t count);
  ~Workspace();

  float* data() const { return data_; }

 private:
  struct Owner;

  std::unique_ptr<Owner> owner_;
  float* data_;
};

}  // namespace mmactnn
