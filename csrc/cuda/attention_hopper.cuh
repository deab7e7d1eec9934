// attention on sm_90a: softmax(q k^T scale) v for up to 320 keys, bf16 and fp16, fp32 inside.
//
// Blocks stay, one to a multiprocessor, and go from head to head. In a block one thread, the producer, has TMA copy all
// keys and values of a head to a stage of shared memory, while those of the heads before are in use. Two warpgroups,
// the consumers, take the tiles of 64 queries in turn. A tile's scores against all keys are in registers, so that the
// softmax is exact and in one pass; there the weights stay, as the first operand of the product with the values. While
// one consumer is in its softmax the other multiplies. A consumer copies its queries itself, the next tile's while it
// computes, and its output leaves through the same memory.
//
// Keys take the nearest of a few multiples of 8: 197 tokens cost 4 x 64 by 200. A head's columns lie in boxes of 64;
// beyond them, and beyond the last token, TMA loads zeros and stores nothing. Bound by memory at N = 197 and
// D = 64, then by exp2 and the products.
//
// Source: FlashAttention-3 (Shah et al. 2024, section 3: roles of warps, one warpgroup's softmax beside the other's
// products, weights as an operand in registers); the ring of stages is that of linear.cuh.
#pragma once

#include "../device/products.cuh"
#include "attention.cuh"
#include "attention_hopper.h"

