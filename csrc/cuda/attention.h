// What the CUDA attention kernel and its launcher share; free of torch and of CUDA headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

namespace vitfast {

constexpr int kAttentionMaxKeys = 320;
constexpr int kAttentionHeadDims[] = {32, 64, 72, 80, 88, 96, 104, 128};

enum class AttentionType { bf16, fp16 };

struct AttentionParams {
  const void *q, *k, *v;  // [B, N, H, D], rows aligned to 16 bytes; strides in elements
  void* out;              // [B, Nq, H, D], contiguous
  int64_t q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head;
  int queries, keys, heads;
  float scale;
};

// f with the head dim, one of kAttentionHeadDims, as a compile-time constant; for another cudaErrorInvalidValue, 1.
template <typename F, size_t... i>
int with_head_dim(int head_dim, F f, std::index_sequence<i...>) {
  int result = 1;
  ((head_dim == kAttentionHeadDims[i] && (result = f(std::integral_constant<int, kAttentionHeadDims[i]>()), true)) ||
   ...);
  return result;
}
template <typename F>
int with_head_dim(int head_dim, F f) {
  return with_head_dim(head_dim, f, std::make_index_sequence<std::size(kAttentionHeadDims)>());
}

// Bytes of shared memory that a block takes.
int attention_shared_bytes(int head_dim, int keys);

// Starts the kernel on a stream (a cudaStream_t); a cudaError_t, 0 if all is well. The head dim is one of
// kAttentionHeadDims, keys are 1 .. kAttentionMaxKeys, queries and batch at least 1.
int attention_launch(AttentionType type, int head_dim, const AttentionParams& params, int batch, void* stream);

}  // namespace vitfast
