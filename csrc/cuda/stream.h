#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmactnn {

int32_t current_device();

// torch's current stream on the current device.
cudaStream_t current_stream();

}  // namespace mmactnn
