// Build information as JSON, which mmactnn/extension.py reads.
#include <torch/headeronly/version.h>

#define MMACTNN_STRINGIFY(x) #x
#define MMACTNN_STRING(x) MMACTNN_STRINGIFY(x)

#if defined(__clang__)
#define MMACTNN_COMPILER "clang " __clang_version__
#else
#define MMACTNN_COMPILER "gcc " __VERSION__
#endif

// MMACTNN_CUDA_VERSION and MMACTNN_CUDA_ARCHS come from setup.py.
extern "C" __attribute__((visibility("default"))) const char*
mmactnn_build_info() {
  return "{\"torch\": \"" TORCH_VERSION
         "\", \"compiler\": \"" MMACTNN_COMPILER
         "\", \"cuda\": "
#ifdef MMACTNN_CUDA_VERSION
         "\"" MMACTNN_STRING(MMACTNN_CUDA_VERSION)
         "\", \"cuda_archs\": \"" MMACTNN_STRING(MMACTNN_CUDA_ARCHS) "\"}";
#else
         "null, \"cuda_archs\": null}";
#endif
}
