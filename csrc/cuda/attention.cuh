// attention on sm_80 and later: softmax(q k^T scale) v for up to 320 keys, bf16 and fp16, fp32 inside. On sm_90a it
// runs what attention_hopper.cuh does not take.
//
// A block takes one head of one image; a grid has B H of them. The head's keys and values are copied to shared memory
// once and stay there. A warp takes 16 queries at a time: their scores against all keys are in registers, so that the
// softmax is exact and in one pass, and 197 tokens cost 13 x 13 tiles of 16, 1.11 times the products needed. Reads
// packed qkv through strides, writes [B, N, H, D]. Bound by tensor-core issue and exp2 once the loads, 4 N D
// bytes a head, are hidden by the other blocks on the SM.
//
// The arrangement of scores as the next product's operand is FlashAttention-2's (Dao 2023, section 3).
#pragma once

#include "../device/atoms.cuh"
#include "attention.h"

namespace vitfast {

constexpr int kAttentionThreads = 128;

// Rows of D elements in shared memory as chunks of 16 bytes. Eight neighbouring rows of one chunk, which is what
// load_matrices reads at a time, lie in different banks: where the chunks of a row are a power of two their order
// is permuted by the row's number, else the row is padded to an odd number of them.
template <int D>
struct SharedRows {
  static constexpr int chunks = D / 8;
  static constexpr bool permuted = (chunks & (chunks - 1)) == 0;
  static constexpr int stride = permuted ? chunks : chunks | 1;
  static constexpr int rows_per_line = chunks < 8 ? 8 / chunks : 1;  // that share the 128 bytes of all banks

