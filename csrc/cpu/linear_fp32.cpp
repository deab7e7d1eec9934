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

#include "../guards.h"
#include "memory.h"
#include "shares.h"

namespace vitfast {
namespace {

constexpr const char* kOp = "linear";

constexpr int64_t kPanel = 32;         // rows of the weight, columns of y, per panel
constexpr int64_t kDepth = 128;        // columns of x per sum in registers; up to half as many more where that is all
constexpr int64_t kSpan = 6 * kDepth;  // columns of x for which a tile of sums stays in the first cache
constexpr int64_t kMostTileRows = 12;  // rows of a tile of sums in registers, at the widest level
constexpr int64_t kMostRows = 216;     // rows of y per block
constexpr int64_t kBlockBytes = 3 << 18;  // of x and of a chunk of the weight, which stay in the second cache

struct Call {
  int64_t m, n, k;
  const float* x;       // [M, K]
  const float* packed;  // panel p begins at p * kPanel * K and is [K, width], width = kPanel but for the last
  float* y;             // [M, N]
  LinearEpilogue epilogue;

  int64_t parts() const { return epilogue.up ? 2 : 1; }  // sums of gate and up projection
  int64_t spans() const { return (k + kSpan - 1) / kSpan; }
  int64_t depth(int64_t from, int64_t to) const { return k <= kDepth + kDepth / 2 ? k : std::min(kDepth, to - from); }
  // Rows of y for which a chunk of the weight is read once, from the second cache.
  int64_t block_rows() const {
    const int64_t row = std::min(k, kSpan) * static_cast<int64_t>(sizeof(float));
    return std::clamp<int64_t>(kBlockBytes / row - parts() * kStatsTile, 2 * kMostTileRows, kMostRows);
  }
  // Whether rows of x begin so many bytes apart that few sets of the first cache would hold them all.
  bool packs() const { return k >= 1024 && k % 256 == 0; }
};

// The memory of a thread.
struct Memory {
  float* sums;   // of a block's tiles, of each part: [rows of a tile, kStatsTile]
  float* panel;  // the last panel, widened with zeros: [kSpan, kPanel]
  // A block of x, where it is packed: kDepth columns after kDepth columns, and of these tile after tile, so that what
  // is read for a tile of sums lies together in the order in which it is read, [kDepth, rows of a tile].
  float* x;

  explicit Memory(const Call& c) {
    const int64_t rows = std::min(c.m, c.block_rows()) + kMostTileRows;
    const Size panel_at = Size(kOp, c.parts()) * rows * kStatsTile, x_at = panel_at + kSpan * kPanel;
    const Size size = c.packs() ? round_up(Size(kOp, c.k), kDepth) * rows + x_at : x_at;
    sums = static_cast<float*>(Scratch::of((size * sizeof(float)).value()));
    panel = sums + panel_at.value(), x = sums + x_at.value();
  }
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

// Where a tile of x comes from: a packed one [depth, rows], or rows [rows, stride].
template <int rows>
struct FromTile {
  const float* x;
  VITFAST_INLINE float at(int i) const { return x[i]; }
  VITFAST_INLINE void next() { x += rows; }
};
template <int rows>
struct FromRows {  // three rows for each pointer, which is as many as addresses are made of one and a stride
  const float* x[(rows + 2) / 3];
  int64_t stride;
  FromRows(const float* first, int64_t row_stride) : stride(row_stride) {
    for (int i = 0; i * 3 < rows; ++i) x[i] = first + i * 3 * stride;
  }
  VITFAST_INLINE float at(int i) const { return x[i / 3][i % 3 * stride]; }
  VITFAST_INLINE void next() {
    for (int i = 0; i * 3 < rows; ++i) ++x[i];
  }
};

// sums [rows, vectors * lanes of kStatsTile] (+)= x [rows, depth] panel [depth, vectors * lanes of kPanel].
template <int lanes, int rows, int vectors, typename From>
VITFAST_INLINE void multiply(From x, const float* panel, int64_t depth, bool first, float* sums) {
  Vector<lanes> sum[rows][vectors] = {};
  constexpr int64_t kAhead = 8;
  for (int64_t k = 0; k < depth; ++k, x.next(), panel += kPanel) {
    __builtin_prefetch(panel + kAhead * kPanel);
    __builtin_prefetch(panel + kAhead * kPanel + 16);
    Vector<lanes> column[vectors];
    for (int j = 0; j < vectors; ++j) column[j] = load<lanes>(panel + j * lanes);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) sum[i][j] += x.at(i) * column[j];
    }
  }
  for (int i = 0; i < rows; ++i, sums += kStatsTile) {
    for (int j = 0; j < vectors; ++j) {
      store<lanes>(sums + j * lanes, first ? sum[i][j] : load<lanes>(sums + j * lanes) + sum[i][j]);
    }
  }
}

// The same for `count` rows, 1 .. rows.
template <int lanes, int rows, int vectors, typename From>
VITFAST_INLINE void multiply_rows(int64_t count, const From& x, const float* panel, int64_t depth, bool first,
                                  float* sums) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<lanes, rows - 1, vectors>(count, x, panel, depth, first, sums);
  }
  multiply<lanes, rows, vectors>(x, panel, depth, first, sums);
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

