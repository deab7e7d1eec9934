#include "narrow_product.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "../guards.h"
#include "memory.h"
#include "shares.h"

namespace vitfast {
namespace {

static_assert(kTileRows <= Ahead::kRun);

constexpr int64_t kBlockBytes = 1 << 18;  // of tiles of x, which stay in cache while the weight goes by

// x [count, bytes] -> words [ceil(bytes / 4), kTileStride], what is beyond the end of a row or of the tile zero.
void pack_tile(const void* x, int64_t bytes, int64_t count, int32_t* words) {
  const int64_t whole = bytes / 4, rest = bytes % 4;
  float* to = reinterpret_cast<float*>(words);  // moved only
  for (int64_t i = 0; i < kTileStride; i += 4) {
    const char* rows[4];
    for (int64_t r = 0; r < 4; ++r) rows[r] = static_cast<const char*>(x) + std::min(i + r, count - 1) * bytes;
    int64_t k = 0;
    for (; k + 4 <= whole; k += 4) {
      Vector<4> square[4];
      for (int r = 0; r < 4; ++r) std::memcpy(&square[r], rows[r] + 4 * k, sizeof(square[r]));
      __builtin_prefetch(rows[k / 4 % 4] + kTileRows * bytes + 4 * (k / 16 * 16), 0, 2);  // of the next tile
      store_transposed(to + k * kTileStride + i, kTileStride, square);
    }
    for (; k < whole; ++k) {
      for (int r = 0; r < 4; ++r) std::memcpy(words + k * kTileStride + i + r, rows[r] + 4 * k, 4);
    }
    if (rest) {
      for (int r = 0; r < 4; ++r) {
        int32_t word = 0;
        std::memcpy(&word, rows[r] + 4 * whole, rest);
        words[whole * kTileStride + i + r] = word;
      }
    }
  }
}

// Rows [count, bytes] of the weight -> panel [ceil(bytes / 4), count] of words, `flip` exclusive-ored to each.
void pack_panel(const char* rows, int64_t bytes, int64_t count, uint32_t flip, char* panel) {
  for (int64_t k = 0; k < bytes; k += 4) {
    for (int64_t i = 0; i < count; ++i, panel += 4) {
      uint32_t word = 0;
      std::memcpy(&word, rows + i * bytes + k, std::min<int64_t>(4, bytes - k));
      word ^= flip;
      std::memcpy(panel, &word, 4);
    }
  }
}

// The panel of a packed weight [N, words] whose first row is `first`; the last one, where it is narrower, in `wide`.
const int32_t* panel_at(const void* packed, int64_t first, int64_t n, int64_t words, const int32_t* wide) {
  return first + kNarrowPanel > n ? wide : static_cast<const int32_t*>(packed) + first * words;
}

// wide [words, kNarrowPanel] = the last panel, if it is narrower, and zeros.
void widen_last_panel(const void* packed, int64_t n, int64_t words, int32_t* wide) {
  const int64_t width = n % kNarrowPanel;
  if (width == 0) return;
  const char* panel = static_cast<const char*>(packed) + (n - width) * words * 4;
  std::fill(wide, wide + words * kNarrowPanel, 0);
  for (int64_t k = 0; k < words; ++k) std::memcpy(wide + k * kNarrowPanel, panel + k * width * 4, width * 4);
}

// Memory of a thread, in words: tiles of x, the sums that each starts with, and the last panel, widened.
struct Layout {
  int64_t tiles, tile, starts, panel, size;

