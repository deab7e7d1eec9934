// linear on sm_90a: y = act(norm(x) W^T + bias) * layer_scale + residual, bf16 and fp16, fp32 inside.
//
// Blocks stay, one to a multiprocessor, and go from tile to tile of y [128, kColumns]. In a block one thread, the
// producer, has TMA copy steps of 64 columns of x and W into a ring of stages, and two warpgroups, the consumers,
// multiply them, 64 rows each, with the sums in their registers. A stage has two mbarriers: `full` ends a phase when
// its bytes are there, `empty` when all eight consumer warps are through with it. While the consumers are in their
// epilogue the producer fills the ring for the next tile. Tiles that reach beyond y cost nothing in code: TMA loads
// zeros there and stores nothing.
//
// The epilogue works on the sums where they are. y goes through shared memory, in which the residual has meanwhile
// arrived at the very places where y will be. LayerNorm is folded: rstd (x W^T - mean weight_sum), with mean and rstd
// from pairs (mean, M2) of 128 columns of x, as kernels/linear.py has it; `y_stats` are the same pairs of y as stored.
// Bound by the products at ViT widths.
//
// Sources: the roles of warps and the ring are CUTLASS's (media/docs/cpp/efficient_gemm.md, "Hopper Warp
// Specialization"); Chan, Golub, LeVeque 1979 (combining statistics).
#pragma once

#include "../device/hopper.cuh"
#include "linear.h"

namespace vitfast {

constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // (24 + 2 * 240) * 128 of 64 Ki
constexpr int kConsumerWarps = 8;

// Where things lie in shared memory, in bytes from a multiple of 1024. Boxes have rows of 128 bytes, swizzled.
template <int kColumns>
struct LinearShared {
  static constexpr int stages = kColumns == 256 ? 3 : 6;
  static constexpr int x = 0, weight = kLinearRows * 128;  // in a stage
  static constexpr int stage = weight + kColumns * 128;
  static constexpr int box = 64 * 128;                                    // 64 columns of a warpgroup's rows of y
  static constexpr int y = stages * stage, y_part = kColumns / 64 * box;  // a part for each warpgroup
  static constexpr int full = y + 2 * y_part, empty = full + 8 * stages, residual = empty + 8 * stages;
  static constexpr int end = residual + 8 * 2;
  static constexpr int bytes = end + 1024;  // dynamic shared memory may begin anywhere
  static_assert(bytes <= 232448, "more shared memory than a block can have");
};

// Tile number -> tile row and column: down a group of rows first, so that tiles that run together share operands in L2.
VITFAST_DEVICE void tile_origin(int tile, int tile_rows, int tile_columns, int& row, int& column) {
  const int first = tile / (kLinearGroup * tile_columns) * kLinearGroup;
  const int rows = tile_rows - first < kLinearGroup ? tile_rows - first : kLinearGroup;
  const int within = tile % (kLinearGroup * tile_columns);
  row = first + within % rows;
  column = within / rows;
}

// A quad of lanes holds a row of sums.
VITFAST_DEVICE float sum_of_quad(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Mean and 1 / sqrt(variance + eps) of a row of x from its pairs, by Chan's formula; each lane of a quad takes its
// share.
VITFAST_DEVICE void combine_stats(const LinearCall& p, int row, int share, float& mean, float& rstd) {
  const int tiles = (p.k + kLinearStats - 1) / kLinearStats;
  const float* pairs = p.row_stats + 2 * static_cast<int64_t>(row) * tiles;
  const auto count = [&](int tile) {
    const int left = p.k - tile * kLinearStats;
    return static_cast<float>(left < kLinearStats ? left : kLinearStats);
  };
  float pair[2], total = 0.0f, squares = 0.0f;
  for (int tile = share; tile < tiles; tile += 4) {
    load_floats(pair, pairs + 2 * tile);
    total += pair[0] * count(tile);
  }
  mean = sum_of_quad(total) / static_cast<float>(p.k);
  for (int tile = share; tile < tiles; tile += 4) {
    load_floats(pair, pairs + 2 * tile);
    squares += pair[1] + count(tile) * (pair[0] - mean) * (pair[0] - mean);
  }
  rstd = 1.0f / sqrtf(sum_of_quad(squares) / static_cast<float>(p.k) + p.eps);
}

// What a column has to do with its sums: `column` is that of sums[0]. Columns beyond the last, which nobody will see,
// take what the last have: loads without conditions can go out together.
VITFAST_DEVICE int within(int column, int n) { return column < n ? column : n - 2; }

template <int count>
VITFAST_DEVICE void fold_norm(float (&sums)[count], const LinearCall& p, int column, float mean0, float rstd0,
                              float mean1, float rstd1) {
#pragma unroll
  for (int j = 0; j < count / 4; ++j) {
    float* s = sums + 4 * j;
    float sum[2];
    load_floats(sum, p.weight_sum + within(column + 8 * j, p.n));
    s[0] = rstd0 * (s[0] - mean0 * sum[0]), s[1] = rstd0 * (s[1] - mean0 * sum[1]);
    s[2] = rstd1 * (s[2] - mean1 * sum[0]), s[3] = rstd1 * (s[3] - mean1 * sum[1]);
  }
}

template <typename T, int count, typename F>
VITFAST_DEVICE void combine(float (&sums)[count], const void* vector, int column, int n, F f) {
#pragma unroll
  for (int j = 0; j < count / 4; ++j) {
    float* s = sums + 4 * j;
    float low, high;
    unpack(T{}, load_pair(static_cast<const T*>(vector) + within(column + 8 * j, n)), low, high);
    s[0] = f(s[0], low), s[1] = f(s[1], high), s[2] = f(s[2], low), s[3] = f(s[3], high);
  }
}

VITFAST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-1.44269504f * x)); }

