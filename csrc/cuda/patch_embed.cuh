// patch_embed on sm_80 and later: tokens = patches W^T + bias + position, in bf16 with fp32 sums, from uint8 or bf16.
//
// The output is seen as B (P + L) rows of tokens. A block makes 128 rows x 128 columns of it, a warp 32 rows and all
// of the columns. The weight comes through shared memory, 32 numbers of K at a time, in a ring of three stages. Pixels
// do not: a lane reads those of its own four rows, as the operand of the product wants them, straight from the image,
// one step ahead, and turns them into bf16 (a uint8 pixel as pixel - 128, which is exact) when they are due. No other
// warp of the block needs them. Prefix rows multiply zeros and are written at the end.
//
// Bound by tensor-core issue at ViT widths. Blocks of the same rows run next to each other: the image is in the L2
// cache for all but the first.
#pragma once

#include <cstring>

#include "../device/atoms.cuh"
#include "patch_embed.h"

namespace vitfast {

constexpr int kPatchEmbedThreads = 128;
constexpr int kPatchEmbedTile = 128;  // rows and columns of a block
constexpr int kPatchEmbedDepth = 32;  // numbers of K per step
constexpr int kPatchEmbedStages = 3;  // steps of the weight in shared memory
constexpr int kPatchEmbedStageBytes = kPatchEmbedTile * kPatchEmbedDepth * 2;
constexpr int kPatchEmbedSharedBytes = kPatchEmbedStages * kPatchEmbedStageBytes;

// A stage is 128 rows of four chunks of 16 bytes. Two rows share the 128 bytes of all banks; the order of chunks is
// permuted, so that eight neighbouring rows of one chunk lie in different banks.
VITFAST_DEVICE uint32_t stage_offset(unsigned row, unsigned chunk) { return 16 * (4 * row + (chunk ^ (row / 2 % 4))); }

VITFAST_DEVICE float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The aligned word that has the two bytes or more at `address`.
VITFAST_DEVICE uint32_t load_word(uintptr_t address) {
  return load_pair(reinterpret_cast<const void*>(address & ~uintptr_t{3}));
}

// Two numbers of K as they are read, and as the product wants them. A word may hold them in either half.
template <PixelType type>
struct Pixels;
template <>
struct Pixels<PixelType::uint8> {
  static constexpr int bytes = 1;
  static constexpr uint32_t blank = 0x80808080u;  // becomes zeros

  // 2^23 + pixel has the pixel as its lowest bits, and the difference is exact.
  static VITFAST_DEVICE float centered(uint32_t pixel) { return float_of_bits(0x4b000000u | pixel) - 8388736.0f; }
  static VITFAST_DEVICE uint32_t operand(uint32_t word, bool high) {
    const uint32_t two = high ? word >> 16 : word;
    return pack(bf16{}, centered(two & 0xffu), centered(two >> 8 & 0xffu));
  }
  static VITFAST_DEVICE uint32_t load_two(uintptr_t first, uintptr_t second) {
    const uint32_t low = load_word(first) >> 8 * (first % 4) & 0xffu;
    return low | (load_word(second) >> 8 * (second % 4) & 0xffu) << 8;
  }
};
template <>
struct Pixels<PixelType::bf16> {
  static constexpr int bytes = 2;
  static constexpr uint32_t blank = 0;

