// linear on sm_90a: y = act(norm(x) W^T + bias) * layer_scale + residual, bf16 and fp16, fp32 inside; and
// quantized_linear, whose x and W are e4m3 with scales, and y too if it is asked for.
//
// Blocks stay, one to a multiprocessor, and go from tile to tile of y [128, kColumns]. In a block one thread, the
// producer, has TMA copy steps of 64 columns of x and W into a ring of stages, and two warpgroups, the consumers,
// multiply them, 64 rows each, with the sums in their registers. A step is 128 bytes of a row, in e4m3 128 columns. A
// stage has two mbarriers: `full` ends a phase when its bytes are there, `empty` when all eight consumer warps are
// through with it. While the consumers are in their epilogue the producer fills the ring for the next tile. Tiles that
// reach beyond y cost nothing in code: TMA loads zeros there and stores nothing.
//
// Two blocks are a cluster: their tiles lie one below the other and have the same weights, of which each block copies
// half, for both. L2 gives a third less so, and at its rate products of [128, 256] no longer wait for it. A stage is
// then written by both blocks: it is empty when the consumers of both are through with it. With an odd number of tile
// rows the last one's second block multiplies zeros.
//
// The epilogue (linear_epilogue.cuh) works on the sums where they are. y goes through shared memory, in which the
// residual has meanwhile arrived at the very places where y will be. Bound by the products at ViT widths.
//
// Sources: the roles of warps and the ring are CUTLASS's (media/docs/cpp/efficient_gemm.md, "Hopper Warp
// Specialization"); fp8 sums moved to fp32 at every step, with the scales of x, are DeepGEMM's.
#pragma once

#include "../device/hopper.cuh"
#include "linear.h"
#include "linear_epilogue.cuh"

namespace vitfast {

constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // (24 + 2 * 240) * 128 of 64 Ki
constexpr int kConsumerWarps = 8;
constexpr uint16_t kWholeCluster = (1 << kLinearCluster) - 1;

// Where things lie in shared memory, in bytes from a multiple of 1024. Boxes have rows of 128 bytes, swizzled.
template <int kColumns>
struct LinearShared {
  static constexpr int stages = kColumns == 256 ? 3 : 6;
  static constexpr int x = 0, weight = kLinearRows * 128;  // in a stage
  static constexpr int stage = weight + kColumns * 128;
  static constexpr int box = 64 * 128;  // of a warpgroup's rows of y: 64 columns, 128 in e4m3
  static constexpr int y = stages * stage, y_part = kColumns / 64 * box;  // a part for each warpgroup
  static constexpr int full = y + 2 * y_part, empty = full + 8 * stages, residual = empty + 8 * stages;
  static constexpr int end = residual + 8 * 2;
  static constexpr int bytes = end + 1024;  // dynamic shared memory may begin anywhere
  static_assert(bytes <= 232448, "more shared memory than a block can have");
};

// Number of a cluster's tile -> the tile row and column of this block's part: down a group of rows first, so that tiles
// that run together share operands in L2.
VITFAST_DEVICE void tile_origin(int tile, int tile_rows, int tile_columns, int& row, int& column) {
  const int first = tile / (kLinearGroup * tile_columns) * kLinearGroup;
  const int rows = tile_rows - first < kLinearGroup ? tile_rows - first : kLinearGroup;
  const int within = tile % (kLinearGroup * tile_columns);
  row = kLinearCluster * (first + within % rows) + blockIdx.x % kLinearCluster;
  column = within / rows;
}

// Copies, step by step, what the consumers will multiply: x for this block, and a part of the weights for the cluster.
template <int kColumns>
VITFAST_DEVICE void produce(const LinearParams& p, uint32_t shared, int tile_rows, int tile_columns) {
  using Shared = LinearShared<kColumns>;
  constexpr int part = kColumns / kLinearCluster;
  const int first_row = blockIdx.x % kLinearCluster * part;  // of the weights, in a tile
  Ring<Shared::stages> ring;
  for (int tile = blockIdx.x / kLinearCluster; tile < tile_rows * tile_columns; tile += grid_size() / kLinearCluster) {
    int tile_row, tile_column;
    tile_origin(tile, tile_rows, tile_columns, tile_row, tile_column);
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      const uint32_t stage = shared + ring.stage * Shared::stage, full = shared + Shared::full + 8 * ring.stage;
      mbarrier_wait(shared + Shared::empty + 8 * ring.stage, ring.parity ^ 1);  // at first they are: no wait
      mbarrier_arrive_expect(full, Shared::stage);  // what the other block copies here may have come already
      tile_load(stage + Shared::x, p.x, tile_row * kLinearRows, step * kLinearDepth, full);
      tile_load_multicast(stage + Shared::weight + first_row * 128, p.weight, tile_column * kColumns + first_row,
                          step * kLinearDepth, full, kWholeCluster);
    }
  }
}