template <int count>
VITFAST_DEVICE void activate(float (&sums)[count], LinearActivation activation) {
  const auto each = [&sums](auto f) {
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] = f(sums[i]);
  };
  if (activation == LinearActivation::gelu) {
    each([](float x) { return 0.5f * x * (1.0f + erff(0.707106781f * x)); });
  } else if (activation == LinearActivation::gelu_tanh) {
    each([](float x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); });
  } else if (activation == LinearActivation::quick_gelu) {
    each([](float x) { return x * sigmoid(1.702f * x); });
  } else if (activation == LinearActivation::silu) {
    each([](float x) { return x * sigmoid(x); });
  }
}

// (mean, M2) of this lane's two rows, 128 columns at a time; columns beyond y do not count.
template <int kColumns>
VITFAST_DEVICE void store_stats(const LinearCall& p, const float (&y)[kColumns / 2], int row0, int first_column,
                                int lane) {
  const int tiles = (p.n + kLinearStats - 1) / kLinearStats;
#pragma unroll
  for (int part = 0; part < kColumns / kLinearStats; ++part) {
    const int first = first_column + part * kLinearStats, left = p.n - first;
    const int groups = left < kLinearStats ? left / 8 : kLinearStats / 8;  // of eight columns
    float mean0 = 0.0f, mean1 = 0.0f, m2_0 = 0.0f, m2_1 = 0.0f;
#pragma unroll
    for (int j = 0; j < kLinearStats / 8; ++j) {
      const float* s = y + 4 * (part * kLinearStats / 8 + j);
      if (j < groups) mean0 += s[0] + s[1], mean1 += s[2] + s[3];
    }
    mean0 = sum_of_quad(mean0) / static_cast<float>(8 * groups);
    mean1 = sum_of_quad(mean1) / static_cast<float>(8 * groups);
#pragma unroll
    for (int j = 0; j < kLinearStats / 8; ++j) {
      const float* s = y + 4 * (part * kLinearStats / 8 + j);
      if (j < groups) {
        m2_0 += (s[0] - mean0) * (s[0] - mean0) + (s[1] - mean0) * (s[1] - mean0);
        m2_1 += (s[2] - mean1) * (s[2] - mean1) + (s[3] - mean1) * (s[3] - mean1);
      }
    }
    m2_0 = sum_of_quad(m2_0);
    m2_1 = sum_of_quad(m2_1);
    float* pairs = p.y_stats + 2 * (static_cast<int64_t>(row0) * tiles + first / kLinearStats);
    if (left > 0 && lane % 4 == 0 && row0 < p.m) store_floats(pairs, mean0, m2_0);
    if (left > 0 && lane % 4 == 0 && row0 + 8 < p.m)
      store_floats(pairs + 16 * static_cast<int64_t>(tiles), mean1, m2_1);
  }
}