  // The order repeats every 8 rows: offset(row + 16 j, chunk) is offset(row, chunk) + j * bytes(16).
  static VITFAST_DEVICE uint32_t offset(unsigned row, unsigned chunk) {
    if (permuted) chunk ^= row / rows_per_line % (chunks < 8 ? chunks : 8);
    return 16 * (row * stride + chunk);
  }
  static VITFAST_HOST_DEVICE constexpr int bytes(int rows) { return 16 * rows * stride; }
};

VITFAST_HOST_DEVICE constexpr int round_up(int n, int step) { return (n + step - 1) / step * step; }

template <int D>
constexpr int attention_shared_bytes(int keys) {
  return 2 * SharedRows<D>::bytes(round_up(keys, 16));
}

// Starts to copy rows [0, keys) to shared memory, zeros after them up to a multiple of 16.
template <typename T, int D>
VITFAST_DEVICE void copy_rows(uint32_t to, const T* from, int64_t token_stride, int keys) {
  constexpr int chunks = SharedRows<D>::chunks;
  for (int i = threadIdx.x; i < round_up(keys, 16) * chunks; i += kAttentionThreads) {
    const int row = i / chunks, chunk = i % chunks;
    const bool valid = row < keys;
    copy_async(to + SharedRows<D>::offset(row, chunk), from + (valid ? row : 0) * token_stride + 8 * chunk, valid);
  }
  copy_commit();
}

// A quad of lanes holds a row of scores: the largest of, or the sum over, its lanes.
VITFAST_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
VITFAST_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// steps: how many times 16 keys the registers hold.
template <typename T, int D, int steps>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(AttentionParams p) {
  using Rows = SharedRows<D>;
  constexpr int depth = (D + 15) / 16;  // products along the head, the last of them half empty if D % 16 == 8
  constexpr int columns = D / 8;        // tiles of 8 along the head

  // Locate.
  const int head = blockIdx.x % p.heads, image = blockIdx.x / p.heads;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = 2 * (lane % 4);
  const unsigned matrix = lane / 8, matrix_row = lane % 8;  // whose address this lane gives to load_matrices
  const T* q = static_cast<const T*>(p.q) + image * p.q_batch + head * p.q_head;
  const T* k = static_cast<const T*>(p.k) + image * p.k_batch + head * p.k_head;
  const T* v = static_cast<const T*>(p.v) + image * p.v_batch + head * p.v_head;
  T* out = static_cast<T*>(p.out) + (static_cast<int64_t>(image) * p.queries * p.heads + head) * D;
  const uint32_t keys = shared_begin(), values = keys + Rows::bytes(round_up(p.keys, 16));
  // exp(x) = exp2(x log2(e)). Never 0, which would make NaN of -inf; a negative scale goes to the signs of q.
  const float scale_log2 = fmaxf(fabsf(p.scale) * 1.44269504f, 1.17549435e-38f);
  const uint32_t flip = p.scale < 0 ? 0x80008000u : 0;

  copy_rows<T, D>(keys, k, p.k_token, p.keys);
  copy_rows<T, D>(values, v, p.v_token, p.keys);
  copy_wait<1>();
  block_barrier();  // every thread's keys are there

  // All warps make the first round, which waits for the values, also those that have no queries in it.
  constexpr int per_round = 16 * kAttentionThreads / 32;
  for (int round = 0; round * per_round < p.queries; ++round) {
    const int row0 = round * per_round + static_cast<int>(16 * warp + group), row1 = row0 + 8;  // this lane's rows
    const T* q0 = q + (row0 < p.queries ? row0 : p.queries - 1) * p.q_token;
    const T* q1 = q + (row1 < p.queries ? row1 : p.queries - 1) * p.q_token;
    uint32_t a[depth][4];
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      const bool full = 16 * i + 8 < D;
      a[i][0] = load_pair(q0 + 16 * i + pair) ^ flip;
      a[i][1] = load_pair(q1 + 16 * i + pair) ^ flip;
      a[i][2] = full ? load_pair(q0 + 16 * i + 8 + pair) ^ flip : 0;
      a[i][3] = full ? load_pair(q1 + 16 * i + 8 + pair) ^ flip : 0;
    }

    // Scores of 16 queries and, per step, 16 keys: two tiles of 8. Keys beyond the last get -inf.
    float scores[2 * steps][4];
    float max0 = -INFINITY, max1 = -INFINITY;
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      float (&left)[4] = scores[2 * j], (&right)[4] = scores[2 * j + 1];
#pragma unroll
      for (int e = 0; e < 4; ++e) left[e] = right[e] = 0.0f;
      if (16 * j < p.keys) {
#pragma unroll
        for (int i = 0; i < depth; ++i) {
          const bool full = 16 * i + 8 < D;
          const unsigned chunk = 2 * i + (full ? matrix % 2 : 0);
          uint32_t b[4];
          load_matrices(b, keys + Rows::offset(8 * (matrix / 2) + matrix_row, chunk) + j * Rows::bytes(16));
          multiply_add(T{}, left, a[i], b[0], full ? b[1] : 0);
          multiply_add(T{}, right, a[i], b[2], full ? b[3] : 0);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = 16 * j + static_cast<int>(pair) + e % 2;
        if (key >= p.keys) left[e] = -INFINITY;
        if (key + 8 >= p.keys) right[e] = -INFINITY;
      }
      max0 = fmaxf(max0, fmaxf(fmaxf(left[0], left[1]), fmaxf(right[0], right[1])));
      max1 = fmaxf(max1, fmaxf(fmaxf(left[2], left[3]), fmaxf(right[2], right[3])));
    }

    // Softmax, not yet divided by the sums; the weights, rounded, are the next product's first operand.
    const float shift0 = quad_max(max0) * scale_log2, shift1 = quad_max(max1) * scale_log2;
    float sum0 = 0.0f, sum1 = 0.0f;
    uint32_t weights[steps][4];
#pragma unroll
    for (int j = 0; j < steps; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&s)[4] = scores[2 * j + half];
        const float w0 = exp2_fast(s[0] * scale_log2 - shift0), w1 = exp2_fast(s[1] * scale_log2 - shift0);
        const float w2 = exp2_fast(s[2] * scale_log2 - shift1), w3 = exp2_fast(s[3] * scale_log2 - shift1);
        sum0 += w0 + w1;
        sum1 += w2 + w3;
        weights[j][2 * half] = pack(T{}, w0, w1);
        weights[j][2 * half + 1] = pack(T{}, w2, w3);
      }
    }
    const float norm0 = 1.0f / quad_sum(sum0), norm1 = 1.0f / quad_sum(sum1);

    if (round == 0) {
      copy_wait<0>();
      block_barrier();  // every thread's values are there
    }
    float result[columns][4];
#pragma unroll
    for (int d = 0; d < columns; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) result[d][e] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      if (16 * j < p.keys) {
#pragma unroll
        for (int d = 0; d < columns; d += 2) {
          const bool full = d + 1 < columns;
          const unsigned chunk = d + (full ? matrix / 2 : 0);
          uint32_t b[4];
          load_matrices_transposed(b, values + Rows::offset(lane % 16, chunk) + j * Rows::bytes(16));
          multiply_add(T{}, result[d], weights[j], b[0], b[1]);
          if (full) multiply_add(T{}, result[d + 1], weights[j], b[2], b[3]);
        }
      }
    }

    // Store. Four lanes write 16 bytes of a row at a time; the L2 cache joins them into sectors.
    const int64_t token = static_cast<int64_t>(p.heads) * D;
#pragma unroll
    for (int d = 0; d < columns; ++d) {
      const float (&r)[4] = result[d];
      T* to = out + 8 * d + pair;
      if (row0 < p.queries) store_pair(to + row0 * token, pack(T{}, r[0] * norm0, r[1] * norm0));
      if (row1 < p.queries) store_pair(to + row1 * token, pack(T{}, r[2] * norm1, r[3] * norm1));
    }
  }
}

}  // namespace vitfast
