// patch_embed on the CPU: images -> tokens [B, P + L, C], as vitfast/ops/reference.py defines it.
//
// The output is seen as B * (P + L) rows, shared out among the threads. A thread takes a chunk of rows
// at a time: it gathers their patches straight from the image into a small buffer of the weight's dtype
// (uint8 pixels as pixel - 128, which is exact), multiplies them by the weight, and adds bias and
// position in fp32 while the product is still in cache. Prefix rows are gathered as zeros and written at
// the end. Bound by the product's FLOPs; beside the plain torch ops it saves the unfolded copies of the
// images and the passes over the output for position and prefix.
//
// A patch is multiplied as its difference from its level, the mean of each channel, and the level by the
// weight's sums over a channel. The product of a flat patch, such as plain background, would be a small sum of
// large terms, whose rounding a model may amplify a thousandfold; its differences are nearly zero.
//
// With AVX-512 VNNI and an fp32 weight, uint8 pixels are copied as they are, and multiplied in integers: see
// pixel_product.cpp. Their level is the last pixel of each channel, and the sums what rounding left of the weight.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../guards.h"
#include "../ops.h"
#include "../patch_embed_checks.h"
#include "linear_fp32.h"
#include "memory.h"
#include "pixel_product.h"
#include "simd.h"

namespace vitfast {
namespace {

constexpr float kPixelCenter = 128.0f;
// Rows per product: what linear's product has in a block. With fewer the weight is read too often, with more the
// buffer leaves the cache.
constexpr int64_t kChunk = 192;
// A thread is worth waking for this many rows.
constexpr int64_t kMinRows = 32;

using Optional = std::optional<at::Tensor>;

constexpr const char* kOp = "patch_embed";

// Where patches lie in the images; strides in elements. `size` and `stride` are the three nested runs of
// pixels of one patch, outermost first, in the order of the weight's K axis.
struct Geometry {
  Order order;
  int64_t batch, prefix, grid_h, grid_w;
  int64_t image_stride, down, right;
  std::array<int64_t, 3> size, stride;

