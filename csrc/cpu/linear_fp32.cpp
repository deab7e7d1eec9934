// The product of linear in fp32 on the CPU.
//
// The weight comes packed (pack_panels): cut into panels of kPanel rows, each transposed, so that the product reads it
// in the order in which it lies in memory; and so are tiles of rows of x, once for each block of rows. A thread takes a
// share of y, one block after another: it sums the products of kDepth columns of x in registers, and those sums in a
// block that stays in cache. The epilogue is applied to the finished block on its way to y. Bound by FLOPs.
//
// The two levels of sums serve accuracy as much as the cache: a product passes through at most
// kDepth + K / kDepth additions instead of K, which leaves half the error of rounding or less
// (Higham 1993, "The accuracy of floating point summation").

#include "linear_fp32.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../guards.h"
#include "shares.h"

namespace vitfast {
namespace {

constexpr const char* kOp = "linear";

constexpr int64_t kPanel = 32;                // rows of the weight, columns of y, per panel
constexpr int64_t kDepth = 128;               // columns of x per sum in registers
constexpr int64_t kSpan = 6 * kDepth;         // columns of x for which a tile of sums stays in the first cache
constexpr int64_t kMostTileRows = 12;         // rows of a tile of sums in registers, at the widest level
constexpr int64_t kRows = 216;                // rows of y per block; kStatsTile columns
constexpr int64_t kColumns = 2 * kStatsTile;  // of sums per block: swiglu has as many for the up projection

struct Call {
  int64_t m, n, k;
  const float* x;       // [M, K]
  const float* packed;  // panel p begins at p * kPanel * K and is [K, width], width = kPanel but for the last
  float* y;             // [M, N]
  LinearEpilogue epilogue;
};

// The memory of a thread.
struct Memory {
  alignas(64) float sums[kRows * kColumns];
  alignas(64) float panel[kSpan * kPanel];  // the last panel, widened with zeros
  // A block of x, kDepth columns after kDepth columns, and of these tile after tile: what is read for a tile of sums
  // lies together in the order in which it is read, [kDepth, rows of a tile].
  std::unique_ptr<float[]> x;

  explicit Memory(const Call& c)
      : x(new float[(round_up(Size(kOp, c.k), kDepth) * std::min(c.m + kMostTileRows, kRows)).value()]) {}
};

// x [count, depth of stride] -> tile [depth, rows], what is beyond the last row a copy of it.
template <int rows>
VITFAST_INLINE void pack_tile(const float* x, int64_t stride, int64_t count, int64_t depth, float* tile) {
  for (int64_t first = 0; first < rows; first += 4) {
    const int64_t i = std::min<int64_t>(first, rows - 4);
    const float* row[4];
    for (int r = 0; r < 4; ++r) row[r] = x + std::min(i + r, count - 1) * stride;
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
      Vector<4> square[4];
      for (int r = 0; r < 4; ++r) square[r] = load<4>(row[r] + k);
      store_transposed(tile + k * rows + i, rows, square);
    }
    for (; k < depth; ++k) {
      for (int r = 0; r < 4; ++r) tile[k * rows + i + r] = row[r][k];
    }
  }
}

// sums [rows, vectors * lanes of kColumns] (+)= x [depth, rows of stride]ᵀ panel [depth, vectors * lanes of kPanel].
template <int lanes, int rows, int vectors, int stride>
VITFAST_INLINE void multiply(const float* x, const float* panel, int64_t depth, bool first, float* sums) {
  Vector<lanes> sum[rows][vectors] = {};
  constexpr int64_t kAhead = 8;
  for (int64_t k = 0; k < depth; ++k, x += stride, panel += kPanel) {
    __builtin_prefetch(panel + kAhead * kPanel);
    __builtin_prefetch(panel + kAhead * kPanel + 16);
    Vector<lanes> column[vectors];
    for (int j = 0; j < vectors; ++j) column[j] = load<lanes>(panel + j * lanes);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) sum[i][j] += x[i] * column[j];
    }
  }
  for (int i = 0; i < rows; ++i, sums += kColumns) {
    for (int j = 0; j < vectors; ++j) {
      store<lanes>(sums + j * lanes, first ? sum[i][j] : load<lanes>(sums + j * lanes) + sum[i][j]);
    }
  }
}

// The same for `count` rows, 1 .. rows.
template <int lanes, int rows, int vectors, int stride = rows>
VITFAST_INLINE void multiply_rows(int64_t count, const float* x, const float* panel, int64_t depth, bool first,
                                  float* sums) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<lanes, rows - 1, vectors, stride>(count, x, panel, depth, first, sums);
  }
  multiply<lanes, rows, vectors, stride>(x, panel, depth, first, sums);
}

// Numbers i .. i + lanes of an array of n, `beyond` after its end.
template <int lanes>
VITFAST_INLINE Vector<lanes> load_some(const float* from, int64_t i, int64_t n, float beyond = 0.0f) {
  if (i + lanes <= n) return load<lanes>(from + i);
  float some[lanes];
  std::fill(some, some + lanes, beyond);
  std::copy(from + i, from + n, some);
  return load<lanes>(some);
}

