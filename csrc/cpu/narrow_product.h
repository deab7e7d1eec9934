// The product of narrow_tile.h with its epilogue, shared out among threads: what linear in bf16 and quantized_linear in
// int8 have in common.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "narrow_tile.h"
#include "tile_epilogue.h"

namespace vitfast {

struct NarrowCall {
  const char* op;
  int64_t m, n, row_bytes;  // rows of x; columns of y; bytes of a row of x and of the weight
  const char *x, *packed;   // x [M, row_bytes], and what pack_narrow made of the weight [N, or 2 N, row_bytes]
  int64_t group;            // words of x that share a scale: all of a row, but where there is one for each group
  const float* x_scale;     // [M, groups], or null
  TileEpilogue epilogue;

  int64_t words() const { return (row_bytes + 3) / 4; }
  int64_t groups() const { return (words() + group - 1) / group; }
};

// A tile of rows of x times `words` words of a panel.
struct NarrowTile {
  int64_t count;  // rows
  NarrowRows x;
  const int32_t* panel;
  int64_t words;
  const int32_t* start;  // what the sums begin with
  const float* scale;    // of the first row of x, those of the others `scale_stride` apart; or null
  int64_t scale_stride;
  float* sums;  // [count, kNarrowChunk]
};

// The steps of a product, compiled for the instruction that multiplies.
struct NarrowSteps {
  // start [groups, kTileStride]: what the sums of a tile of rows of x [count, row_bytes] begin with. Null for zero.
  void (*start)(const NarrowCall& c, const char* x, int64_t count, int32_t* start);
  void (*multiply)(const NarrowTile& t, const Ahead& ahead, bool adds);  // adds: to the sums that are there
  void (*finish)(const TileEpilogue& e, int64_t m, int64_t count, int64_t first, float* sums);
  bool reads_rows;  // multiply takes rows of x where they lie, aligned to words, or else tiles only
};

void run_narrow(const NarrowCall& call, const NarrowSteps& steps, int64_t threads = at::get_num_threads());

// Rows [N, row_bytes] of a weight to panels of words [N, row_bytes rounded up to words], `flip` exclusive-ored to each.
void pack_narrow(const char* rows, int64_t n, int64_t row_bytes, uint32_t flip, char* packed);

}  // namespace vitfast
