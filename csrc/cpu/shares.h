// How the rows and columns of a product are shared out among threads, and rows among tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>

#include "work.h"

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

// Whether so few sets of a first cache of 4 KiB a way hold what is at one place of several rows of so many bytes that
// they would throw each other out.
inline bool crowds_cache(int64_t row_bytes) { return 4096 / std::gcd<int64_t>(row_bytes, 4096) < 4; }

// How y [M, N] is shared out among threads: shares of rows times shares of columns, the largest as small as can be. Of
// two such, the one that reads the smaller operand more often. Columns are shared out in chunks.
struct Grid {
  int64_t m, n, chunk, rows = 1, columns = 1;

  Grid(int64_t m_, int64_t n_, int64_t chunk_, int64_t threads) : m(m_), n(n_), chunk(chunk_) {
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
  int64_t shares() const { return rows * columns; }
  Share rows_of(int64_t share) const { return share_of(m, 1, share / columns, rows); }
  Share columns_of(int64_t share) const { return share_of(n, chunk, share % columns, columns); }
};

// Rows cut into tiles of up to `height`, and those into blocks of up to `most` tiles: as many in each as in the others,
// rather than a few in the last.
struct Blocks {
  Share rows;
  int64_t tiles, count;

  Blocks(Share rows_, int64_t height, int64_t most)
      : rows(rows_), tiles((rows.size() + height - 1) / height), count((tiles + most - 1) / most) {}
  Share tiles_of(int64_t block) const { return {tiles * block / count, tiles * (block + 1) / count}; }
  Share tile(int64_t t) const {
    return {rows.begin + rows.size() * t / tiles, rows.begin + rows.size() * (t + 1) / tiles};
  }
};

// A product as work: each share of the grid block by block, and of each block chunk by chunk of columns.
class ProductWork {
 public:
  // A chunk of a block of tiles. fresh: of another block than the item that was taken before it.
  struct Item {
    Blocks blocks;
    Share tiles, columns;
    bool fresh;
  };

  // Tiles have up to `height` rows, blocks up to `most` tiles.
  ProductWork(const Grid& grid, int64_t height, int64_t most)
      : grid_(grid),
        height_(height),
        most_(most),
        work_(grid.shares(), [&](int64_t share) { return blocks_of(share).count * chunks_of(share); }) {}

  // body(item) for all items, on torch's threads; each makes one body by make().
  template <typename Make>
  void run(const Make& make) {
    work_.run([&](int64_t mine) {
      const auto body = make();
      Work::Item taken;
      for (int64_t share = -1, block = -1; work_.take(mine, taken); share = taken.share) {
        const int64_t chunks = chunks_of(taken.share), last = std::exchange(block, taken.index / chunks);
        const Blocks blocks = blocks_of(taken.share);
        const Share columns = grid_.columns_of(taken.share);
        const int64_t first = columns.begin + taken.index % chunks * grid_.chunk;
        body(Item{blocks,
                  blocks.tiles_of(block),
                  {first, std::min(first + grid_.chunk, columns.end)},
                  share != taken.share || block != last});
      }
    });
  }

 private:
  Blocks blocks_of(int64_t share) const { return {grid_.rows_of(share), height_, most_}; }
  int64_t chunks_of(int64_t share) const { return (grid_.columns_of(share).size() + grid_.chunk - 1) / grid_.chunk; }

  Grid grid_;
  int64_t height_, most_;
  Work work_;
};

}  // namespace vitfast
