// The driver's function that makes tensor maps.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../device/tensor_map.h"

namespace vitfast {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, or null; the extension is not linked with the driver.
inline Encode find_encode() {
  static void* const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult state;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &state);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &state);
#endif
    return function;
  }();
  return reinterpret_cast<Encode>(found);
}

}  // namespace vitfast
