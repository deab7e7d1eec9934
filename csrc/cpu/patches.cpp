#include "patches.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../guards.h"
#include "numbers.h"
#include "simd.h"

namespace vitfast {
namespace {

constexpr float kPixelCenter = 128.0f;

constexpr const char* kOp = "patch_embed";

template <typename row_t, typename pixel_t>
VITFAST_INLINE auto row_value(pixel_t pixel) {
  if constexpr (std::is_same_v<row_t, uint8_t>) {
    return pixel;
  } else if constexpr (std::is_same_v<pixel_t, uint8_t>) {
    return static_cast<float>(static_cast<int32_t>(pixel)) - kPixelCenter;
  } else {
    return static_cast<float>(pixel);
  }
}

// 16 pixels likewise. level: of the function this is inlined into, as in all that follows.
#ifdef VITFAST_SIMD_LEVELS
template <Simd level>
VITFAST_INLINE Floats row_values(const uint8_t* pixels) {
  typedef uint8_t Pixels __attribute__((vector_size(kWide)));
  typedef int32_t Ints __attribute__((vector_size(4 * kWide)));
  Pixels some;
  std::memcpy(&some, pixels, sizeof(some));
  Ints words;
  asm("vpmovzxbd %1, %0" : "=v"(words) : "v"(some));  // GCC 12 converts them one by one
  return __builtin_convertvector(words, Floats) - kPixelCenter;
}
template <Simd level, typename pixel_t>
VITFAST_INLINE Floats row_values(const pixel_t* pixels) {
  return load_floats<level>(pixels);
}
#endif

template <Simd level>
VITFAST_INLINE void store_row(float* row, const Floats& x) {
  store<kWide>(row, x);
}
template <Simd level>
VITFAST_INLINE void store_row(at::BFloat16* row, const Floats& x) {
#ifdef VITFAST_SIMD_LEVELS
  if constexpr (level >= Simd::avx512_bf16) return static_cast<void>(store_by_instruction(row, x));
#endif
  store_rounded(row, x);
}
template <Simd level, typename row_t>
VITFAST_INLINE void store_row(row_t* row, const Floats& x, int64_t count) {
  if (count >= kWide) return store_row<level>(row, x);
  store_rounded(row, x, count);
}

// `bytes` of a run, which is so short that a call would cost as much.
VITFAST_INLINE void copy_run(const char* from, int64_t bytes, char* to) {
  constexpr int64_t kStep = 16;
  if (bytes < kStep) return static_cast<void>(std::memcpy(to, from, bytes));
  for (int64_t i = 0; i < bytes; i += kStep) {
    const int64_t at = std::min(i, bytes - kStep);  // the last step may overlap the one before
    std::memcpy(to + at, from + at, kStep);
  }
}

template <Simd level, typename pixel_t, typename row_t>
VITFAST_INLINE void gather_run(const pixel_t* run, int64_t count, row_t* row) {
  if constexpr (std::is_same_v<pixel_t, row_t>) {
    copy_run(reinterpret_cast<const char*>(run), count * sizeof(row_t), reinterpret_cast<char*>(row));
  } else {
    int64_t k = 0;
#ifdef VITFAST_SIMD_LEVELS
    if constexpr (level >= Simd::avx512) {
      for (; k + kWide <= count; k += kWide) store_row<level>(row + k, row_values<level>(run + k));
    }
#endif
    for (; k < count; ++k) row[k] = row_value<row_t>(run[k]);
  }
}

// One patch as a row of K numbers.
template <Simd level, typename pixel_t, typename row_t>
VITFAST_INLINE void gather(const pixel_t* patch, const Patches& p, row_t* row) {
  for (int64_t i = 0; i < p.size[0]; ++i) {
    for (int64_t j = 0; j < p.size[1]; ++j, row += p.size[2]) {
      const pixel_t* run = patch + i * p.stride[0] + j * p.stride[1];
      if (p.stride[2] == 1) {
        gather_run<level>(run, p.size[2], row);
      } else {
        for (int64_t k = 0; k < p.size[2]; ++k) row[k] = row_value<row_t>(run[k * p.stride[2]]);
      }
    }
  }
}

// sums [width] of every `width`-th of k numbers; what is beyond them, up to a whole vector, is written too.
template <Simd level, typename row_t>
VITFAST_INLINE void sum_columns(const row_t* row, int64_t k, int64_t width, float* sums) {
  for (int64_t j = 0; j < width; j += kWide) {
    Floats total{};
    for (int64_t i = j; i < k; i += width) total += load_floats<level>(row + i, width - j);
    store<kWide>(sums + j, total);
  }
}

// row [k] -= columns [width], again and again.
template <Simd level, typename row_t>
VITFAST_INLINE void subtract_columns(row_t* row, int64_t k, int64_t width, const float* columns) {
  for (int64_t j = 0; j < width; j += kWide) {
    const Floats these = load<kWide>(columns + j);
    for (int64_t i = j; i < k; i += width) {
      store_row<level>(row + i, load_floats<level>(row + i, width - j) - these, width - j);
    }
  }
}

// row [K] -= levels [channels], the mean of each channel, whole for uint8 pixels, whose differences are exact then;
// `run` is memory of a run, rounded up to vectors.
template <Simd level, typename row_t>
VITFAST_INLINE void center(const Order& order, bool whole, row_t* row, float* levels, float* run, int64_t k) {
  const int64_t parts = order.interleaved ? 1 : order.channels, part = k / parts;
  const auto mean = [&](float sum) VITFAST_INLINE_LAMBDA {
    const float mean = sum * static_cast<float>(order.channels) / static_cast<float>(k);
    return whole ? std::nearbyint(mean) : mean;
  };
  if (!order.interleaved) {
    for (int64_t c = 0; c < order.channels; ++c, row += part) {
      Floats total{};
      for (int64_t i = 0; i < part; i += kWide) total += load_floats<level>(row + i, part - i);
      levels[c] = mean(sum<kWide>(total));
      for (int64_t i = 0; i < part; i += kWide) {
        store_row<level>(row + i, load_floats<level>(row + i, part - i) - levels[c], part - i);
      }
    }
    return;
  }
  sum_columns<level>(row, k, order.width, run);
  std::fill(levels, levels + order.channels, 0.0f);
  for (int64_t j = 0, c = 0; j < order.width; ++j, c = order.after(c)) levels[c] += run[j];
  for (int64_t c = 0; c < order.channels; ++c) levels[c] = mean(levels[c]);
  for (int64_t j = 0, c = 0; j < order.width; ++j, c = order.after(c)) run[j] = levels[c];
  subtract_columns<level>(row, k, order.width, run);
}

// level [channels] = the last pixel of each channel.
void last_pixels(const Order& order, const uint8_t* row, int64_t k, float* level) {
  for (int64_t c = 0; c < order.channels; ++c) {
    const int64_t last = order.interleaved ? k - order.channels + c : (c + 1) * (k / order.channels) - 1;
    level[c] = row_value<float>(row[last]);
  }
}

// A patch as a row, centred unless it is bytes, and its levels; `run` is memory.
template <Simd level, typename pixel_t, typename row_t>
VITFAST_INLINE void take_patch(const pixel_t* patch, const Patches& p, row_t* row, float* levels, float* run) {
  gather<level>(patch, p, row);
  if constexpr (std::is_same_v<row_t, uint8_t>) {
    last_pixels(p.order, row, p.inner(), levels);
  } else {
    center<level>(p.order, std::is_same_v<pixel_t, uint8_t>, row, levels, run, p.inner());
  }
}

template <typename pixel_t, typename row_t>
using TakePatch = void (*)(const pixel_t* patch, const Patches& p, row_t* row, float* levels, float* run);

template <typename pixel_t, typename row_t>
void take_patch_standard(const pixel_t* patch, const Patches& p, row_t* row, float* levels, float* run) {
  take_patch<Simd::standard>(patch, p, row, levels, run);
}

#ifdef VITFAST_SIMD_LEVELS
template <typename pixel_t, typename row_t>
VITFAST_TARGET("avx2,fma")
void take_patch_avx2(const pixel_t* patch, const Patches& p, row_t* row, float* levels, float* run) {
  take_patch<Simd::avx2>(patch, p, row, levels, run);
}

template <typename pixel_t, typename row_t>
VITFAST_TARGET("avx512f,avx512bw,avx512vl")
void take_patch_avx512(const pixel_t* patch, const Patches& p, row_t* row, float* levels, float* run) {
  take_patch<Simd::avx512>(patch, p, row, levels, run);
}

template <typename pixel_t, typename row_t>
VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512bf16")
void take_patch_avx512_bf16(const pixel_t* patch, const Patches& p, row_t* row, float* levels, float* run) {
  take_patch<Simd::avx512_bf16>(patch, p, row, levels, run);
}
#endif

template <typename pixel_t, typename row_t>
TakePatch<pixel_t, row_t> take_patch_here() {
#ifdef VITFAST_SIMD_LEVELS
  if constexpr (!std::is_same_v<pixel_t, double> && !std::is_same_v<pixel_t, at::Half>) {  // those are rare
    if (simd_level() >= Simd::avx512_bf16) return &take_patch_avx512_bf16<pixel_t, row_t>;
    if (simd_level() >= Simd::avx512) return &take_patch_avx512<pixel_t, row_t>;
    if (simd_level() >= Simd::avx2) return &take_patch_avx2<pixel_t, row_t>;
  }
#endif
  return &take_patch_standard<pixel_t, row_t>;
}

template <typename pixel_t, typename row_t>
void gather_rows_of(const at::Tensor& images, const Patches& p, int64_t begin, int64_t end, const at::Tensor& rows,
                    float* levels) {
  const auto take_patch = take_patch_here<pixel_t, row_t>();
  const int64_t k = p.inner();
  const pixel_t* data = read<pixel_t>(kOp, "images", images);
  row_t* row = rows.mutable_data_ptr<row_t>();
  std::vector<float> run(p.order.width + kWide);  // hardly longer than a row
  for (int64_t r = begin; r < end; ++r, row += k, levels += p.order.channels) {
    const int64_t patch = r % p.tokens() - p.prefix;
    if (patch < 0) {
      std::fill(row, row + k, row_t(0));
      continue;
    }
    const pixel_t* image = data + r / p.tokens() * p.image_stride;
    take_patch(image + patch / p.grid_w * p.down + patch % p.grid_w * p.right, p, row, levels, run.data());
  }
}

template <typename row_t>
GatherRows gather_to(at::ScalarType pixels) {
  return AT_DISPATCH_SWITCH(pixels, kOp,
                            AT_DISPATCH_CASE(at::kByte, [] { return &gather_rows_of<scalar_t, row_t>; })
                                AT_DISPATCH_CASE_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16,
                                                                     [] { return &gather_rows_of<scalar_t, row_t>; }));
}

// The sums [channels] of a row [K] of the weight over each channel; `run` [width] is memory.
template <typename row_t>
VITFAST_INLINE void sum_loop(const Order& order, const row_t* row, int64_t k, double* run, double* sums) {
  const int64_t parts = order.interleaved ? 1 : order.channels, part = k / parts;
  std::fill(sums, sums + order.channels, 0.0);
  for (int64_t c = 0; c < parts; ++c, row += part) {
    std::fill(run, run + order.width, 0.0);
    for (int64_t i = 0; i < part; i += order.width) {
      for (int64_t j = 0; j < order.width; ++j) run[j] += static_cast<float>(row[i + j]);
    }
    for (int64_t j = 0, channel = c; j < order.width; ++j, channel = order.after(channel)) sums[channel] += run[j];
  }
}
VITFAST_SIMD void sum_row(const Order& order, const float* row, int64_t k, double* run, double* sums) {
  sum_loop(order, row, k, run, sums);
}
VITFAST_SIMD void sum_row(const Order& order, const at::BFloat16* row, int64_t k, double* run, double* sums) {
  sum_loop(order, row, k, run, sums);
}
template <typename row_t>
void sum_rows(const Order& order, const at::Tensor& weight, float* sums) {
  const int64_t n = weight.size(0), k = weight.size(1);
  if (weight.numel() == 0) return;
  const row_t* data = read<row_t>(kOp, "weight", weight);
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> run(order.width), sum(order.channels);
    for (int64_t i = begin; i < end; ++i) {
      sum_row(order, data + i * k, k, run.data(), sum.data());
      for (int64_t c = 0; c < order.channels; ++c) sums[c * n + i] = static_cast<float>(sum[c]);
    }
  });
}

}  // namespace

