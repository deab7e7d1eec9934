// The product of linear in fp32 on the CPU.
//
// The weight comes packed (pack_panels): cut into panels of kPanel rows, each transposed, so that the product reads it
// in the order in which it lies in memory. A thread takes a share of y, one block of rows after another: it sums the
// products of kDepth columns of x in registers, and those sums in memory that stays in cache. The epilogue is applied
// to each tile that is finished, on its way to y. Rows of x are read where they lie, but where they would throw each
// other out of the first cache: such are packed in tiles, once for each block. Bound by FLOPs.
//
// The two levels of sums serve accuracy as much as the cache: a product passes through at most
// kDepth + K / kDepth additions instead of K, which leaves half the error of rounding at K = 768 and a quarter at 3072
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

constexpr int64_t kPanel = 32;  // rows of the weight, columns of y, per panel
constexpr int64_t kPanelLines = kPanel * sizeof(float) / kLine;
constexpr int64_t kDepth = 192;        // columns of x per sum in registers; up to half as many more where that is all
constexpr int64_t kSpan = 4 * kDepth;  // columns of x for which a tile of sums stays in the first cache
constexpr int kTileRowsStandard = 4, kTileRowsAvx2 = 6, kTileRowsAvx512 = 12;  // of sums in registers
constexpr int64_t kMostTileRows = kTileRowsAvx512;
constexpr int64_t kRows = 96;  // rows per block: kSpan columns of x, and a panel, fill half of the second cache

struct Call {
  int64_t m, k;
  const float* x;       // [M, K]
  const float* packed;  // panel p begins at p * kPanel * K and is [K, width], width = kPanel but for the last
  TileEpilogue epilogue;

  int64_t parts() const { return epilogue.up ? 2 : 1; }  // gate and up projection
  int64_t tile_sums() const { return epilogue.up ? 2 * kUpSums : kMostTileRows * kNarrowChunk; }
  int64_t spans() const { return (k + kSpan - 1) / kSpan; }
  int64_t depth(int64_t from, int64_t to) const { return k <= kDepth + kDepth / 2 ? k : std::min(kDepth, to - from); }
  // Panels that a tile of x meets before the next one does: as many as are no longer than one of kSpan columns.
  int64_t pass_panels() const { return std::max<int64_t>(1, kSpan / k); }
  bool packs() const { return crowds_cache(k * static_cast<int64_t>(sizeof(float))); }
};

// The memory of a thread.
struct Memory {
  float* sums;   // of a block's tiles, as finish_row wants them
  float* panel;  // the last panel, widened with zeros: [kSpan, kPanel]
  // A block of x, where it is packed: kDepth columns after kDepth columns, and of these tile after tile, so that what
  // is read for a tile of sums lies together in the order in which it is read, [kDepth, rows of a tile].
  float* x;

  // tile_rows: of a tile of sums at this level.
  Memory(const Call& c, int64_t tile_rows) {
    const int64_t tiles = std::min(c.m, kRows) / tile_rows + 1;
    const Size panel_at = Size(kOp, c.tile_sums()) * tiles, x_at = panel_at + kSpan * kPanel;
    const Size size = c.packs() ? round_up(Size(kOp, c.k), kDepth) * (tiles * tile_rows) + x_at : x_at;
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
      __builtin_prefetch(row[k / 4 % 4] + rows * stride + k / 16 * 16, 0, 2);  // of the next tile
      store_transposed(tile + k * rows + i, rows, square);
    }
    for (; k < depth; ++k) {
      for (int r = 0; r < 4; ++r) tile[k * rows + i + r] = row[r][k];
    }
  }
}

// A packed tile of x [depth, rows]; other rows come by FromRows.
template <int rows>
struct FromPacked {
  const float* x;
  VITFAST_INLINE float at(int i) const { return x[i]; }
  VITFAST_INLINE void next() { x += rows; }
};

