// What the CUDA linear kernel and its launcher share; free of torch and of CUDA headers.
#pragma once

#include <cstdint>

#include "../device/tensor_map.h"

namespace vitfast {

enum class LinearType { bf16, fp16 };
enum class LinearActivation { none, gelu, gelu_tanh, quick_gelu, silu };

constexpr int kLinearRows = 128;        // of a tile of y: 64 for each of two warpgroups
constexpr int kLinearDepth = 64;        // of x and the weight per stage, in two bytes: 128, the swizzle's width
constexpr int kLinearStats = 128;       // columns per pair of row statistics
constexpr int kLinearScales = 128;      // columns per scale of a row, where it has several
constexpr int kLinearCluster = 2;       // blocks that share the weights of a tile column, each with its own tile row
constexpr int kLinearGroup = 4;         // clusters' tiles that are gone down before the next tile column
constexpr int kLinearThreads = 384;     // a producer's and two consumers' warpgroups
constexpr int kLinearMultiple = 8;      // of N and K: rows of a multiple of 16 bytes
constexpr int kQuantizedMultiple = 16;  // the same in e4m3

// Tiles of clusters; of the last tile row the second block's part may lie beyond y.
constexpr int64_t linear_tiles(int64_t m, int64_t n, int columns) {
  constexpr int rows = kLinearCluster * kLinearRows;
  return (m + rows - 1) / rows * ((n + columns - 1) / columns);
}

// Blocks of the grid: whole clusters, as many as `processors` multiprocessors take at a time, or as there are tiles.
constexpr int linear_blocks(int64_t m, int64_t n, int columns, int processors) {
  const int64_t tiles = linear_tiles(m, n, columns), clusters = processors / kLinearCluster;
  return static_cast<int>(kLinearCluster * (tiles < clusters ? tiles : clusters));
}

// Columns of a tile, 256 or 128: what keeps the busiest of `processors` busy for the shorter time. A tile takes as long
// as its operands come from L2, 104 multiply-adds each, or as its products, as pick_config in kernels/linear.py has it;
// the weights come once for a cluster.
constexpr int linear_columns(int64_t m, int64_t n, int processors) {
  const auto price = [=](int columns) {
    const int64_t clusters = linear_blocks(m, n, columns, processors) / kLinearCluster;
    const int64_t rounds = (linear_tiles(m, n, columns) + clusters - 1) / clusters;
    const int64_t products = kLinearRows * columns, operands = 104 * (kLinearRows + columns / kLinearCluster);
    return rounds * (products > operands ? products : operands);
  };
  return price(256) <= price(128) ? 256 : 128;
}

// One product and its epilogue; a null pointer leaves its part out. Strides are in elements.
struct LinearCall {
  const void *x, *weight;               // [M, K], [N, K]
  void* y;                              // [M, N], contiguous
  const void* residual;                 // [M, N]
  const void *bias, *layer_scale;       // [N]
  const float *row_stats, *weight_sum;  // [M, ceil(K / 128), 2] and [N]: LayerNorm of x, folded
  float* y_stats;                       // [M, ceil(N / 128), 2]
  const float *x_scale, *weight_scale;  // x and weight are e4m3: [M, x_groups] and [N]
  float* y_scale;                       // [M, ceil(N / 128)]: y is e4m3
  int64_t x_stride, weight_stride, residual_stride;
  int m, n, k;
  int x_groups;  // 1, or ceil(K / 128)
  LinearActivation activation;
  float eps;
};

struct LinearParams {
  TensorMap x, weight, y, residual;
  LinearCall call;
  int steps;  // of kLinearDepth
};

// The same with the matrices as TMA wants them, for tiles of `columns` columns; `encode` makes a map of a Matrix. Two
// columns of e4m3 are one of a map.
template <typename Encode>
LinearParams linear_params(const LinearCall& call, int columns, Encode encode) {
  LinearParams p{};
  const int share = call.x_scale ? 2 : 1, y_columns = call.n / (call.y_scale ? 2 : 1);
  p.x = encode(Matrix{call.x, call.m, call.k / share, call.x_stride / share, kLinearRows, kLinearDepth});
  p.weight = encode(
      Matrix{call.weight, call.n, call.k / share, call.weight_stride / share, columns / kLinearCluster, kLinearDepth});
  p.y = encode(Matrix{call.y, call.m, y_columns, y_columns, 64, 64});
  if (call.residual) p.residual = encode(Matrix{call.residual, call.m, call.n, call.residual_stride, 64, 64});
  p.call = call;
  p.steps = (call.k / share + kLinearDepth - 1) / kLinearDepth;
  return p;
}

// Starts the kernel on a stream (a cudaStream_t) of a GPU with `processors` multiprocessors; a cudaError_t, 0 if all is
// well. `type` is that of what is not e4m3. M, N and K are at least 1, N and K multiples of 8 (16 where anything is
// e4m3), and all rows aligned to 16 bytes.
int linear_launch(LinearType type, const LinearCall& call, int processors, void* stream);

}  // namespace vitfast
