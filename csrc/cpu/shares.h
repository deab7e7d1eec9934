// How the rows and columns of a product are shared out among threads, and rows among tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace vitfast {

// Rows or columns [begin, end).
struct Share {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Share i of n, as equal as whole steps allow.
inline Share share_of(int64_t size, int64_t step, int64_t i, int64_t n) {
  const int64_t units = (size + step - 1) / step;
  return {std::min(units * i / n * step, size), std::min(units * (i + 1) / n * step, size)};
}

// Tile t of a share of rows: as high as the others, rather than with a few rows in the last.
inline Share tile_of(Share rows, int64_t t, int64_t tiles) {
  return {rows.begin + rows.size() * t / tiles, rows.begin + rows.size() * (t + 1) / tiles};
}

// Whether so few sets of a first cache of 4 KiB a way hold what is at one place of several rows of so many bytes that
// they would throw each other out.
inline bool crowds_cache(int64_t row_bytes) { return 4096 / std::gcd<int64_t>(row_bytes, 4096) < 4; }

// How y [M, N] is shared out among threads: shares of rows times shares of columns, the largest as small as can be. Of
// two such, the one that reads the smaller operand more often. Columns are shared out in chunks.
struct Grid {
  int64_t rows = 1, columns = 1;

  Grid(int64_t m, int64_t n, int64_t chunk, int64_t threads) {
    const auto largest = [&](int64_t r, int64_t c) {
      int64_t most = 0;  // the last chunk may be narrower
      for (int64_t i = 0; i < c; ++i) most = std::max(most, share_of(n, chunk, i, c).size());
      return (m + r - 1) / r * most;
    };
    for (int64_t i = 1; i <= threads; ++i) {
      const int64_t r = m < n ? i : threads / i, c = threads / r;
      if (largest(r, c) < largest(rows, columns)) rows = r, columns = c;
    }
  }
};

}  // namespace vitfast