Patches::Patches(const at::Tensor& images, at::IntArrayRef patch_size, bool channels_last,
                 const std::optional<at::Tensor>& prefix_tokens)
    : order(images.size(channels_last ? 3 : 1), patch_size[1], channels_last),
      batch(images.size(0)),
      prefix(prefix_tokens ? prefix_tokens->size(0) : 0),
      grid_h(images.size(channels_last ? 1 : 2) / patch_size[0]),
      grid_w(images.size(channels_last ? 2 : 3) / patch_size[1]),
      image_stride(images.stride(0)) {
  const int64_t h = channels_last ? 1 : 2, w = h + 1, c = channels_last ? 3 : 1;
  const int64_t ph = patch_size[0], pw = patch_size[1], channels = order.channels;
  const int64_t sh = images.stride(h), sw = images.stride(w), sc = images.stride(c);
  down = ph * sh, right = pw * sw;
  if (channels_last && sc == 1 && sw == channels) {  // a row of the patch is one run
    size = {1, ph, pw * channels};
    stride = {0, sh, 1};
  } else if (channels_last) {
    size = {ph, pw, channels};
    stride = {sh, sw, sc};
  } else {
    size = {channels, ph, pw};
    stride = {sc, sh, sw};
  }
}

GatherRows gather_rows(at::ScalarType pixels, at::ScalarType rows) {
  if (rows == at::kByte) return &gather_rows_of<uint8_t, uint8_t>;
  return rows == at::kBFloat16 ? gather_to<at::BFloat16>(pixels) : gather_to<float>(pixels);
}

void sum_channels(const Order& order, const at::Tensor& weight, float* sums) {
  (weight.scalar_type() == at::kFloat ? &sum_rows<float> : &sum_rows<at::BFloat16>)(order, weight, sums);
}

}  // namespace vitfast
