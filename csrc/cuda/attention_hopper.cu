// The instances of the attention kernel for sm_90a, the tensor maps they read, and their launch.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "attention_hopper.cuh"
#include "encode.h"

namespace vitfast {
namespace {

// A map of Heads by the driver; `refused` if it does not make one.
TensorMap encode_heads(Encode encode, const Heads& h, bool& refused) {
  const auto bytes = [](int64_t elements) { return 2 * static_cast<cuuint64_t>(elements); };
  const cuuint64_t size[] = {static_cast<cuuint64_t>(h.columns), static_cast<cuuint64_t>(h.heads),
                             static_cast<cuuint64_t>(h.rows), static_cast<cuuint64_t>(h.images)};
  const cuuint64_t strides[] = {bytes(h.head_stride), bytes(h.row_stride), bytes(h.image_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(h.box_columns), 1, static_cast<cuuint32_t>(h.box_rows), 1};
  const cuuint32_t every[] = {1, 1, 1, 1};
  CUtensorMap made;
  // Whatever two bytes are, TMA only moves them.
  refused |= encode(&made, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(h.data), size, strides, box, every,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS;
  TensorMap map;
  std::memcpy(&map, &made, sizeof(map));
  return map;
}

template <typename T, int D, int kKeys>
int launch(const AttentionParams& call, int batch, int processors, cudaStream_t stream) {
  const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  bool refused = false;
  const AttentionHopperParams params = attention_hopper_params(
      call, D, batch, kKeys, [&](const Heads& heads) { return encode_heads(encode, heads, refused); });
  if (refused) return cudaErrorInvalidValue;

  auto* kernel = &attention_hopper_kernel<T, D, kKeys>;
  constexpr int bytes = AttentionShared<D, kKeys>::bytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<std::min(params.all_heads, processors), kAttentionHopperThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

// By the tokens of common models: 50, 197, 201 (four registers), 257 and 261, and the most that fits the registers.
template <typename T, int D>
int launch(const AttentionParams& call, int batch, int processors, cudaStream_t stream) {
  if (call.keys <= 64) return launch<T, D, 64>(call, batch, processors, stream);
  if (call.keys <= 200) return launch<T, D, 200>(call, batch, processors, stream);
  if (call.keys <= 208) return launch<T, D, 208>(call, batch, processors, stream);
  if (call.keys <= 264) return launch<T, D, 264>(call, batch, processors, stream);
  if (call.keys <= kAttentionMaxKeys) return launch<T, D, 320>(call, batch, processors, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int attention_hopper_launch(AttentionType type, int head_dim, const AttentionParams& params, int batch, int processors,
                            void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return with_head_dim(head_dim, [&](auto d) {
    constexpr int D = decltype(d)::value;
    return type == AttentionType::bf16 ? launch<bf16, D>(params, batch, processors, s)
                                       : launch<fp16, D>(params, batch, processors, s);
  });
}

}  // namespace vitfast