  int64_t tokens() const { return prefix + grid_h * grid_w; }  // checked by check_patch_embed, as the next
  int64_t inner() const { return size[0] * size[1] * size[2]; }
};

Geometry geometry(const at::Tensor& images, at::IntArrayRef patch_size, bool channels_last, const Optional& prefix) {
  const int64_t h = channels_last ? 1 : 2, w = h + 1, c = channels_last ? 3 : 1;
  const int64_t ph = patch_size[0], pw = patch_size[1], channels = images.size(c);
  const int64_t sh = images.stride(h), sw = images.stride(w), sc = images.stride(c);
  Geometry g{Order(channels, pw, channels_last),
             images.size(0),
             prefix ? prefix->size(0) : 0,
             images.size(h) / ph,
             images.size(w) / pw,
             images.stride(0),
             ph * sh,
             pw * sw,
             {},
             {}};
  if (channels_last && sc == 1 && sw == channels) {  // a row of the patch is one run
    g.size = {1, ph, pw * channels};
    g.stride = {0, sh, 1};
  } else if (channels_last) {
    g.size = {ph, pw, channels};
    g.stride = {sh, sw, sc};
  } else {
    g.size = {channels, ph, pw};
    g.stride = {sc, sh, sw};
  }
  return g;
}

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

template <typename pixel_t, typename row_t>
VITFAST_INLINE void gather_loop(const pixel_t* patch, const Geometry& g, row_t* row) {
  for (int64_t i = 0; i < g.size[0]; ++i) {
    for (int64_t j = 0; j < g.size[1]; ++j, row += g.size[2]) {
      const pixel_t* run = patch + i * g.stride[0] + j * g.stride[1];
      if (g.stride[2] == 1 && std::is_same_v<pixel_t, row_t>) {
        std::memcpy(row, run, g.size[2] * sizeof(row_t));  // a run of bytes is shorter than a loop's vectors
      } else if (g.stride[2] == 1) {
        for (int64_t k = 0; k < g.size[2]; ++k) row[k] = row_value<row_t>(run[k]);
      } else {
        for (int64_t k = 0; k < g.size[2]; ++k) row[k] = row_value<row_t>(run[k * g.stride[2]]);
      }
    }
  }
}

// One patch as a row of K numbers. The pixel types that matter get a clone per vector width.
VITFAST_SIMD void gather(const uint8_t* patch, const Geometry& g, float* row) { gather_loop(patch, g, row); }
VITFAST_SIMD void gather(const float* patch, const Geometry& g, float* row) { gather_loop(patch, g, row); }
VITFAST_SIMD void gather(const uint8_t* patch, const Geometry& g, uint8_t* row) { gather_loop(patch, g, row); }
VITFAST_SIMD void gather(const uint8_t* patch, const Geometry& g, at::BFloat16* row) { gather_loop(patch, g, row); }
VITFAST_SIMD void gather(const float* patch, const Geometry& g, at::BFloat16* row) { gather_loop(patch, g, row); }
template <typename pixel_t, typename row_t>
void gather(const pixel_t* patch, const Geometry& g, row_t* row) {
  gather_loop(patch, g, row);
}

// The sums [channels] of a row [K] over each channel; `run` [width] is memory.
template <typename row_t, typename sum_t>
VITFAST_INLINE void sum_channels(const Order& order, const row_t* row, int64_t k, sum_t* run, sum_t* sums) {
  const int64_t parts = order.interleaved ? 1 : order.channels, part = k / parts;
  std::fill(sums, sums + order.channels, sum_t(0));
  for (int64_t c = 0; c < parts; ++c, row += part) {
    std::fill(run, run + order.width, sum_t(0));
    for (int64_t i = 0; i < part; i += order.width) {
      for (int64_t j = 0; j < order.width; ++j) run[j] += static_cast<float>(row[i + j]);
    }
    for (int64_t j = 0, channel = c; j < order.width; ++j, channel = order.after(channel)) sums[channel] += run[j];
  }
}

// row [K] -= level [channels], the mean of each channel, whole for uint8 pixels, whose differences are exact then.
template <typename row_t>
VITFAST_INLINE void center_loop(const Order& order, bool whole, row_t* row, float* level, float* run, int64_t k) {
  sum_channels(order, row, k, run, level);
  for (int64_t c = 0; c < order.channels; ++c) {
    level[c] *= static_cast<float>(order.channels) / static_cast<float>(k);
    if (whole) level[c] = std::nearbyint(level[c]);
  }
  const int64_t parts = order.interleaved ? 1 : order.channels, part = k / parts;
  for (int64_t c = 0; c < parts; ++c, row += part) {
    for (int64_t j = 0, channel = c; j < order.width; ++j, channel = order.after(channel)) run[j] = level[channel];
    for (int64_t i = 0; i < part; i += order.width) {
      for (int64_t j = 0; j < order.width; ++j) row[i + j] = static_cast<float>(row[i + j]) - run[j];
    }
  }
}
VITFAST_SIMD void center(const Order& order, bool whole, float* row, float* level, float* run, int64_t k) {
  center_loop(order, whole, row, level, run, k);
}
VITFAST_SIMD void center(const Order& order, bool whole, at::BFloat16* row, float* level, float* run, int64_t k) {
  center_loop(order, whole, row, level, run, k);
}

// level [channels] = the last pixel of each channel.
void last_pixels(const Order& order, const uint8_t* row, int64_t k, float* level) {
  for (int64_t c = 0; c < order.channels; ++c) {
    const int64_t last = order.interleaved ? k - order.channels + c : (c + 1) * (k / order.channels) - 1;
    level[c] = row_value<float>(row[last]);
  }
}

// Rows [begin, end) of the whole, centred unless they are bytes, as rows of `buffer` [end - begin, K]; levels
// [end - begin, channels].
template <typename pixel_t, typename row_t>
void gather_rows(const at::Tensor& images, const Geometry& g, int64_t begin, int64_t end, const at::Tensor& buffer,
                 float* levels) {
  const int64_t k = buffer.size(1);
  const pixel_t* data = read<pixel_t>(kOp, "images", images);
  row_t* row = buffer.mutable_data_ptr<row_t>();
  std::vector<float> run(g.order.width);  // no longer than a row of the buffer
  for (int64_t r = begin; r < end; ++r, row += k, levels += g.order.channels) {
    const int64_t patch = r % g.tokens() - g.prefix;
    if (patch < 0) {
      std::fill(row, row + k, row_t(0));
    } else {
      const pixel_t* image = data + r / g.tokens() * g.image_stride;
      gather(image + patch / g.grid_w * g.down + patch % g.grid_w * g.right, g, row);
      if constexpr (std::is_same_v<row_t, uint8_t>) {
        last_pixels(g.order, row, k, levels);
      } else {
        center(g.order, std::is_same_v<pixel_t, uint8_t>, row, levels, run.data(), k);
      }
    }
  }
}

// weight [C, K] -> its sums over each channel [channels, C].
VITFAST_SIMD void sum_channels_of(const Order& order, const float* row, int64_t k, double* run, double* sums) {
  sum_channels(order, row, k, run, sums);
}
VITFAST_SIMD void sum_channels_of(const Order& order, const at::BFloat16* row, int64_t k, double* run, double* sums) {
  sum_channels(order, row, k, run, sums);
}
template <typename row_t>
void sum_weight(const Order& order, const at::Tensor& weight, float* sums) {
  const int64_t n = weight.size(0), k = weight.size(1);
  if (weight.numel() == 0) return;
  const row_t* data = read<row_t>(kOp, "weight", weight);
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> run(order.width), sum(order.channels);
    for (int64_t i = begin; i < end; ++i) {
      sum_channels_of(order, data + i * k, k, run.data(), sum.data());
      for (int64_t c = 0; c < order.channels; ++c) sums[c * n + i] = static_cast<float>(sum[c]);
    }
  });
}