// One row of a tile on its way to y: columns [columns.begin, columns.end) of row m. `up`: sums of the up projection.
template <int lanes>
VITFAST_INLINE void finish_row(const Call& c, int64_t m, Share columns, const float* sums, const float* up) {
  const LinearEpilogue& e = c.epilogue;
  for (int64_t n = columns.begin; n < columns.end; n += lanes) {
    const int64_t i = n - columns.begin;
    Vector<lanes> value = finish_product<lanes>(c, m, n, sums + i);
    if (e.up) {
      value = gated<lanes>(value, finish_product<lanes>(c, m, n + e.up, up + i));
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

// panel [kSpan, kPanel] = columns of_x of the last panel, which is narrower, and zeros.
VITFAST_INLINE void widen_last_panel(const Call& c, Share of_x, float* panel) {
  const int64_t width = c.n % kPanel;
  const float* from = c.packed + (c.n - width) * c.k + of_x.begin * width;
  std::fill(panel, panel + kSpan * kPanel, 0.0f);
  for (int64_t k = 0; k < of_x.size(); ++k) std::copy_n(from + k * width, width, panel + k * kPanel);
}

// Asks for the columns of a tile of y and of residual, which its epilogue will want.
VITFAST_INLINE void prefetch_outputs(const Call& c, Share rows, Share columns) {
  constexpr int64_t kLine = 16;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    for (int64_t n = columns.begin; n < columns.end; n += kLine) {
      __builtin_prefetch(c.y + m * c.n + n, 1);
      if (c.epilogue.residual) __builtin_prefetch(c.epilogue.residual + m * c.n + n);
    }
  }
}

// Rows x columns of y, block by block. rows_, vectors: how many fit in the registers at a width of `lanes`.
template <int lanes, int rows_, int vectors>
VITFAST_INLINE void compute(const Call& c, Share rows, Share columns, const Memory& memory) {
  static_assert(kPanel % (vectors * lanes) == 0 && rows_ <= kMostTileRows);
  const int64_t tiles = (rows.size() + rows_ - 1) / rows_, most = std::max<int64_t>(1, c.block_rows() / rows_);
  const int64_t blocks = (tiles + most - 1) / most, spans = c.spans();
  const bool packs = c.packs();
  for (int64_t b = 0; b < blocks; ++b) {
    // As many tiles in each block, rather than a few in the last, for which the weight would be read again.
    const int64_t first_tile = tiles * b / blocks, count = tiles * (b + 1) / blocks - first_tile;
    const auto tile_at = [&](int64_t t) VITFAST_INLINE_LAMBDA { return tile_of(rows, first_tile + t, tiles); };
    for (int64_t k = 0; packs && k < c.k; k += kDepth) {
      for (int64_t t = 0; t < count; ++t) {
        const Share tile = tile_at(t);
        pack_tile<rows_>(c.x + tile.begin * c.k + k, c.k, tile.size(), std::min(kDepth, c.k - k),
                         memory.x + (k * count + t * kDepth) * rows_);
      }
    }
    for (int64_t n = columns.begin; n < columns.end; n += kStatsTile) {
      const Share block{n, std::min(n + kStatsTile, columns.end)};
      for (int64_t span = 0; span < spans; ++span) {
        const Share of_x = share_of(c.k, kDepth, span, spans);
        if (block.end == c.n && c.n % kPanel) widen_last_panel(c, of_x, memory.panel);
        for (int64_t t = 0; t < count; ++t) {
          const Share tile = tile_at(t);
          float* sums = memory.sums + t * c.parts() * rows_ * kStatsTile;
          const bool last = of_x.end == c.k;
          if (last) prefetch_outputs(c, tile, block);
          for (int64_t part = 0; part < c.parts(); ++part) {
            for (int64_t i = block.begin; i < block.end; i += kPanel) {
              const float* panel = i + kPanel > c.n ? memory.panel
                                                    : c.packed + (i + part * c.epilogue.up) * c.k + of_x.begin * kPanel;
              float* to = sums + part * rows_ * kStatsTile + (i - block.begin);
              for (int64_t j = 0; j < kPanel; j += vectors * lanes) {
                for (int64_t k = of_x.begin, depth; k < of_x.end; k += depth) {
                  depth = c.depth(k, of_x.end);
                  const auto multiply_from = [&](const auto& x) VITFAST_INLINE_LAMBDA {
                    multiply_rows<lanes, rows_, vectors>(tile.size(), x, panel + (k - of_x.begin) * kPanel + j, depth,
                                                         k == 0, to + j);
                  };
                  if (packs) {
                    multiply_from(FromTile<rows_>{memory.x + (k * count + t * kDepth) * rows_});
                  } else {
                    multiply_from(FromRows<rows_>(c.x + tile.begin * c.k + k, c.k));
                  }
                }
              }
            }
          }
          if (!last) continue;
          for (int64_t i = 0; i < tile.size(); ++i) {
            const int64_t soon = std::min(tile.begin + i + 2, tile.end);
            prefetch_outputs(c, {soon, std::min(soon + 1, tile.end)}, block);
            finish_row<lanes>(c, tile.begin + i, block, sums + i * kStatsTile, sums + (rows_ + i) * kStatsTile);
            if (c.epilogue.stats) write_stats<lanes>(c, tile.begin + i, block);
          }
        }
      }
    }
  }
}

using Compute = void (*)(const Call&, Share, Share, const Memory&);

void compute_standard(const Call& c, Share rows, Share columns, const Memory& memory) {
  compute<4, 4, 2>(c, rows, columns, memory);
}

#ifdef VITFAST_SIMD_LEVELS
VITFAST_TARGET("avx2,fma")
void compute_avx2(const Call& c, Share rows, Share columns, const Memory& memory) {
  compute<8, 6, 2>(c, rows, columns, memory);
}

VITFAST_TARGET("avx512f")
void compute_avx512(const Call& c, Share rows, Share columns, const Memory& memory) {
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
    const Memory memory(c);
    for (int64_t i = begin; i < end; ++i) {
      compute(c, share_of(c.m, 1, i / grid.columns, grid.rows),
              share_of(c.n, kStatsTile, i % grid.columns, grid.columns), memory);
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
  compute_here()(call, {0, call.m}, {0, call.n}, Memory(call));
}

void linear_fp32(const float* x, int64_t m, const at::Tensor& packed, int64_t n, float* y,
                 const LinearEpilogue& epilogue) {
  run({m, n, packed.size(1), x, read<float>(kOp, "weight", packed), y, epilogue});
}

}  // namespace vitfast
