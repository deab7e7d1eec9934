// attention on the CPU: softmax(q k^T scale + bias) v, as vitfast/ops/reference.py defines it.
//
// A thread takes blocks of queries of one head after another. It packs the head's keys and values once into
// panels in fp32 (keys transposed), straight from the strided inputs. For a block it then computes all scores,
// takes the exact softmax of each row (one pass: a row of scores is short and stays in cache), and multiplies
// by the values. Both products are one register-blocked micro kernel. Bound by the products' FLOPs; beside
// torch's scaled_dot_product_attention it saves the rescaling of running sums and the copy of the output.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>

#include "../attention_checks.h"
#include "../guards.h"
#include "../ops.h"
#include "attention_scores.h"
#include "memory.h"
#include "work.h"

namespace vitfast {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr const char* kOp = "attention";
constexpr int64_t kBlocks = 2;  // of queries, that a thread takes at a time
// Of what memory holds already; Size has its own for what it may not.
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The block shape of a vector width: `lanes` floats a vector, `rows` x `vectors` of them in registers, and
// `block` queries whose scores are in cache at one time.
template <Simd level_, int lanes_, int rows_, int vectors_>
struct Tile {
  static constexpr Simd level = level_;
  static constexpr int lanes = lanes_, rows = rows_, vectors = vectors_, panel = lanes * vectors, block = 4 * rows;
};

// Where a thread's buffers begin in its memory, in floats, and how large it is.
struct Layout {
  int64_t key_columns, value_columns;  // padded to whole vectors
  int64_t score_stride;                // a vector more: see `adjust`
  int64_t keys, values, queries, scores, sums, size;

  template <typename T>
  static Layout of(const AttentionCall& c) {
    const Size key_columns = round_up(Size(kOp, c.keys), T::lanes);
    const Size value_columns = round_up(Size(kOp, c.head_dim), T::lanes), score_stride = key_columns + T::lanes;
    const Size values = round_up(key_columns * c.head_dim, T::lanes);
    const Size queries = values + round_up(value_columns * c.keys, T::lanes);
    const Size scores = queries + round_up(Size(kOp, c.head_dim) * T::block, T::lanes);
    const Size sums = scores + score_stride * T::block, size = sums + value_columns * T::rows;
    Layout l{};
    l.key_columns = key_columns.value(), l.value_columns = value_columns.value(), l.score_stride = score_stride.value();
    l.values = values.value(), l.queries = queries.value(), l.scores = scores.value(), l.sums = sums.value();
    l.size = size.value();
    return l;
  }
};

// c [rows, vectors * lanes] = a [rows, depth] b [depth, vectors * lanes].
template <int lanes, int rows, int vectors>
VITFAST_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                             int64_t c_stride) {
  Vector<lanes> sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += lanes * vectors) {
    Vector<lanes> column[vectors];
    for (int j = 0; j < vectors; ++j) column[j] = load<lanes>(b + j * lanes);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) sum[i][j] += a[i * a_stride + k] * column[j];
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) store<lanes>(c + i * c_stride + j * lanes, sum[i][j]);
  }
}

// The same with a width known at run time only, 1 .. vectors.
template <int lanes, int rows, int vectors>
VITFAST_INLINE void multiply_panel(int64_t width, const float* a, int64_t a_stride, const float* b, int64_t depth,
                                   float* c, int64_t c_stride) {
  if constexpr (vectors > 1) {
    if (width < vectors) return multiply_panel<lanes, rows, vectors - 1>(width, a, a_stride, b, depth, c, c_stride);
  }
  multiply<lanes, rows, vectors>(a, a_stride, b, depth, c, c_stride);
}

// Keys as panels [head_dim, panel], four by four numbers at a time; columns beyond the last key repeat it.
template <typename T, typename scalar_t>
VITFAST_INLINE void pack_keys(const AttentionCall& c, const Layout& l, int64_t b, int64_t h, float* to) {
  for (int64_t first = 0; first < l.key_columns; first += T::panel) {
    const int64_t width = std::min<int64_t>(T::panel, l.key_columns - first);
    for (int64_t n = 0; n < width; n += 4) {
      const scalar_t* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = c.k.at<scalar_t>(b, std::min(first + n + i, c.keys - 1), h);
      int64_t d = 0;
      for (; d + 4 <= c.head_dim; d += 4) {
        Vector<4> square[4];
        for (int i = 0; i < 4; ++i) square[i] = load_as_float<4>(rows[i] + d);
        store_transposed(to + d * width + n, width, square);
      }
      for (; d < c.head_dim; ++d) {
        for (int i = 0; i < 4; ++i) to[d * width + n + i] = static_cast<float>(rows[i][d]);
      }
    }
    to += width * c.head_dim;
  }
}