  explicit Layout(const NarrowCall& c) {
    const Size words = Size(c.op, c.words()) * kTileStride;
    tile = words.value();
    tiles = std::max<int64_t>(1, kBlockBytes / 4 / tile);
    starts = (words * tiles).value();
    const Size panel_at = round_up(Size(c.op, starts) + Size(c.op, c.groups() * tiles) * kTileStride, kWide);
    panel = panel_at.value();
    size = (panel_at + Size(c.op, c.words()) * kNarrowPanel).value();
  }
};

// An item of y: a block of tiles of x meets a chunk of columns of the weight.
void compute(const NarrowCall& c, const NarrowSteps& steps, const Layout& l, int32_t* memory,
             const ProductWork::Item& item) {
  const int64_t words = c.words(), groups = c.groups(), up = c.epilogue.up, block = item.tiles.begin;
  const bool packs = !steps.reads_rows || c.row_bytes % 4 || crowds_cache(c.row_bytes);
  int32_t* wide = memory + l.panel;
  if (item.columns.end == c.n) widen_last_panel(c.packed, c.n, words, wide);
  for (int64_t t = block; item.fresh && t < item.tiles.end; ++t) {
    const Share tile = item.blocks.tile(t);
    const char* x = c.x + tile.begin * c.row_bytes;
    if (packs) pack_tile(x, c.row_bytes, tile.size(), memory + (t - block) * l.tile);
    if (steps.start) steps.start(c, x, tile.size(), memory + l.starts + (t - block) * groups * kTileStride);
  }
  alignas(64) float sums[2 * kUpSums];
  const int64_t n = item.columns.begin;
  for (int64_t t = block; t < item.tiles.end; ++t) {
    const Share tile = item.blocks.tile(t);
    const NarrowRows x = packs ? NarrowRows{memory + (t - block) * l.tile, 0}
                               : NarrowRows{reinterpret_cast<const int32_t*>(c.x) + tile.begin * words, words};
    const int32_t* start = memory + l.starts + (t - block) * groups * kTileStride;
    const auto multiply = [&](const int32_t* panel, const Ahead& ahead, float* to_sums) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = g * c.group, to = std::min(from + c.group, words);
        const float* scale = c.x_scale ? c.x_scale + tile.begin * groups + g : nullptr;
        steps.multiply({tile.size(),
                        {x.words + from * (packs ? kTileStride : 1), x.stride},
                        panel + from * kNarrowPanel,
                        to - from,
                        start + g * kTileStride,
                        scale,
                        groups,
                        to_sums},
                       ahead.after(from), g > 0);
      }
    };
    for (int64_t p = n; p < item.columns.end; p += kNarrowPanel) {
      Ahead ahead(c.epilogue, tile.begin, p);
      if (item.fresh && p == n && !packs && !steps.start) {  // what the sums start with has read x
        ahead.and_later(c.x + tile.end * c.row_bytes, kTileRows * 4, words);
      }
      multiply(panel_at(c.packed, p, c.n, words, wide), ahead, sums + (p - n));
      if (up) multiply(panel_at(c.packed, p + up, c.n + up, words, wide), ahead, sums + kUpSums + (p - n));
    }
    steps.finish(c.epilogue, tile.begin, tile.size(), n, sums);
  }
}

}  // namespace

void run_narrow(const NarrowCall& c, const NarrowSteps& steps, int64_t threads) {
  const Layout layout(c);
  ProductWork work(Grid(c.m, c.n, kNarrowChunk, threads), kTileRows, layout.tiles);
  work.run([&] {
    auto* memory = static_cast<int32_t*>(Scratch::of((Size(c.op, layout.size) * sizeof(int32_t)).value()));
    return [&, memory](const ProductWork::Item& item) { compute(c, steps, layout, memory, item); };
  });
}

void pack_narrow(const char* rows, int64_t n, int64_t row_bytes, uint32_t flip, char* packed) {
  const int64_t padded = (row_bytes + 3) / 4 * 4;
  at::parallel_for(0, (n + kNarrowPanel - 1) / kNarrowPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kNarrowPanel; i < std::min(end * kNarrowPanel, n); i += kNarrowPanel) {
      pack_panel(rows + i * row_bytes, row_bytes, std::min(kNarrowPanel, n - i), flip, packed + i * padded);
    }
  });
}

}  // namespace vitfast