template <typename row_t>
VITFAST_INLINE void add_loop(row_t* row, const row_t* bias, const row_t* position, const float* level,
                             const float* sums, int64_t channels, int64_t n) {
  constexpr int64_t kStep = 64;  // loops of known length, with what they add up in registers
  float added[kStep];
  for (int64_t first = 0; first < n; first += kStep) {
    const int64_t count = std::min(kStep, n - first);
    std::fill(added, added + kStep, 0.0f);
    for (int64_t i = 0; bias && i < count; ++i) added[i] += static_cast<float>(bias[first + i]);
    for (int64_t i = 0; position && i < count; ++i) added[i] += static_cast<float>(position[first + i]);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < count; ++i) added[i] += level[c] * sums[c * n + first + i];
    }
    for (int64_t i = 0; i < count; ++i) row[first + i] = static_cast<float>(row[first + i]) + added[i];
  }
}

// row [n] += bias + position + level [channels] sums [channels, n]; bias and position may be null.
VITFAST_SIMD void add(float* row, const float* bias, const float* position, const float* level, const float* sums,
                      int64_t channels, int64_t n) {
  add_loop(row, bias, position, level, sums, channels, n);
}
VITFAST_SIMD void add(at::BFloat16* row, const at::BFloat16* bias, const at::BFloat16* position, const float* level,
                      const float* sums, int64_t channels, int64_t n) {
  add_loop(row, bias, position, level, sums, channels, n);
}

// Makes products into tokens: rows [begin, end) of out [B * (P + L), C]; bias [C], position [L, C], prefix [P, C].
template <typename row_t>
void finish_rows(const Geometry& g, int64_t begin, int64_t end, const float* levels, const float* sums,
                 const Optional& bias, const Optional& position, const Optional& prefix, const at::Tensor& out) {
  const int64_t n = out.size(1);
  const row_t *b = read<row_t>(kOp, "bias", bias), *pos = read<row_t>(kOp, "position", position);
  const row_t* pre = read<row_t>(kOp, "prefix", prefix);
  row_t* row = out.mutable_data_ptr<row_t>() + begin * n;
  for (int64_t r = begin; r < end; ++r, row += n, levels += g.order.channels) {
    const int64_t token = r % g.tokens(), patch = token - g.prefix;
    if (patch < 0) {
      std::copy(pre + token * n, pre + (token + 1) * n, row);
    } else {
      add(row, b, pos ? pos + patch * n : nullptr, levels, sums, g.order.channels, n);
    }
  }
}

