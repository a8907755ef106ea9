// Message of torch for a failed call of the stable API.
#pragma once

// Exists in torch >= 2.13; null before.
extern "C" __attribute__((weak)) const char*
torch_exception_get_what_without_backtrace();

namespace mmactnn {

inline const char* last_error() {
  if (torch_exception_get_what_without_backtrace == nullptr) {
    return "torch has written the reason to the log; it may be out of memory";
  }
  return torch_exception_get_what_without_backtrace();
}

}  // namespace mmactnn