// Tells the producers of all blocks of the cluster that this warp is through with a stage: a lane for each of them.
class Release {
 public:
  VITFAST_DEVICE explicit Release(uint32_t empty)
      : here_(threadIdx.x % 32 < kLinearCluster), empty_(address_in_cluster(empty, threadIdx.x % kLinearCluster)) {}
  VITFAST_DEVICE void operator()(int stage) const {
    if (here_) mbarrier_arrive_in_cluster(empty_ + 8 * stage);
  }

 private:
  bool here_;
  uint32_t empty_;
};

// sums = this warpgroup's rows of x times the tile's columns of W^T. One step's products are under way while the next
// one's are begun; then its stage is given back. `meanwhile` is done under the first step's.
template <typename T, int kColumns, typename F>
VITFAST_DEVICE void multiply(float (&sums)[kColumns / 2], const LinearParams& p, uint32_t shared,
                             Ring<LinearShared<kColumns>::stages>& ring, int group, F meanwhile) {
  using Shared = LinearShared<kColumns>;
  const auto begin = [&](bool first) {
    const uint32_t stage = shared + ring.stage * Shared::stage;
    const uint32_t x = stage + Shared::x + group * 64 * 128, weight = stage + Shared::weight;
    mbarrier_wait(shared + Shared::full + 8 * ring.stage, ring.parity);
    product_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply_add_async(T{}, sums, operand(x + 32 * i), operand(weight + 32 * i), i > 0 || !first);
    }
    product_commit();
    const int begun = ring.stage;
    ring.next();
    return begun;
  };
  const Release release(shared + Shared::empty);
  int last = begin(true);
  meanwhile();
  for (int step = 1; step < p.steps; ++step) {
    const int begun = begin(false);
    product_wait<1>();
    release(last);
    last = begun;
  }
  product_wait<0>();
  release(last);
}

// The same of e4m3, of which the tensor cores keep 14 bits of a sum: those of a step, 128 columns, are added up in fp32
// and scaled there. Meanwhile the other warpgroup multiplies. `row`: the first of this lane's two.
template <int kColumns>
VITFAST_DEVICE void multiply_scaled(float (&sums)[kColumns / 2], const LinearParams& p, const LinearCall& c,
                                    uint32_t shared, Ring<LinearShared<kColumns>::stages>& ring, int group, int row) {
  using Shared = LinearShared<kColumns>;
  const auto scales_of = [&c](int row) {
    return c.x_scale + static_cast<int64_t>(row < c.m ? row : c.m - 1) * c.x_groups;
  };
  const float *scale0 = scales_of(row), *scale1 = scales_of(row + 8);
  const int next = c.x_groups > 1;  // else the row has one scale
  const Release release(shared + Shared::empty);
  float part[64];  // of 128 columns of y
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sums[i] = 0.0f;
  for (int step = 0; step < p.steps; ++step, ring.next()) {
    const uint32_t stage = shared + ring.stage * Shared::stage;
    const uint32_t x = stage + Shared::x + group * 64 * 128, weight = stage + Shared::weight;
    const float by0 = load_float(scale0 + step * next), by1 = load_float(scale1 + step * next);
    mbarrier_wait(shared + Shared::full + 8 * ring.stage, ring.parity);
#pragma unroll
    for (int half = 0; half < kColumns / 128; ++half) {
      product_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        multiply_add_async(e4m3{}, part, operand(x + 32 * i), operand(weight + half * 128 * 128 + 32 * i), i > 0);
      }
      product_commit();
      product_wait<0>();
      if (half + 1 == kColumns / 128) release(ring.stage);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float *s = sums + 64 * half + 4 * j, *q = part + 4 * j;
        s[0] += by0 * q[0], s[1] += by0 * q[1], s[2] += by1 * q[2], s[3] += by1 * q[3];
      }
    }
  }
}