namespace vitfast {

constexpr int kAttentionProducerRegisters = 24, kAttentionConsumerRegisters = 240;  // (24 + 2 * 240) * 128 of 64 Ki
constexpr int kAttentionConsumers = 2;

// Where things lie in shared memory, in bytes from a multiple of 1024. Boxes have rows of 128 bytes, swizzled.
template <int D, int kKeys>
struct AttentionShared {
  static constexpr int boxes = (D + 63) / 64;  // side by side
  static constexpr int query_box = kAttentionQueries * 128, tile = boxes * query_box;
  static constexpr int key_rows = attention_key_rows(kKeys), box_rows = attention_box_rows(kKeys);
  static constexpr int key_box = key_rows * 128;
  static constexpr int keys = 0, values = boxes * key_box, stage = 2 * values;  // in a stage
  static constexpr int tiles = 0, first_stage = 4 * tile;                       // two tiles for each consumer
  // As many stages as there is room for, four at most; one where the scores leave no registers to tell stages apart.
  static constexpr int fit = (232448 - 1024 - 128 - first_stage) / stage;
  static constexpr int stages = kKeys > 264 ? 1 : fit < 4 ? fit : 4;
  static constexpr int full = first_stage + stages * stage, empty = full + 8 * stages, queries = empty + 8 * stages;
  static constexpr int end = queries + 8 * 4;
  static constexpr int bytes = end + 1024;  // dynamic shared memory may begin anywhere
  static_assert(stages > 0 && bytes <= 232448, "more shared memory than a block can have");
};

// Copies, head by head, the keys and values that the consumers will need.
template <int D, int kKeys>
VITFAST_DEVICE void produce(const AttentionHopperParams& p, uint32_t shared) {
  using Shared = AttentionShared<D, kKeys>;
  Ring<Shared::stages> ring;
  for (int head = blockIdx.x; head < p.all_heads; head += grid_size(), ring.next()) {
    const uint32_t stage = shared + Shared::first_stage + ring.stage * Shared::stage;
    const uint32_t full = shared + Shared::full + 8 * ring.stage;
    mbarrier_wait(shared + Shared::empty + 8 * ring.stage, ring.parity ^ 1);  // at first they are: no wait
    mbarrier_arrive_expect(full, Shared::stage);
    for (int box = 0; box < Shared::boxes; ++box) {
      for (int row = 0; row < Shared::key_rows; row += Shared::box_rows) {
        const uint32_t to = stage + box * Shared::key_box + row * 128;
        tile_load(to + Shared::keys, p.k, head / p.heads, row, head % p.heads, 64 * box, full);
        tile_load(to + Shared::values, p.v, head / p.heads, row, head % p.heads, 64 * box, full);
      }
    }
  }
}

// kKeys: how many keys the registers hold. scores [64, kKeys] = q k^T for a tile of queries, in two parts where they
// are more than a product's 256 columns.
template <typename T, int D, int kKeys>
VITFAST_DEVICE void begin_scores(float (&scores)[kKeys / 2], uint32_t queries, uint32_t keys) {
  using Shared = AttentionShared<D, kKeys>;
  constexpr int left = kKeys <= 256 ? kKeys : Shared::box_rows, right = kKeys - left;
#pragma unroll
  for (int i = 0; i < (D + 15) / 16; ++i) {
    const uint64_t query = further(operand(queries), i / 4 * Shared::query_box + i % 4 * 32);
    const uint64_t key = further(operand(keys), i / 4 * Shared::key_box + i % 4 * 32);
    multiply_add_async(T{}, part<0, left / 2>(scores), query, key, i > 0);
    if constexpr (right > 0) {
      multiply_add_async(T{}, part<left / 2, right / 2>(scores), query, further(key, left * 128), i > 0);
    }
  }
  product_commit();
}

// Softmax of the scores over `keys`, not yet divided by its sums: those of the lane's two rows. The weights, rounded,
// are as a product's first operand wants them: its inner axis is 16 keys, two groups of 8 columns of scores.
template <typename T, int kKeys>
VITFAST_DEVICE void soften(float (&scores)[kKeys / 2], uint32_t (&weights)[(kKeys + 15) / 16][4], int keys,
                           float scale_log2, int pair, float& sum0, float& sum1) {
  float max0 = -INFINITY, max1 = -INFINITY;
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    float* s = scores + 4 * j;
    if (8 * j + 8 > keys) {  // not all of these exist
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * j + e % 2 >= keys - pair) s[e] = -INFINITY;
      }
    }
    max0 = fmaxf(max0, fmaxf(s[0], s[1]));
    max1 = fmaxf(max1, fmaxf(s[2], s[3]));
  }
  const float shift0 = quad_max(max0) * scale_log2, shift1 = quad_max(max1) * scale_log2;
  sum0 = sum1 = 0.0f;
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    const float* s = scores + 4 * j;
    const float w0 = exp2_fast(s[0] * scale_log2 - shift0), w1 = exp2_fast(s[1] * scale_log2 - shift0);
    const float w2 = exp2_fast(s[2] * scale_log2 - shift1), w3 = exp2_fast(s[3] * scale_log2 - shift1);
    sum0 += w0 + w1;
    sum1 += w2 + w3;
    weights[j / 2][2 * (j % 2)] = pack(T{}, w0, w1);
    weights[j / 2][2 * (j % 2) + 1] = pack(T{}, w2, w3);
  }
  if constexpr (kKeys % 16) weights[kKeys / 16][2] = weights[kKeys / 16][3] = 0;
  sum0 = quad_sum(sum0);
  sum1 = quad_sum(sum1);
}