// Values as panels [keys, panel], the columns beyond the last one zero.
template <typename T, typename scalar_t>
VITFAST_INLINE void pack_values(const AttentionCall& c, const Layout& l, int64_t b, int64_t h, float* to) {
  const scalar_t* from = c.v.at<scalar_t>(b, 0, h);
  for (int64_t first = 0; first < l.value_columns; first += T::panel) {
    const int64_t width = std::min<int64_t>(T::panel, l.value_columns - first);
    const int64_t real = std::min(width, c.head_dim - first);
    for (int64_t n = 0; n < c.keys; ++n, to += width) {
      const scalar_t* row = from + n * c.v.stride[1] + first;
      for (int64_t d = 0; d < real; ++d) to[d] = static_cast<float>(row[d]);
      for (int64_t d = real; d < width; ++d) to[d] = 0.0f;
    }
  }
}

// Blocks [begin, end) of all blocks of queries, numbered head by head.
template <typename T, typename scalar_t>
VITFAST_INLINE void attend(const AttentionCall& c, int64_t begin, int64_t end, AttentionState& state) {
  constexpr int lanes = T::lanes, rows = T::rows;
  const Layout l = Layout::of<T>(c);
  const int64_t blocks = c.blocks(T::block);
  float* memory = state.memory;
  float *keys = memory + l.keys, *values = memory + l.values, *queries = memory + l.queries;
  float *scores = memory + l.scores, *sums = memory + l.sums;
  float shift[T::block], inverse[T::block];

  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / blocks / c.heads, h = block / blocks % c.heads;
    if (state.turns_to(block / blocks)) {
      pack_keys<T, scalar_t>(c, l, b, h, keys);
      pack_values<T, scalar_t>(c, l, b, h, values);
    }
    const int64_t first = block % blocks * T::block, count = std::min<int64_t>(T::block, c.queries - first);
    const int64_t tiled = round_up(count, rows);
    for (int64_t i = 0; i < tiled; ++i) {
      const scalar_t* row = c.q.at<scalar_t>(b, first + std::min(i, count - 1), h);
      for (int64_t d = 0; d < c.head_dim; ++d) queries[i * c.head_dim + d] = static_cast<float>(row[d]) * c.scale;
    }
    const int64_t seen = c.causal ? std::min(c.keys, first + count) : c.keys, width = round_up(seen, lanes);

    for (int64_t n = 0; n < width; n += T::panel) {
      for (int64_t i = 0; i < tiled; i += rows) {
        state.next.ask<scalar_t>(c);
        ask_outputs<scalar_t>(c, b, first, count, h, (n / T::panel * (tiled / rows) + i / rows) * 2);
        multiply_panel<lanes, rows, T::vectors>((l.key_columns - n) / lanes, queries + i * c.head_dim, c.head_dim,
                                                keys + n * c.head_dim, c.head_dim, scores + i * l.score_stride + n,
                                                l.score_stride);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      float* row = scores + i * l.score_stride;
      adjust<lanes>(c, b, h, first + i, seen, width, row);
      shift[i] = shift_of<lanes>(row, width);
    }
    for (int64_t i = 0; i < count; ++i) inverse[i] = exponentiate<lanes>(scores + i * l.score_stride, width, shift[i]);
    for (int64_t i = 0; i < tiled; i += rows) {
      for (int64_t d = 0; d < l.value_columns; d += T::panel) {
        multiply_panel<lanes, rows, T::vectors>((l.value_columns - d) / lanes, scores + i * l.score_stride,
                                                l.score_stride, values + d * c.keys, seen, sums + d, l.value_columns);
      }
      for (int64_t r = 0; r < std::min<int64_t>(rows, count - i); ++r) {
        write_head<scalar_t, T::level>(c, b, first + i + r, h, inverse[i + r], sums + r * l.value_columns);
      }
    }
  }
}

using Standard = Tile<Simd::standard, 4, 4, 3>;  // 16 registers
template <typename scalar_t>
void attend_standard(const AttentionCall& c, int64_t begin, int64_t end, AttentionState& state) {
  attend<Standard, scalar_t>(c, begin, end, state);
}