// A vector of row m of the product, its column n the first: sums -> what is activated.
template <int lanes>
VITFAST_INLINE Vector<lanes> finish_product(const Call& c, int64_t m, int64_t n, const float* sums) {
  const LinearEpilogue& e = c.epilogue;
  Vector<lanes> value = load<lanes>(sums);
  if (e.rstd) value = e.rstd[m] * (value - e.mean[m] * load_some<lanes>(e.weight_sum, n, c.n + e.up));
  if (e.bias) value += load_some<lanes>(e.bias, n, c.n + e.up);
  return value;
}

// One row of a block on its way to y: columns [columns.begin, columns.end) of row m.
template <int lanes>
VITFAST_INLINE void finish_row(const Call& c, int64_t m, Share columns, const float* sums) {
  const LinearEpilogue& e = c.epilogue;
  for (int64_t n = columns.begin; n < columns.end; n += lanes) {
    const float* mine = sums + (n - columns.begin);
    Vector<lanes> value = finish_product<lanes>(c, m, n, mine);
    if (e.up) {
      value = gated<lanes>(value, finish_product<lanes>(c, m, n + e.up, mine + kColumns / 2));
    } else {
      value = activate<lanes>(e.activation, value);
    }
    if (e.layer_scale) value *= load_some<lanes>(e.layer_scale, n, c.n);
    if (e.residual) value += load_some<lanes>(e.residual + m * c.n, n, c.n);
    float* to = c.y + m * c.n + n;
    if (n + lanes <= columns.end) {
      store<lanes>(to, value);
    } else {
      float some[lanes];
      store<lanes>(some, value);
      std::copy(some, some + (columns.end - n), to);
    }
  }
}

// (mean, sum of squared deviations) of each tile of a row of y.
template <int lanes>
VITFAST_INLINE void write_stats(const Call& c, int64_t m, Share columns) {
  const int64_t tiles = (c.n + kStatsTile - 1) / kStatsTile;
  for (int64_t n = columns.begin; n < columns.end; n += kStatsTile) {
    const int64_t width = std::min(kStatsTile, columns.end - n);
    const float* row = c.y + m * c.n + n;
    Vector<lanes> total{}, squares{};
    for (int64_t i = 0; i < width; i += lanes) total += load_some<lanes>(row, i, width);
    const float mean = sum<lanes>(total) / static_cast<float>(width);
    for (int64_t i = 0; i < width; i += lanes) {
      const Vector<lanes> distance = load_some<lanes>(row, i, width, mean) - mean;
      squares += distance * distance;
    }
    float* stats = c.epilogue.stats + (m * tiles + n / kStatsTile) * 2;
    stats[0] = mean;
    stats[1] = sum<lanes>(squares);
  }
}

// Asks for a panel's columns of the rows of y and of residual, which the epilogue will want.
VITFAST_INLINE void prefetch_outputs(const Call& c, Share rows, int64_t first) {
  constexpr int64_t kLine = 16;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t at = m * c.n + first;
    for (int64_t i = 0; i < kPanel; i += kLine) {
      __builtin_prefetch(c.y + at + i, 1);
      if (c.epilogue.residual) __builtin_prefetch(c.epilogue.residual + at + i);
    }
  }
}