// `group`: the consumer warpgroup, 0 or 1, of rows 64 group .. 64 group + 63 of each tile. X: of x and W, T: of the
// rest.
template <typename X, typename T, int kColumns>
VITFAST_DEVICE void consume(const LinearParams& p, const LinearCall& c, uint32_t shared, int tile_rows,
                            int tile_columns, int group) {
  using Shared = LinearShared<kColumns>;
  constexpr bool scaled = sizeof(X) == 1;       // x and W have scales
  const bool requantize = scaled && c.y_scale;  // y has
  const bool whole = c.n % kColumns == 0;       // no tile goes beyond y's columns
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, pair = 2 * (lane % 4);
  const int row_in_part = 16 * warp + lane / 4;  // and eight below: the rows of which this lane has sums
  const uint32_t y_part = shared + Shared::y + group * Shared::y_part, residual = shared + Shared::residual + 8 * group;
  Ring<Shared::stages> ring;
  int residual_parity = 0;

  for (int tile = blockIdx.x / kLinearCluster; tile < tile_rows * tile_columns;
       tile += grid_size() / kLinearCluster, residual_parity ^= 1) {
    // Locate.
    int tile_row, tile_column;
    tile_origin(tile, tile_rows, tile_columns, tile_row, tile_column);
    const int part_row = tile_row * kLinearRows + 64 * group, first_column = tile_column * kColumns;
    const int row0 = part_row + row_in_part, row1 = row0 + 8;

    // Load the residual.
    if (thread == 0) {
      store_wait_read<0>();  // the last tile's y has left: its place is free
      if (c.residual) {
        mbarrier_arrive_expect(residual, Shared::y_part);
        for (int i = 0; i < kColumns / 64; ++i) {
          tile_load(y_part + i * Shared::box, p.residual, part_row, first_column + 64 * i, residual);
        }
      }
    }

    // Multiply.
    float sums[kColumns / 2], mean0 = 0.0f, rstd0 = 1.0f, mean1 = 0.0f, rstd1 = 1.0f;
    if constexpr (scaled) {
      multiply_scaled<kColumns>(sums, p, c, shared, ring, group, row0);
    } else {
      multiply<T, kColumns>(sums, p, shared, ring, group, [&] {
        if (!c.row_stats) return;
        combine_stats(c, row0 < c.m ? row0 : c.m - 1, lane % 4, mean0, rstd0);
        combine_stats(c, row1 < c.m ? row1 : c.m - 1, lane % 4, mean1, rstd1);
      });
    }

    // Epilogue. sums[4 j .. 4 j + 3] are columns 8 j + pair and the next of row0, then of row1.
    const int column = first_column + pair;
    if (scaled) rescale(sums, c.weight_scale, column, c.n, whole);
    if (!scaled && c.row_stats) {
      fold_norm<T>(sums, c, column, whole, mean0, rstd0, mean1, rstd1);
    } else if (c.bias) {
      combine<T>(sums, c.bias, column, c.n, whole, [](float s, float bias) { return s + bias; });
    }
    activate<scaled>(sums, c.activation);  // y in e4m3 with its scales tells more than 16 bits do
    if (c.layer_scale) {
      combine<T>(sums, c.layer_scale, column, c.n, whole, [](float s, float scale) { return s * scale; });
    }
    named_barrier(1 + group, 128);  // thread 0 knows that y's place is free; now all do
    // swizzle() of a place: rows 8 apart have the same, and chunks of a row differ in bits of it alone.
    const uint32_t begin = swizzle(y_part + row_in_part * 128) + 2 * pair;
    const auto place = [=](int j, int half) {
      return (begin ^ j % 8 * 16) + static_cast<uint32_t>(j / 8 * Shared::box + half * 8 * 128);
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
    if (requantize) {
      to_e4m3<kColumns>(c, sums, row0, first_column, lane);
      if (c.residual) named_barrier(1 + group, 128);  // all have read it: y's bytes lie elsewhere
      store_e4m3<kColumns>(sums, y_part, Shared::box, row_in_part, lane);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) {
        const uint32_t stored = pack(T{}, sums[2 * i], sums[2 * i + 1]);
        store_shared_pair(place(i / 2, i % 2), stored);
        unpack(T{}, stored, sums[2 * i], sums[2 * i + 1]);  // for the statistics
      }
    }

    // Store.
    async_fence();
    named_barrier(1 + group, 128);  // all of this warpgroup's y is there
    if (thread == 0) {
      const int share = requantize ? 2 : 1;  // columns of y in one of its map
      for (int i = 0; i < kColumns / 64 / share; ++i) {
        tile_store(p.y, part_row, first_column / share + 64 * i, y_part + i * Shared::box);
      }
      store_commit();
    }
    if (!scaled && c.y_stats) store_stats<kColumns>(c, sums, row0, first_column, lane);
  }
  if (thread == 0) store_wait_read<0>();  // shared memory outlives the stores
}

// All of a block. `c` is p.call, or what is known of it when this is compiled (vitfast/diagnostics/native_code.py).
template <typename X, typename T, int kColumns>
VITFAST_DEVICE void linear_block(const LinearParams& p, const LinearCall& c) {
  using Shared = LinearShared<kColumns>;
  const int tile_rows = (c.m + kLinearCluster * kLinearRows - 1) / (kLinearCluster * kLinearRows);
  const int tile_columns = (c.n + kColumns - 1) / kColumns;
  const uint32_t shared = (shared_begin() + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::stages; ++i) {
      mbarrier_init(shared + Shared::full + 8 * i, 1);
      mbarrier_init(shared + Shared::empty + 8 * i, kConsumerWarps * kLinearCluster);
    }
    for (int i = 0; i < 2; ++i) mbarrier_init(shared + Shared::residual + 8 * i, 1);
    async_fence();
  }
  cluster_barrier();  // all know the mbarriers

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kColumns>(p, shared, tile_rows, tile_columns);
  } else {
    take_registers<kConsumerRegisters>();
    consume<X, T, kColumns>(p, c, shared, tile_rows, tile_columns, warpgroup - 1);
  }
  cluster_barrier();  // shared memory outlives the other block's arrivals
}

template <typename X, typename T, int kColumns>
__global__ void VITFAST_CLUSTER(kLinearCluster) __launch_bounds__(kLinearThreads, 1)
    linear_kernel(const __grid_constant__ LinearParams p) {
#ifdef VITFAST_SM_90A
  linear_block<X, T, kColumns>(p, p.call);
#else
  __trap();  // the launcher asks for sm_90a
#endif
}

}  // namespace vitfast
