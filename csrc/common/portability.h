// Annotations that let one inline function serve host and device.
#pragma once

#ifdef __CUDACC__
#define MMACTNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMACTNN_HOST_DEVICE inline
#endif