// Rows x columns of y, block by block. rows_, vectors: how many fit in the registers at a width of `lanes`.
template <int lanes, int rows_, int vectors>
VITFAST_INLINE void compute(const Call& c, Share rows, Share columns, Memory& memory) {
  constexpr int64_t kTiles = kRows / rows_;
  const int64_t tiles = (rows.size() + rows_ - 1) / rows_, blocks = (tiles + kTiles - 1) / kTiles;
  const int64_t spans = (c.k + kSpan - 1) / kSpan;
  const int64_t parts = c.epilogue.up ? 2 : 1;  // gate and up projection have half of a block's sums each
  for (int64_t b = 0; b < blocks; ++b) {
    // As many tiles in each block, rather than a few in the last, for which the weight would be read again.
    const int64_t first_tile = tiles * b / blocks, count = tiles * (b + 1) / blocks - first_tile;
    Share tile[kTiles] = {};
    for (int64_t t = 0; t < count; ++t) tile[t] = tile_of(rows, first_tile + t, tiles);
    const int64_t m = tile[0].begin, m_end = tile[count - 1].end;
    float* x = memory.x.get();
    for (int64_t k = 0; k < c.k; k += kDepth) {
      for (int64_t t = 0; t < count; ++t) {
        pack_tile<rows_>(c.x + tile[t].begin * c.k + k, c.k, tile[t].size(), std::min(kDepth, c.k - k),
                         x + (k * count + t * kDepth) * rows_);
      }
    }
    for (int64_t n = columns.begin; n < columns.end; n += kStatsTile) {
      const Share block{n, std::min(n + kStatsTile, columns.end)};
      for (int64_t span = 0; span < spans; ++span) {
        const Share columns_of_x = share_of(c.k, kDepth, span, spans);
        const int64_t from = columns_of_x.begin, to = columns_of_x.end;
        for (int64_t i = 0; i < parts * block.size(); i += kPanel) {
          const int64_t part = i >= block.size(), column = i - part * block.size();
          const int64_t first = block.begin + column, width = std::min(kPanel, c.n - first);
          const float* panel = c.packed + (first + part * c.epilogue.up) * c.k + from * width;
          float* sums = memory.sums + part * (kColumns / 2) + column;
          if (width < kPanel) {
            std::fill(memory.panel, memory.panel + kSpan * kPanel, 0.0f);
            for (int64_t j = 0; j < to - from; ++j) std::copy_n(panel + j * width, width, memory.panel + j * kPanel);
            panel = memory.panel;
          }
          for (int64_t t = 0; t < count; ++t) {
            if (to == c.k && part == 0) prefetch_outputs(c, tile[t], first);
            for (int64_t j = 0; j < width; j += vectors * lanes) {
              for (int64_t k = from; k < to; k += kDepth) {
                multiply_rows<lanes, rows_, vectors>(tile[t].size(), x + (k * count + t * kDepth) * rows_,
                                                     panel + (k - from) * kPanel + j, std::min(kDepth, to - k), k == 0,
                                                     sums + (tile[t].begin - m) * kColumns + j);
              }
            }
          }
        }
      }
      for (int64_t i = m; i < m_end; ++i) {
        finish_row<lanes>(c, i, block, memory.sums + (i - m) * kColumns);
        if (c.epilogue.stats) write_stats<lanes>(c, i, block);
      }
    }
  }
}

using Compute = void (*)(const Call&, Share, Share, Memory&);

void compute_standard(const Call& c, Share rows, Share columns, Memory& memory) {
  compute<4, 4, 2>(c, rows, columns, memory);
}

#ifdef VITFAST_SIMD_LEVELS
VITFAST_TARGET("avx2,fma")
void compute_avx2(const Call& c, Share rows, Share columns, Memory& memory) {
  compute<8, 6, 2>(c, rows, columns, memory);
}

VITFAST_TARGET("avx512f")
void compute_avx512(const Call& c, Share rows, Share columns, Memory& memory) {
  compute<16, 12, 2>(c, rows, columns, memory);
}
#endif

Compute compute_here() {
#ifdef VITFAST_SIMD_LEVELS
  if (simd_level() >= Simd::avx512) return &compute_avx512;
  if (simd_level() >= Simd::avx2) return &compute_avx2;
#endif
  return &compute_standard;
}

void run(const Call& c) {
  const Compute compute = compute_here();
  const Grid grid(c.m, c.n, kStatsTile, at::get_num_threads());
  at::parallel_for(0, grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Memory> memory(new Memory(c));
    for (int64_t i = begin; i < end; ++i) {
      compute(c, share_of(c.m, 1, i / grid.columns, grid.rows),
              share_of(c.n, kStatsTile, i % grid.columns, grid.columns), *memory);
    }
  });
}

// rows [width, K] -> panel [K, width], four by four numbers at a time.
void pack_panel(const float* rows, int64_t k, int64_t width, float* panel) {
  int64_t i = 0;
  for (; i + 4 <= width; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= k; j += 4) {
      Vector<4> square[4];
      for (int r = 0; r < 4; ++r) square[r] = load<4>(rows + (i + r) * k + j);
      store_transposed(panel + j * width + i, width, square);
    }
    for (; j < k; ++j) {
      for (int r = 0; r < 4; ++r) panel[j * width + i + r] = rows[(i + r) * k + j];
    }
  }
  for (; i < width; ++i) {
    for (int64_t j = 0; j < k; ++j) panel[j * width + i] = rows[i * k + j];
  }
}

}  // namespace

void pack_panels(const at::Tensor& weight, float* packed) {
  const int64_t n = weight.size(0), k = weight.size(1);
  if (weight.numel() == 0) return;
  const float* rows = read<float>("pack_linear", "weight", weight);
  at::parallel_for(0, (n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, width = std::min(kPanel, n - first);
      pack_panel(rows + first * k, k, width, packed + first * k);
    }
  });
}

void multiply_packed(const float* x, int64_t rows, const at::Tensor& packed, float* y) {
  const Call call{rows, packed.size(0), packed.size(1), x, read<float>(kOp, "weight", packed), y, {}};
  const std::unique_ptr<Memory> memory(new Memory(call));
  compute_here()(call, {0, call.m}, {0, call.n}, *memory);
}

void linear_fp32(const float* x, int64_t m, const at::Tensor& packed, int64_t n, float* y,
                 const LinearEpilogue& epilogue) {
  run({m, n, packed.size(1), x, read<float>(kOp, "weight", packed), y, epilogue});
}

}  // namespace vitfast