// Copies, step by step, what the consumers will multiply.
template <int kColumns>
VITFAST_DEVICE void produce(const LinearParams& p, uint32_t shared, int tile_rows, int tile_columns) {
  using Shared = LinearShared<kColumns>;
  Ring<Shared::stages> ring;
  for (int tile = blockIdx.x; tile < tile_rows * tile_columns; tile += grid_size()) {
    int tile_row, tile_column;
    tile_origin(tile, tile_rows, tile_columns, tile_row, tile_column);
    for (int k = 0; k < p.call.k; k += kLinearDepth, ring.next()) {
      const uint32_t stage = shared + ring.stage * Shared::stage, full = shared + Shared::full + 8 * ring.stage;
      mbarrier_wait(shared + Shared::empty + 8 * ring.stage, ring.parity ^ 1);  // at first they are: no wait
      mbarrier_arrive_expect(full, Shared::stage);
      tile_load(stage + Shared::x, p.x, tile_row * kLinearRows, k, full);
      tile_load(stage + Shared::weight, p.weight, tile_column * kColumns, k, full);
    }
  }
}

// `group`: the consumer warpgroup, 0 or 1, of rows 64 group .. 64 group + 63 of each tile.
template <typename T, int kColumns>
VITFAST_DEVICE void consume(const LinearParams& p, uint32_t shared, int tile_rows, int tile_columns, int group) {
  using Shared = LinearShared<kColumns>;
  const LinearCall& c = p.call;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, pair = 2 * (lane % 4);
  const int row_in_part = 16 * warp + lane / 4;  // and eight below: the rows of which this lane has sums
  const uint32_t y_part = shared + Shared::y + group * Shared::y_part, residual = shared + Shared::residual + 8 * group;
  Ring<Shared::stages> ring;
  int residual_parity = 0;

  for (int tile = blockIdx.x; tile < tile_rows * tile_columns; tile += grid_size(), residual_parity ^= 1) {
    // Locate.
    int tile_row, tile_column;
    tile_origin(tile, tile_rows, tile_columns, tile_row, tile_column);
    const int part_row = tile_row * kLinearRows + 64 * group, first_column = tile_column * kColumns;
    const int row0 = part_row + row_in_part, row1 = row0 + 8;

    // Load what the epilogue needs of rows.
    if (thread == 0) {
      store_wait_read<0>();  // the last tile's y has left: its place is free
      if (c.residual) {
        mbarrier_arrive_expect(residual, Shared::y_part);
        for (int i = 0; i < kColumns / 64; ++i) {
          tile_load(y_part + i * Shared::box, p.residual, part_row, first_column + 64 * i, residual);
        }
      }
    }
    float mean0 = 0.0f, rstd0 = 1.0f, mean1 = 0.0f, rstd1 = 1.0f;
    if (c.row_stats) {
      combine_stats(c, row0 < c.m ? row0 : c.m - 1, lane % 4, mean0, rstd0);
      combine_stats(c, row1 < c.m ? row1 : c.m - 1, lane % 4, mean1, rstd1);
    }

    // Multiply. One step's products are under way while the next one's are begun; then its stage is given back.
    float sums[kColumns / 2];
    uint32_t last_empty = 0;
    for (int k = 0; k < c.k; k += kLinearDepth, ring.next()) {
      const uint32_t stage = shared + ring.stage * Shared::stage;
      const uint32_t x = stage + Shared::x + group * 64 * 128, weight = stage + Shared::weight;
      mbarrier_wait(shared + Shared::full + 8 * ring.stage, ring.parity);
      product_fence();
#pragma unroll
      for (int i = 0; i < kLinearDepth / 16; ++i) {
        multiply_add_async(T{}, sums, operand(x + 32 * i), operand(weight + 32 * i), k + i > 0);
      }
      product_commit();
      product_wait<1>();
      if (k > 0 && lane == 0) mbarrier_arrive(last_empty);
      last_empty = shared + Shared::empty + 8 * ring.stage;
    }
    product_wait<0>();
    if (lane == 0) mbarrier_arrive(last_empty);

    // Epilogue. sums[4 j .. 4 j + 3] are columns 8 j + pair and the next of row0, then of row1.
    const int column = first_column + pair;
    if (c.row_stats) fold_norm(sums, c, column, mean0, rstd0, mean1, rstd1);
    if (c.bias) combine<T>(sums, c.bias, column, c.n, [](float s, float bias) { return s + bias; });
    activate(sums, c.activation);
    if (c.layer_scale) combine<T>(sums, c.layer_scale, column, c.n, [](float s, float scale) { return s * scale; });
    named_barrier(1 + group, 128);  // thread 0 knows that y's place is free; now all do
    const auto place = [=](int j, int half) {
      return swizzle(y_part + j / 8 * Shared::box + (row_in_part + 8 * half) * 128 + j % 8 * 16 + 2 * pair);
    };
    if (c.residual) {
      mbarrier_wait(residual, residual_parity);
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) {
        float low, high;
        unpack(T{}, load_shared_pair(place(i / 2, i % 2)), low, high);
        sums[2 * i] += low, sums[2 * i + 1] += high;
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const uint32_t stored = pack(T{}, sums[2 * i], sums[2 * i + 1]);
      store_shared_pair(place(i / 2, i % 2), stored);
      unpack(T{}, stored, sums[2 * i], sums[2 * i + 1]);  // for the statistics
    }

    // Store.
    async_fence();
    named_barrier(1 + group, 128);  // all of this warpgroup's y is there
    if (thread == 0) {
      for (int i = 0; i < kColumns / 64; ++i) {
        tile_store(p.y, part_row, first_column + 64 * i, y_part + i * Shared::box);
      }
      store_commit();
    }
    if (c.y_stats) store_stats<kColumns>(c, sums, row0, first_column, lane);
  }
  if (thread == 0) store_wait_read<0>();  // shared memory outlives the stores
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kLinearThreads, 1) linear_kernel(const __grid_constant__ LinearParams p) {
#ifdef VITFAST_SM_90A
  using Shared = LinearShared<kColumns>;
  const int tile_rows = (p.call.m + kLinearRows - 1) / kLinearRows;
  const int tile_columns = (p.call.n + kColumns - 1) / kColumns;
  const uint32_t shared = (shared_begin() + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::stages; ++i) {
      mbarrier_init(shared + Shared::full + 8 * i, 1);
      mbarrier_init(shared + Shared::empty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) mbarrier_init(shared + Shared::residual + 8 * i, 1);
    async_fence();
  }
  block_barrier();  // all know the mbarriers

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kColumns>(p, shared, tile_rows, tile_columns);
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, kColumns>(p, shared, tile_rows, tile_columns, warpgroup - 1);
  }
#else
  __trap();  // the launcher asks for sm_90a
#endif
}

}  // namespace vitfast
