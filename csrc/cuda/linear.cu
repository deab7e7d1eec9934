// The instances of the linear kernel, the tensor maps they read, and their launch.

#include <cuda_runtime_api.h>

#include <cstring>

#include "encode.h"
#include "linear.cuh"

namespace vitfast {
namespace {

template <typename X, typename T, int kColumns>
int launch(const LinearCall& call, int processors, cudaStream_t stream) {
  const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  bool refused = false;
  const LinearParams params = linear_params(call, kColumns, [&](const Matrix& m) {
    const cuuint64_t size[] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
    const cuuint64_t row_bytes = 2 * static_cast<cuuint64_t>(m.stride);
    const cuuint32_t box[] = {static_cast<cuuint32_t>(m.box_columns), static_cast<cuuint32_t>(m.box_rows)};
    const cuuint32_t every[] = {1, 1};
    CUtensorMap made;
    // Whatever two bytes are, TMA only moves them.
    refused |= encode(&made, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(m.data), size, &row_bytes, box, every,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS;
    TensorMap map;
    std::memcpy(&map, &made, sizeof(map));
    return map;
  });
  if (refused) return cudaErrorInvalidValue;

  auto* kernel = &linear_kernel<X, T, kColumns>;
  constexpr int bytes = LinearShared<kColumns>::bytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<linear_blocks(call.m, call.n, kColumns, processors), kLinearThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename X, typename T>
int launch(const LinearCall& call, int processors, cudaStream_t stream) {
  return linear_columns(call.m, call.n, processors) == 256 ? launch<X, T, 256>(call, processors, stream)
                                                           : launch<X, T, 128>(call, processors, stream);
}

template <typename T>
int launch(const LinearCall& call, int processors, cudaStream_t stream) {
  return call.x_scale ? launch<e4m3, T>(call, processors, stream) : launch<T, T>(call, processors, stream);
}

}  // namespace

int linear_launch(LinearType type, const LinearCall& call, int processors, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return type == LinearType::bf16 ? launch<bf16>(call, processors, s) : launch<fp16>(call, processors, s);
}

}  // namespace vitfast