// sums [rows, vectors * lanes of kNarrowChunk] (+)= x [rows, depth] panel [depth, vectors * lanes of kPanel].
template <int lanes, int rows, int vectors, typename From>
VITFAST_INLINE void multiply(From x, const float* panel, int64_t depth, const Ahead& ahead, bool first, float* sums) {
  Vector<lanes> sum[rows][vectors] = {};
  constexpr int64_t kAhead = 24;
  const auto step = [&]() VITFAST_INLINE_LAMBDA {
    __builtin_prefetch(panel + kAhead * kPanel);
    __builtin_prefetch(panel + kAhead * kPanel + 16);
    Vector<lanes> column[vectors];
    for (int j = 0; j < vectors; ++j) column[j] = load<lanes>(panel + j * lanes);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) sum[i][j] += x.at(i) * column[j];
    }
    x.next(), panel += kPanel;
  };
  run_asking(ahead, depth, step);
  for (int i = 0; i < rows; ++i, sums += kNarrowChunk) {
    for (int j = 0; j < vectors; ++j) {
      store<lanes>(sums + j * lanes, first ? sum[i][j] : load<lanes>(sums + j * lanes) + sum[i][j]);
    }
  }
}

// The same for `count` rows, 1 .. rows.
template <int lanes, int rows, int vectors, typename From>
VITFAST_INLINE void multiply_rows(int64_t count, const From& x, const float* panel, int64_t depth, const Ahead& ahead,
                                  bool first, float* sums) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<lanes, rows - 1, vectors>(count, x, panel, depth, ahead, first, sums);
  }
  multiply<lanes, rows, vectors>(x, panel, depth, ahead, first, sums);
}

// sums [count, kPanel of kNarrowChunk] (+)= columns of_x of a tile of x times a panel. x_at: column -> where it is
// read.
template <int lanes, int rows, int vectors, typename At>
VITFAST_INLINE void multiply_panel(const Call& c, Share of_x, int64_t count, const At& x_at, const float* panel,
                                   const Ahead& ahead, float* sums) {
  for (int64_t j = 0; j < kPanel; j += vectors * lanes) {
    for (int64_t k = of_x.begin, depth; k < of_x.end; k += depth) {
      depth = c.depth(k, of_x.end);
      const int64_t steps = k - of_x.begin;
      multiply_rows<lanes, rows, vectors>(count, x_at(k), panel + steps * kPanel + j, depth, ahead.after(steps), k == 0,
                                          sums + j);
    }
  }
}

// panel [kSpan, kPanel] = columns of_x of the last panel, which is narrower, and zeros.
VITFAST_INLINE void widen_last_panel(const Call& c, Share of_x, float* panel) {
  const int64_t width = c.epilogue.n % kPanel;
  const float* from = c.packed + (c.epilogue.n - width) * c.k + of_x.begin * width;
  std::fill(panel, panel + kSpan * kPanel, 0.0f);
  for (int64_t k = 0; k < of_x.size(); ++k) std::copy_n(from + k * width, width, panel + k * kPanel);
}

using Item = ProductWork::Item;