  static VITFAST_DEVICE uint32_t operand(uint32_t word, bool) { return word; }
  static VITFAST_DEVICE uint32_t load_two(uintptr_t first, uintptr_t second) {
    const uint32_t low = load_word(first) >> 8 * (first % 4) & 0xffffu;
    return low | (load_word(second) >> 8 * (second % 4) & 0xffffu) << 16;
  }
};

// Starts to copy one step of the weight to shared memory, zeros beyond its rows and columns.
VITFAST_DEVICE void copy_weight(const PatchEmbedParams& p, uint32_t to, int column0, int step) {
  const bf16* weight = static_cast<const bf16*>(p.weight);
  for (int i = threadIdx.x; i < kPatchEmbedTile * 4; i += kPatchEmbedThreads) {
    const int row = i / 4, chunk = i % 4, column = column0 + row, k = step * kPatchEmbedDepth + 8 * chunk;
    const bool valid = column < p.width && k < p.weight_stride;
    copy_async(to + stage_offset(row, chunk), weight + (valid ? static_cast<int64_t>(column) * p.weight_stride + k : 0),
               valid);
  }
}

// middle_, inner_: the sizes of K's axes, for which p.pairs holds; 0 for any, by p.
template <PixelType type, int middle_, int inner_>
__global__ void __launch_bounds__(kPatchEmbedThreads, 2) patch_embed_kernel(PatchEmbedParams p) {
  using Type = Pixels<type>;
  constexpr bool pairs = inner_ > 0;
  const int middle = pairs ? middle_ : p.middle, inner = pairs ? inner_ : p.inner;

  // Locate. A lane's rows are `row0` + 8 i; a row without a patch has no corner.
  const int column_tiles = (p.width + kPatchEmbedTile - 1) / kPatchEmbedTile;
  const int column0 = blockIdx.x % column_tiles * kPatchEmbedTile;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = 2 * (lane % 4);
  const unsigned matrix = lane / 8, matrix_row = lane % 8;  // whose address this lane gives to load_matrices
  const int row0 = blockIdx.x / column_tiles * kPatchEmbedTile + static_cast<int>(32 * warp + lane / 4);
  uintptr_t corner[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + 8 * i, image = row / p.tokens, patch = row % p.tokens - p.prefix_tokens;
    const int64_t offset = image * p.image_stride + patch / p.grid_width * p.down + patch % p.grid_width * p.right;
    const bool there = row < p.rows && patch >= 0;
    corner[i] = there ? reinterpret_cast<uintptr_t>(p.images) + offset * Type::bytes : 0;
  }

  // Where number k of a patch lies, in bytes from its corner.
  const auto offset_of = [&](int k) {
    const int64_t offset = k / inner / middle * p.outer_stride + k / inner % middle * p.middle_stride +
                           k % inner * (pairs ? 1 : p.inner_stride);
    return static_cast<uintptr_t>(offset * Type::bytes);
  };
  // Four pairs of numbers of each row, from column `pair` of every 8 of a step. Bit 4 i + c of `high`: in the upper
  // half.
  uint32_t words[4][4], high = 0;
  const auto fetch = [&](int step) {
    high = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int k = step * kPatchEmbedDepth + 8 * c + static_cast<int>(pair);
      const uintptr_t first = offset_of(k), second = pairs ? 0 : offset_of(k + 1 < p.k ? k + 1 : k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i][c] = Type::blank;
        if (!corner[i] || k >= p.k) continue;
        if (pairs) {
          words[i][c] = load_word(corner[i] + first);
          high |= static_cast<uint32_t>((corner[i] + first) / 2 % 2) << (4 * i + c);
        } else {
          words[i][c] = Type::load_two(corner[i] + first, corner[i] + second);
        }
      }
    }
  };

  float sums[2][kPatchEmbedTile / 8][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kPatchEmbedTile / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;
    }
  }

  const uint32_t shared = shared_begin();
  const int steps = (p.k + kPatchEmbedDepth - 1) / kPatchEmbedDepth;
  for (int step = 0; step < kPatchEmbedStages - 1; ++step) {
    if (step < steps) copy_weight(p, shared + step * kPatchEmbedStageBytes, column0, step);
    copy_commit();
  }
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    copy_wait<kPatchEmbedStages - 2>();
    block_barrier();  // the weight of this step is there, and nobody reads that of the last any more
    const int next = step + kPatchEmbedStages - 1;
    if (next < steps) copy_weight(p, shared + next % kPatchEmbedStages * kPatchEmbedStageBytes, column0, next);
    copy_commit();

    uint32_t a[2][2][4];  // of 16 numbers of K, of 16 rows
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        a[c / 2][i / 2][2 * (c % 2) + i % 2] = Type::operand(words[i][c], high >> (4 * i + c) & 1);
    }
    if (step + 1 < steps) fetch(step + 1);

    const uint32_t stage = shared + step % kPatchEmbedStages * kPatchEmbedStageBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kPatchEmbedTile / 8; n += 2) {
        uint32_t b[4];
        load_matrices(b, stage + stage_offset(8 * (n + matrix / 2) + matrix_row, 2 * half + matrix % 2));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add(bf16{}, sums[m][n], a[half][m], b[0], b[1]);
          multiply_add(bf16{}, sums[m][n + 1], a[half][m], b[2], b[3]);
        }
      }
    }
  }

  // Bias, position and prefix, and store: four lanes write 16 bytes of a row at a time.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + 8 * i, token = row % p.tokens, patch = token - p.prefix_tokens;
    if (row >= p.rows) continue;
    const bf16* bias = static_cast<const bf16*>(p.bias);
    const bf16* position = static_cast<const bf16*>(p.position) + static_cast<int64_t>(patch) * p.width;
    const bf16* prefix = static_cast<const bf16*>(p.prefix) + static_cast<int64_t>(token) * p.width;
    bf16* out = static_cast<bf16*>(p.out) + static_cast<int64_t>(row) * p.width;
#pragma unroll
    for (int n = 0; n < kPatchEmbedTile / 8; ++n) {
      const int column = column0 + 8 * n + static_cast<int>(pair);
      if (column >= p.width) continue;
      if (patch < 0) {
        store_pair(out + column, load_pair(prefix + column));
        continue;
      }
      float left = sums[i / 2][n][2 * (i % 2)], right = sums[i / 2][n][2 * (i % 2) + 1];
      const auto add = [&](const bf16* from) {
        const uint32_t two = load_pair(from + column);
        left += float_of_bits(two << 16);
        right += float_of_bits(two & 0xffff0000u);
      };
      if (p.bias) add(bias);
      if (p.position) add(position);
      store_pair(out + column, pack(bf16{}, left, right));
    }
  }
}

}  // namespace vitfast