// `group`: the consumer, 0 or 1. They take the tiles of queries in turn, over the ends of heads.
template <typename T, int D, int kKeys>
VITFAST_DEVICE void consume(const AttentionHopperParams& p, uint32_t shared, int group) {
  using Shared = AttentionShared<D, kKeys>;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, pair = 2 * (lane % 4);
  const int row = 16 * warp + lane / 4;  // of a tile; with the eighth below those of which this lane has sums
  const uint32_t tiles = shared + Shared::tiles + 2 * group * Shared::tile;
  const uint32_t arrived = shared + Shared::queries + 8 * 2 * group;

  const auto load_queries = [&](int head, int tile, unsigned to) {
    for (; tile >= p.tiles; tile -= p.tiles) head += grid_size();
    if (head >= p.all_heads) return;
    mbarrier_arrive_expect(arrived + 8 * to, Shared::tile);
    for (int box = 0; box < Shared::boxes; ++box) {
      tile_load(tiles + to * Shared::tile + box * Shared::query_box, p.q, head / p.heads, tile * kAttentionQueries,
                head % p.heads, 64 * box, arrived + 8 * to);
    }
  };
  if (thread == 0) load_queries(blockIdx.x, group, 0);

  Ring<Shared::stages> ring;
  int tile = group;
  unsigned turn = 0;  // of its two places for tiles
  for (int head = blockIdx.x; head < p.all_heads; head += grid_size(), tile -= p.tiles, ring.next()) {
    const uint32_t stage = shared + Shared::first_stage + ring.stage * Shared::stage;
    // A consumer with no tile of this head only gives the stage back. Then one thread waits: others, which nothing
    // would hold together, might come to it when its phase is long over.
    if (tile < p.tiles || thread == 0) mbarrier_wait(shared + Shared::full + 8 * ring.stage, ring.parity);
    for (; tile < p.tiles; tile += 2, ++turn) {
      // Scores. The next tile's queries come to where the last one's output has been.
      const uint32_t here = tiles + turn % 2 * Shared::tile;
      float scores[kKeys / 2];
      mbarrier_wait(arrived + turn % 2 * 8, turn / 2 % 2);
      product_fence();
      begin_scores<T, D, kKeys>(scores, here, stage + Shared::keys);
      if (thread == 0) {
        store_wait_read<0>();
        load_queries(head, tile + 2, (turn + 1) % 2);
      }
      product_wait<0>();

      uint32_t weights[(kKeys + 15) / 16][4];
      float sum0, sum1;
      soften<T, kKeys>(scores, weights, p.keys, p.scale_log2, pair, sum0, sum1);

      float result[D / 2];
      product_fence();
#pragma unroll
      for (int i = 0; i < (kKeys + 15) / 16; ++i) {
        const uint64_t values = operand_transposed(stage + Shared::values, Shared::key_box);
        multiply_transposed_async(T{}, result, weights[i], further(values, i * 16 * 128), i > 0);
      }
      product_commit();
      product_wait<0>();

      // Store.
      const float norm0 = 1.0f / sum0, norm1 = 1.0f / sum1;
      const uint32_t first_place = swizzle(here + row * 128 + 2 * pair);
      named_barrier(1 + group, 128);  // all warps are through with the queries
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const uint32_t place = (first_place ^ j % 8 * 16) + j / 8 * Shared::query_box;
        store_shared_pair(place, pack(T{}, result[4 * j] * norm0, result[4 * j + 1] * norm0));
        store_shared_pair(place + 8 * 128, pack(T{}, result[4 * j + 2] * norm1, result[4 * j + 3] * norm1));
      }
      async_fence();
      named_barrier(1 + group, 128);  // all of the output is there
      if (thread == 0) {
        for (int box = 0; box < Shared::boxes; ++box) {
          tile_store(p.out, head / p.heads, tile * kAttentionQueries, head % p.heads, 64 * box,
                     here + box * Shared::query_box);
        }
        store_commit();
      }
    }
    if (thread == 0) mbarrier_arrive(shared + Shared::empty + 8 * ring.stage);
  }
  if (thread == 0) store_wait_read<0>();  // shared memory outlives the stores
}

template <typename T, int D, int kKeys>
__global__ void __launch_bounds__(kAttentionHopperThreads, 1)
    attention_hopper_kernel(const __grid_constant__ AttentionHopperParams p) {
#ifdef VITFAST_SM_90A
  using Shared = AttentionShared<D, kKeys>;
  const uint32_t shared = (shared_begin() + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::stages; ++i) {
      mbarrier_init(shared + Shared::full + 8 * i, 1);
      mbarrier_init(shared + Shared::empty + 8 * i, kAttentionConsumers);
    }
    for (int i = 0; i < 4; ++i) mbarrier_init(shared + Shared::queries + 8 * i, 1);
    async_fence();
  }
  block_barrier();  // all know the mbarriers

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    give_registers<kAttentionProducerRegisters>();
    if (threadIdx.x == 0) produce<D, kKeys>(p, shared);
  } else {
    take_registers<kAttentionConsumerRegisters>();
    consume<T, D, kKeys>(p, shared, warpgroup - 1);
  }
#else
  __trap();  // the launcher asks for sm_90a
#endif
}

}  // namespace vitfast