// An item of y. rows, vectors: how many fit in the registers at a width of `lanes`.
template <Simd level, int lanes, int rows, int vectors>
VITFAST_INLINE void compute(const Call& c, const Memory& memory, const Item& item) {
  static_assert(kPanel % (vectors * lanes) == 0 && rows <= kMostTileRows && kMostTileRows <= Ahead::kRun);
  const TileEpilogue& e = c.epilogue;
  const int64_t n = item.columns.begin, count = item.tiles.size(), spans = c.spans();
  const bool packs = c.packs();
  const auto tile_at = [&](int64_t t) VITFAST_INLINE_LAMBDA { return item.blocks.tile(item.tiles.begin + t); };
  for (int64_t k = 0; packs && item.fresh && k < c.k; k += kDepth) {
    for (int64_t t = 0; t < count; ++t) {
      const Share tile = tile_at(t);
      pack_tile<rows>(c.x + tile.begin * c.k + k, c.k, tile.size(), std::min(kDepth, c.k - k),
                      memory.x + (k * count + t * kDepth) * rows);
    }
  }
  const int64_t panels = (item.columns.size() + kPanel - 1) / kPanel, all = c.parts() * panels;
  for (int64_t span = 0; span < spans; ++span) {
    const Share of_x = share_of(c.k, kDepth, span, spans);
    if (item.columns.end == e.n && e.n % kPanel) widen_last_panel(c, of_x, memory.panel);
    for (int64_t pass = 0; pass < all; pass += c.pass_panels()) {
      const int64_t pass_end = std::min(pass + c.pass_panels(), all);
      const bool ends = of_x.end == c.k && pass_end == all;
      for (int64_t t = 0; t < count; ++t) {
        const Share tile = tile_at(t);
        float* sums = memory.sums + t * c.tile_sums();
        for (int64_t p = pass; p < pass_end; ++p) {
          const int64_t part = p / panels, column = p % panels * kPanel, first = n + column;
          const float* panel =
              first + kPanel > e.n ? memory.panel : c.packed + (first + part * e.up) * c.k + of_x.begin * kPanel;
          Ahead ahead = of_x.end == c.k && part == 0 ? Ahead(e, tile.begin, first) : Ahead(panel);
          if (item.fresh && p == 0 && !packs) {  // x of the next tile
            ahead.and_later(c.x + tile.end * c.k + of_x.begin * rows, rows * static_cast<int64_t>(sizeof(float)),
                            of_x.size());
          } else {  // the panel that comes after this pass: each tile its part
            const int64_t lines = (of_x.size() * kPanelLines + count - 1) / count;
            ahead.and_later(panel + c.pass_panels() * kPanel * c.k + t * lines * (kPanel / kPanelLines), kLine, lines);
          }
          const auto multiply = [&](const auto& x_at) VITFAST_INLINE_LAMBDA {
            multiply_panel<lanes, rows, vectors>(c, of_x, tile.size(), x_at, panel, ahead,
                                                 sums + part * kUpSums + column);
          };
          if (packs) {
            multiply([&](int64_t k) VITFAST_INLINE_LAMBDA {
              return FromPacked<rows>{memory.x + (k * count + t * kDepth) * rows};
            });
          } else {
            multiply([&](int64_t k)
                         VITFAST_INLINE_LAMBDA { return FromRows<float, rows>(c.x + tile.begin * c.k + k, c.k); });
          }
        }
        if (ends) finish_rows<float, level>(e, tile.begin, tile.size(), n, sums);
      }
    }
  }
}

// For a level: how an item is computed, and how many rows its tiles have.
struct Kernel {
  void (*compute)(const Call&, const Memory&, const Item&);
  int64_t rows;
};

void compute_standard(const Call& c, const Memory& memory, const Item& item) {
  compute<Simd::standard, 4, kTileRowsStandard, 2>(c, memory, item);
}

#ifdef VITFAST_SIMD_LEVELS
VITFAST_TARGET("avx2,fma")
void compute_avx2(const Call& c, const Memory& memory, const Item& item) {
  compute<Simd::avx2, 8, kTileRowsAvx2, 2>(c, memory, item);
}

VITFAST_TARGET("avx512f,avx512bw,avx512vl")
void compute_avx512(const Call& c, const Memory& memory, const Item& item) {
  compute<Simd::avx512, 16, kTileRowsAvx512, 2>(c, memory, item);
}
#endif

Kernel kernel_here() {
#ifdef VITFAST_SIMD_LEVELS
  if (simd_level() >= Simd::avx512) return {&compute_avx512, kTileRowsAvx512};
  if (simd_level() >= Simd::avx2) return {&compute_avx2, kTileRowsAvx2};
#endif
  return {&compute_standard, kTileRowsStandard};
}

void run(const Call& c, int64_t threads) {
  const Kernel kernel = kernel_here();
  ProductWork work(Grid(c.m, c.epilogue.n, kNarrowChunk, threads), kernel.rows, kRows / kernel.rows);
  work.run([&] {
    const Memory memory(c, kernel.rows);
    return [&c, &kernel, memory](const Item& item) { kernel.compute(c, memory, item); };
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
  TileEpilogue epilogue;
  epilogue.y = y, epilogue.n = packed.size(0);
  run({rows, packed.size(1), x, read<float>(kOp, "weight", packed), epilogue}, 1);
}

void linear_fp32(const at::Tensor& x, int64_t m, const at::Tensor& packed, const TileEpilogue& epilogue) {
  run({m, packed.size(1), read<float>(kOp, "x", x), read<float>(kOp, "weight", packed), epilogue},
      at::get_num_threads());
}

}  // namespace vitfast