template <typename row_t>
auto gather_rows_of(at::ScalarType pixel) {
  return AT_DISPATCH_SWITCH(
      pixel, "patch_embed", AT_DISPATCH_CASE(at::kByte, [] {
        return &gather_rows<scalar_t, row_t>;
      }) AT_DISPATCH_CASE_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, [] { return &gather_rows<scalar_t, row_t>; }));
}

// The tokens of images; weight [C, K], packed by pack_linear_cpu if it is fp32, by pack_pixel_weight if it is bytes,
// has sums [channels, C].
at::Tensor embed(const at::Tensor& images, const Geometry& g, const at::Tensor& weight, const float* sums,
                 const Optional& bias, const Optional& position, const Optional& prefix) {
  const int64_t n = weight.size(0), k = g.inner(), rows = product(kOp, {g.batch, g.tokens()});
  const at::ScalarType kind = weight.scalar_type();
  const bool bytes = kind == at::kChar, bf16 = kind == at::kBFloat16;
  auto* gather_chunk = bytes  ? &gather_rows<uint8_t, uint8_t>
                       : bf16 ? gather_rows_of<at::BFloat16>(images.scalar_type())
                              : gather_rows_of<float>(images.scalar_type());
  auto* finish_chunk = bf16 ? &finish_rows<at::BFloat16> : &finish_rows<float>;
  // Copied if need be, unlike the images: they are small, and contiguous already in a planned model.
  const Optional b = contiguous(kOp, "bias", bias), pos = contiguous(kOp, "position", position);
  const Optional pre = contiguous(kOp, "prefix", prefix);
  const at::TensorOptions made = weight.options().dtype(bf16 ? kind : at::kFloat);
  const at::Tensor out = empty_output({g.batch, g.tokens(), n}, made);
  if (out.numel() == 0) return out;
  const at::Tensor flat = out.view({rows, n});

  const auto multiply = [&](const at::Tensor& buffer, int64_t count, at::Tensor to) {
    if (bytes) {
      multiply_pixels(read<uint8_t>(kOp, "images", buffer), count, n, k, read<int8_t>(kOp, "weight", weight),
                      to.mutable_data_ptr<float>());
    } else if (bf16) {
      at::mm_out(to, buffer.narrow(0, 0, count), weight.t());
    } else {
      multiply_packed(read<float>(kOp, "images", buffer), count, weight, to.mutable_data_ptr<float>());
    }
  };

  // One parallel region for everything: each thread works through its own rows, product included
  // (BLAS does not thread inside a parallel region), and waits for the others only once.
  const int64_t threads = at::get_num_threads(), share = std::max(kMinRows, (rows + threads - 1) / threads);
  at::parallel_for(0, rows, share, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd_in_this_thread;
    const at::Tensor buffer = at::empty({std::min(kChunk, end - begin), k}, bytes ? made.dtype(at::kByte) : made);
    const at::Tensor level = at::empty({kChunk, g.order.channels}, at::kFloat);
    float* levels = level.mutable_data_ptr<float>();
    for (int64_t start = begin; start < end; start += kChunk) {
      const int64_t stop = std::min(start + kChunk, end);
      gather_chunk(images, g, start, stop, buffer, levels);
      multiply(buffer, stop - start, flat.narrow(0, start, stop - start));
      finish_chunk(g, start, stop, levels, sums, b, pos, pre, flat);
    }
  });
  return out;
}

// The order of a weight's K axis, once the arguments are checked.
Order order_of(const char* op, const at::Tensor& weight, at::IntArrayRef patch_size, bool channels_last) {
  check_dtype(op, "weight", weight, {at::kFloat});
  check_patch_size(op, patch_size);
  const int64_t ph = patch_size[0], pw = patch_size[1], area = product(op, patch_size);
  TORCH_CHECK_VALUE(weight.dim() == 2 && ph >= 1 && pw >= 1 && weight.size(1) >= 1 && weight.size(1) % area == 0, op,
                    ": weight must be [C, K] with K a multiple of the patch ", ph, "x", pw, ", got shape ",
                    shape_text(weight.sizes()));
  return Order(weight.size(1) / area, pw, channels_last);
}

