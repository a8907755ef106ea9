#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmactnn {

// torch's current stream on `device_index`.
cudaStream_t current_stream(int32_t device_index);

}  // namespace mmactnn