#ifdef VITFAST_SIMD_LEVELS
using Avx2 = Tile<Simd::avx2, 8, 6, 2>;  // 16 registers
template <typename scalar_t>
VITFAST_TARGET("avx2,fma")
void attend_avx2(const AttentionCall& c, int64_t begin, int64_t end, AttentionState& state) {
  attend<Avx2, scalar_t>(c, begin, end, state);
}

using Avx512 = Tile<Simd::avx512, 16, 6, 4>;  // 32 registers
template <typename scalar_t>
VITFAST_TARGET("avx512f")
void attend_avx512(const AttentionCall& c, int64_t begin, int64_t end, AttentionState& state) {
  attend<Avx512, scalar_t>(c, begin, end, state);
}
#endif

template <typename scalar_t>
AttentionVariant variant(const AttentionCall& c) {
#ifdef VITFAST_SIMD_LEVELS
  if (simd_level() >= Simd::avx512) return {Avx512::block, Layout::of<Avx512>(c).size, &attend_avx512<scalar_t>};
  if (simd_level() >= Simd::avx2) return {Avx2::block, Layout::of<Avx2>(c).size, &attend_avx2<scalar_t>};
#endif
  return {Standard::block, Layout::of<Standard>(c).size, &attend_standard<scalar_t>};
}

View view(const char* name, const at::Tensor& tensor) {
  View v{read(kOp, name, tensor), tensor.scalar_type(), {}};
  std::copy(tensor.strides().begin(), tensor.strides().end(), v.stride);
  return v;
}

View view(const char* name, const Optional& tensor, at::IntArrayRef shape) {
  if (!tensor) return {};
  check_storage(kOp, name, *tensor);  // or expand throws an error of its own
  return view(name, tensor->expand(shape));
}

AttentionCall call_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& bias,
                      const Optional& mask, bool causal, std::optional<double> scale) {
  AttentionCall call{q.size(0), q.size(2), q.size(1), k.size(1), q.size(3), view("q", q), view("k", k), view("v", v)};
  const int64_t scores[] = {call.batch, call.heads, call.queries, call.keys};
  call.bias = view("bias", bias, scores);
  call.mask = view("mask", mask, scores);
  call.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(call.head_dim))));
  call.causal = causal;
  return call;
}

void run(const AttentionCall& call) {
  const bool in_bf16 = call.q.dtype == at::kBFloat16;
  AttentionVariant chosen = in_bf16 ? variant<at::BFloat16>(call) : variant<float>(call);
#ifdef VITFAST_SIMD_LEVELS
  if (in_bf16 && simd_level() >= Simd::avx512_bf16) chosen = attention_bf16(call);
#endif
  const int64_t blocks = product(kOp, {call.batch, call.heads, call.blocks(chosen.block)});
  share_out(blocks, kBlocks, [&] {
    const Size bytes = Size(kOp, chosen.memory) * sizeof(float);
    return [&, state = AttentionState{static_cast<float*>(Scratch::of(bytes.value()))}](
               int64_t begin, int64_t end) mutable { chosen.run(call, begin, end, state); };
  });
}

}  // namespace

at::Tensor attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& bias,
                         const Optional& mask, bool causal, std::optional<double> scale) {
  check_attention(q, k, v, bias, mask, {at::kFloat, at::kBFloat16});
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor out = empty_output(q.sizes(), q.options());
  if (k.size(1) == 0) out.zero_();
  if (out.numel() == 0 || k.size(1) == 0) return out;
  AttentionCall call = call_of(q, k, v, bias, mask, causal, scale);
  call.out = out.mutable_data_ptr();
  run(call);
  return out;
}

std::tuple<at::Tensor, at::Tensor> attention_quantize_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                          const Optional& bias, const Optional& mask, bool causal,
                                                          std::optional<double> scale) {
  check_attention(q, k, v, bias, mask, {at::kFloat, at::kBFloat16});
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor values = empty_output(q.sizes(), q.options().dtype(at::kChar));
  const at::Tensor scales = at::empty(q.sizes().slice(0, 3), q.options().dtype(at::kFloat));
  if (k.size(1) == 0) {
    values.zero_();
    scales.fill_(kLeastAmax / kLargestInt8);
  }
  if (values.numel() == 0 || k.size(1) == 0) return {values, scales};
  AttentionCall call = call_of(q, k, v, bias, mask, causal, scale);
  call.values = values.mutable_data_ptr<int8_t>();
  call.scales = scales.mutable_data_ptr<float>();
  run(call);
  return {values, scales};
}

}  // namespace vitfast