// Memory for what pack_pixel_weight makes of a weight.
at::Tensor pixel_weight(const Order& order, const at::Tensor& weight) {
  return at::empty({weight.size(0), pixel_columns(weight.size(1), order.channels)}, weight.options().dtype(at::kChar));
}

}  // namespace

at::Tensor patch_embed_cpu(const at::Tensor& images, const at::Tensor& weight, const Optional& bias,
                           const Optional& position, const Optional& prefix, at::IntArrayRef patch_size,
                           bool channels_last) {
  check_patch_embed(images, weight, bias, position, prefix, patch_size, channels_last, {at::kFloat, at::kBFloat16});
  if (weight.scalar_type() == at::kFloat) {
    const at::Tensor packed =
        pack_patch_embed_cpu(weight, patch_size, channels_last, images.scalar_type() == at::kByte);
    return patch_embed_packed_cpu(images, packed, bias, position, prefix, patch_size, channels_last);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Geometry g = geometry(images, patch_size, channels_last, prefix);
  const at::Tensor kernel = contiguous(kOp, "weight", weight);
  const at::Tensor sums = at::empty({g.order.channels, kernel.size(0)}, at::kFloat);
  sum_weight<at::BFloat16>(g.order, kernel, sums.mutable_data_ptr<float>());
  return embed(images, g, kernel, read<float>(kOp, "weight", sums), bias, position, prefix);
}

at::Tensor pack_patch_embed_cpu(const at::Tensor& weight, at::IntArrayRef patch_size, bool channels_last, bool uint8) {
  const Order order = order_of("pack_patch_embed", weight, patch_size, channels_last);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor kernel = contiguous("pack_patch_embed", "weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  if (uint8) {
    const at::Tensor bytes = pixel_weight(order, kernel);
    if (pack_pixel_weight(order, kernel, bytes.mutable_data_ptr<int8_t>()).empty()) return bytes;
  }
  const at::Tensor packed = at::empty({n, (Size(kOp, k) + order.channels).value()}, kernel.options());
  float* panels = packed.mutable_data_ptr<float>();
  pack_panels(kernel, panels);
  sum_weight<float>(order, kernel, panels + n * k);
  return packed;
}

std::string why_no_integers_cpu(const at::Tensor& weight, at::IntArrayRef patch_size, bool channels_last) {
  const Order order = order_of("why_no_integers", weight, patch_size, channels_last);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor kernel = contiguous("why_no_integers", "weight", weight);
  return pack_pixel_weight(order, kernel, pixel_weight(order, kernel).mutable_data_ptr<int8_t>());
}

at::Tensor patch_embed_packed_cpu(const at::Tensor& images, const at::Tensor& packed, const Optional& bias,
                                  const Optional& position, const Optional& prefix, at::IntArrayRef patch_size,
                                  bool channels_last) {
  check_patch_embed(images, packed, bias, position, prefix, patch_size, channels_last, {at::kFloat, at::kChar},
                    /*packed=*/true);
  TORCH_CHECK_VALUE(packed.is_contiguous(), "patch_embed: weight is not as pack_patch_embed returned it: strides ",
                    shape_text(packed.strides()));
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Geometry g = geometry(images, patch_size, channels_last, prefix);
  const int64_t n = packed.size(0), k = g.inner();
  if (packed.scalar_type() == at::kChar) {
    check_dtype("patch_embed", "images", images, {at::kByte});  // the weight was packed for
    const std::string reason = why_no_pixel_product(k);
    TORCH_CHECK_VALUE(reason.empty(), "patch_embed: weight is packed for integer products: ", reason);
    const int8_t* panels = read<int8_t>(kOp, "weight", packed);
    TORCH_CHECK_VALUE(is_aligned(packed, sizeof(float)), kOp, ": weight packed for integer products is not aligned to ",
                      sizeof(float), " bytes; clone() aligns it");
    return embed(images, g, packed, pixel_rest(n, k, panels), bias, position, prefix);
  }
  const at::Tensor panels = packed.view(-1).narrow(0, 0, n * k).view({n, k});
  return embed(images, g, panels, read<float>(kOp, "weight", packed) + n * k, bias, position, prefix);
}

}  // namespace vitfast
