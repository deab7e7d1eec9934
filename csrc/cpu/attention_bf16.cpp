// attention on the CPU with both products in bf16: queries with keys, and what softmax makes of their scores, rounded,
// with values. Scores, their exponentials' sum and the sums of values are fp32. Beside attention.cpp, whose plan it
// follows, all that is in a block is a tile of narrow_tile.h, and keys and values are panels of pairs.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention_scores.h"
#include "narrow_tile.h"

namespace vitfast {

#ifdef VITFAST_SIMD_LEVELS
namespace {

constexpr const char* kOp = "attention";

int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Where a thread's buffers begin in its memory, in words, and how large it is.
struct Layout {
  int64_t head_words, key_words;        // pairs of head dims, and of keys, which are padded to whole vectors
  int64_t score_stride, chance_stride;  // words of a row; not a multiple of a page
  int64_t values, queries, scores, chances, sums, size;

  explicit Layout(const AttentionCall& c) {
    const Size keys = round_up(Size(kOp, c.keys), kNarrowPanel);
    head_words = (c.head_dim + 1) / 2, key_words = keys.value() / 2;
    score_stride = (keys + kWide).value(), chance_stride = key_words + kWide;
    const Size values_at = keys * head_words;
    const Size queries_at = values_at + keys * (padded(c.head_dim, kNarrowPanel) / 2);
    const Size scores_at = queries_at + kTileRows * padded(head_words, kWide);
    const Size chances_at = scores_at + Size(kOp, score_stride) * kTileRows;
    const Size sums_at = chances_at + Size(kOp, chance_stride) * kTileRows;
    values = values_at.value(), queries = queries_at.value(), scores = scores_at.value();
    chances = chances_at.value(), sums = sums_at.value();
    size = (sums_at + kTileRows * padded(c.head_dim, kNarrowPanel)).value();
  }
};

// Keys as panels [head_words, kNarrowPanel] of pairs, four by four words at a time; keys beyond the last repeat it.
VITFAST_INLINE void pack_keys(const AttentionCall& c, const Layout& l, int64_t b, int64_t h, int32_t* to) {
  for (int64_t first = 0; first < c.keys; first += kNarrowPanel, to += l.head_words * kNarrowPanel) {
    for (int64_t n = 0; n < kNarrowPanel; n += 4) {
      const at::BFloat16* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = c.k.at<at::BFloat16>(b, std::min(first + n + i, c.keys - 1), h);
      int64_t w = 0;
      for (; 2 * w + 8 <= c.head_dim; w += 4) {
        Vector<4> square[4];
        for (int i = 0; i < 4; ++i) std::memcpy(&square[i], rows[i] + 2 * w, sizeof(square[i]));
        store_transposed(reinterpret_cast<float*>(to) + w * kNarrowPanel + n, kNarrowPanel, square);
      }
      for (; w < l.head_words; ++w) {
        for (int i = 0; i < 4; ++i) {
          int32_t word = 0;
          std::memcpy(&word, rows[i] + 2 * w, 2 * std::min<int64_t>(2, c.head_dim - 2 * w));
          to[w * kNarrowPanel + n + i] = word;
        }
      }
    }
  }
}

// Values as panels [key_words, kNarrowPanel] of pairs of keys, zero beyond the last key and the last column.
VITFAST_INLINE void pack_values(const AttentionCall& c, const Layout& l, int64_t b, int64_t h, int32_t* to) {
  const at::BFloat16* from = c.v.at<at::BFloat16>(b, 0, h);
  const int64_t stride = c.v.stride[1];
  for (int64_t first = 0; first < c.head_dim; first += kNarrowPanel) {
    for (int64_t w = 0; w < l.key_words; ++w, to += kNarrowPanel) {
      for (int64_t j = 0; j < kNarrowPanel; j += kWide) {
        const int64_t d = first + j, count = std::clamp<int64_t>(c.head_dim - d, 0, kWide);
        Bits pair[2] = {};
        for (int64_t i = 0; i < 2; ++i) {
          if (2 * w + i >= c.keys || count == 0) continue;
          pair[i] = bits_of(load_floats<Simd::avx512_bf16>(from + (2 * w + i) * stride + d, count));
        }
        const Bits words = pair[0] >> 16 | pair[1];
        std::memcpy(to + j, &words, sizeof(words));
      }
    }
  }
}

// exp(x - shift) to 8e-5, for what is rounded to bf16; 0 where x is -infinity.
VITFAST_INLINE Floats rough_exp(const Floats& x, float shift) {
  constexpr float kLog2E = 1.44269504f, kLeast = -200.0f;  // whose power of two is 0
  const Floats log2 = (x - shift) * kLog2E, least = kLeast - Floats{};
  Floats t, n, power;  // not as intrinsics, whose headers give warnings with GCC 12
  asm("vmaxps %2, %1, %0" : "=v"(t) : "v"(least), "v"(log2));  // NaN for NaN
  asm("vrndscaleps $0, %1, %0" : "=v"(n) : "v"(t));
  const Floats f = t - n;
  Floats p = f * 0.0551717728f + 0.242611378f;
  p = p * f + 0.693260968f;
  p = p * f + 0.999927998f;
  asm("vscalefps %2, %1, %0" : "=v"(power) : "v"(p), "v"(n));
  return power;
}

// scores [width] -> chances = bf16(exp(scores - shift)); returns 1 / their sum, 0 where no key is seen.
VITFAST_INLINE float round_chances(const float* scores, int64_t width, float shift, at::BFloat16* chances) {
  Floats total{};
  for (int64_t n = 0; n < width; n += kWide) {
    const Floats chance = rough_exp(load_floats(scores + n), shift);
    total += chance;
    Halves rounded;  // likewise
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(chance));
    std::memcpy(chances + n, &rounded, sizeof(rounded));
  }
  const float denominator = sum<kWide>(total);
  return denominator == 0.0f ? 0.0f : 1.0f / denominator;
}

struct Scaled {
  float* to;
  int64_t stride;
  float scale;
  VITFAST_INLINE void operator()(int i, int j, const Floats& sums) const {
    store<kWide>(to + i * stride + j * kWide, sums * scale);
  }
};

VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512bf16")
void attend(const AttentionCall& c, int64_t begin, int64_t end, AttentionState& state) {
  const Layout l(c);
  const int64_t blocks = c.blocks(kTileRows), columns = padded(c.head_dim, kNarrowPanel);
  float* memory = state.memory;
  int32_t* words = reinterpret_cast<int32_t*>(memory);
  int32_t *values = words + l.values, *queries = words + l.queries, *chances = words + l.chances;
  float *scores = memory + l.scores, *sums = memory + l.sums;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / blocks / c.heads, h = block / blocks % c.heads;
    if (state.turns_to(block / blocks)) {
      pack_keys(c, l, b, h, words);
      pack_values(c, l, b, h, values);
    }
    const int64_t first = c.queries * (block % blocks) / blocks;
    const int64_t count = c.queries * (block % blocks + 1) / blocks - first;
    for (int64_t i = 0; i < count; ++i) {
      int32_t* to = queries + i * l.head_words;
      to[l.head_words - 1] = 0;
      std::memcpy(to, c.q.at<at::BFloat16>(b, first + i, h), 2 * c.head_dim);
    }
    const int64_t seen = c.causal ? std::min(c.keys, first + count) : c.keys, width = padded(seen, kWide);
    for (int64_t n = 0; n < seen; n += kNarrowPanel) {
      state.next.ask<at::BFloat16>(c);
      ask_outputs<at::BFloat16>(c, b, first, count, h, n / kWide);
      const Scaled sink{scores + n, l.score_stride, c.scale};
      const auto multiply = [&](auto vectors) VITFAST_INLINE_LAMBDA {
        multiply_tile_rows<Bfloat16Pairs, kTileRows, vectors()>(count, FromRows<>(queries, l.head_words),
                                                                words + n * l.head_words, l.head_words, nullptr,
                                                                NothingAhead(), sink);
      };
      if (seen - n > kWide) {
        multiply(std::integral_constant<int, 2>());
      } else {
        multiply(std::integral_constant<int, 1>());  // half a panel
      }
    }
    float shift[kTileRows], inverse[kTileRows];
    for (int64_t i = 0; i < count; ++i) {  // apart, so that the rows' last steps are under way together
      adjust<kWide>(c, b, h, first + i, seen, width, scores + i * l.score_stride);
      shift[i] = shift_of<kWide>(scores + i * l.score_stride, width);
    }
    for (int64_t i = 0; i < count; ++i) {
      auto* rounded = reinterpret_cast<at::BFloat16*>(chances + i * l.chance_stride);
      inverse[i] = round_chances(scores + i * l.score_stride, width, shift[i], rounded);
    }
    for (int64_t d = 0; d < c.head_dim; d += kNarrowPanel) {
      multiply_tile_rows<Bfloat16Pairs>(count, FromRows<>(chances, l.chance_stride), values + d * l.key_words,
                                        width / 2, nullptr, NothingAhead(), Scaled{sums + d, columns, 1.0f});
    }
    for (int64_t i = 0; i < count; ++i) {
      write_head<at::BFloat16, Simd::avx512_bf16>(c, b, first + i, h, inverse[i], sums + i * columns);
    }
  }
}

}  // namespace

AttentionVariant attention_bf16(const AttentionCall& call) { return {kTileRows, Layout(call).size, &attend}; }

#endif

}  // namespace vitfast
