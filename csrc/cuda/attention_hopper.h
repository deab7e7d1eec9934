// What the attention kernel for sm_90a and its launcher share beside attention.h; free of torch and of CUDA headers.
#pragma once

#include <algorithm>

#include "../device/tensor_map.h"
#include "attention.h"

namespace vitfast {

constexpr int kAttentionQueries = 64;         // of a tile: a warpgroup's rows of a product
constexpr int kAttentionHopperThreads = 384;  // a producer's and two consumers' warpgroups

// Rows of keys and values in shared memory, whole steps of 16, and of them in a box, of which TMA takes 256 at most.
constexpr int attention_key_rows(int keys) { return (keys + 15) / 16 * 16; }
constexpr int attention_box_rows(int keys) {
  return attention_key_rows(keys) <= 256 ? attention_key_rows(keys) : attention_key_rows(keys) / 2;
}

struct AttentionHopperParams {
  TensorMap q, k, v, out;
  int all_heads, heads, tiles, keys;  // heads of all images and of one, tiles of queries of a head
  float scale_log2;                   // positive
};

// Strides that TMA takes, in elements, where there is more than one step: rows do not overlap, nor lie too far apart.
constexpr bool attention_stride_fits(int64_t size, int64_t stride, int head_dim) {
  return size == 1 || (stride >= head_dim && stride < int64_t{1} << 39);
}

// Whether the kernel takes this call; the others are left to that of attention.cuh: strides as above, numbers that int
// does not count beyond, and negative scales, since nothing changes the signs of q on its way to the product.
constexpr bool attention_hopper_takes(int head_dim, const AttentionParams& p, int batch) {
  const auto fit = [&](int tokens, int64_t image, int64_t token, int64_t head) {
    return attention_stride_fits(batch, image, head_dim) && attention_stride_fits(tokens, token, head_dim) &&
           attention_stride_fits(p.heads, head, head_dim);
  };
  return fit(p.queries, p.q_batch, p.q_token, p.q_head) && fit(p.keys, p.k_batch, p.k_token, p.k_head) &&
         fit(p.keys, p.v_batch, p.v_token, p.v_head) && p.queries < 1 << 30 && int64_t{batch} * p.heads < 1 << 30 &&
         p.scale >= 0;
}

// The same call as the kernel wants it, for an instance of `most_keys`; `encode` makes a map of Heads.
template <typename Encode>
AttentionHopperParams attention_hopper_params(const AttentionParams& p, int head_dim, int batch, int most_keys,
                                              Encode encode) {
  const auto map = [&](const void* data, int rows, int64_t image, int64_t token, int64_t head, int box_rows) {
    const auto stride = [=](int64_t size, int64_t given) { return size == 1 ? head_dim : given; };
    return encode(Heads{data, batch, rows, p.heads, head_dim, stride(batch, image), stride(rows, token),
                        stride(p.heads, head), box_rows, 64});
  };
  const int64_t token = static_cast<int64_t>(p.heads) * head_dim;
  AttentionHopperParams made{};
  made.q = map(p.q, p.queries, p.q_batch, p.q_token, p.q_head, kAttentionQueries);
  made.k = map(p.k, p.keys, p.k_batch, p.k_token, p.k_head, attention_box_rows(most_keys));
  made.v = map(p.v, p.keys, p.v_batch, p.v_token, p.v_head, attention_box_rows(most_keys));
  made.out = map(p.out, p.queries, p.queries * token, token, head_dim, kAttentionQueries);
  made.all_heads = batch * p.heads;
  made.heads = p.heads;
  made.tiles = (p.queries + kAttentionQueries - 1) / kAttentionQueries;
  made.keys = p.keys;
  // exp(x) = exp2(x log2(e)). Never 0, which would make NaN of -inf.
  made.scale_log2 = std::max(p.scale * 1.44269504f, 1.17549435e-38f);
  return made;
}

// Starts the kernel, as attention_launch does, for a call it takes on a GPU with `processors` multiprocessors.
int attention_hopper_launch(AttentionType type, int head_dim, const AttentionParams& params, int batch, int processors,
                            void* stream);

}  // namespace vitfast
