// The instances of the attention kernel, and their launch.

#include <cuda_runtime_api.h>

#include "attention.cuh"

namespace vitfast {
namespace {

template <typename T, int D, int steps>
int launch(const AttentionParams& params, int batch, cudaStream_t stream) {
  auto* kernel = &attention_kernel<T, D, steps>;
  const int bytes = attention_shared_bytes<D>(params.keys);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<batch * params.heads, kAttentionThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

// By the tokens of common models: 50, 197, 257, and the most that fits the registers.
template <typename T, int D>
int launch(const AttentionParams& params, int batch, cudaStream_t stream) {
  if (params.keys <= 64) return launch<T, D, 4>(params, batch, stream);
  if (params.keys <= 208) return launch<T, D, 13>(params, batch, stream);
  if (params.keys <= 272) return launch<T, D, 17>(params, batch, stream);
  if (params.keys <= kAttentionMaxKeys) return launch<T, D, 20>(params, batch, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int attention_shared_bytes(int head_dim, int keys) {
  return with_head_dim(head_dim, [keys](auto d) { return attention_shared_bytes<decltype(d)::value>(keys); });
}

int attention_launch(AttentionType type, int head_dim, const AttentionParams& params, int batch, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return with_head_dim(head_dim, [&](auto d) {
    constexpr int D = decltype(d)::value;
    return type == AttentionType::bf16 ? launch<bf16, D>(params, batch, s) : launch<fp16, D>(params, batch, s);
  });
}

}  // namespace vitfast
