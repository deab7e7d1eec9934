// patch_embed on the CPU: images -> tokens [B, P + L, C], as vitfast/ops/reference.py defines it.
//
// The output is seen as B * (P + L) rows, shared out among the threads. A thread takes a chunk of rows
// at a time: it gathers their patches straight from the image into a small buffer of the weight's dtype
// (patches.h says how they are centred), multiplies them by the weight, and adds bias, position and what the centres
// give in fp32 while the product is still in cache. Prefix rows are gathered as zeros and written at
// the end. Bound by the product's FLOPs; beside the plain torch ops it saves the unfolded copies of the
// images and the passes over the output for position and prefix.
//
// With AVX-512 VNNI and an fp32 weight, uint8 pixels are copied as they are, and multiplied in integers: see
// pixel_product.cpp; the weight's sums are then what rounding left of it. With AVX512-BF16 the product in bf16 is
// linear's; elsewhere torch's.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "../guards.h"
#include "../ops.h"
#include "../patch_embed_checks.h"
#include "linear_bf16.h"
#include "linear_fp32.h"
#include "memory.h"
#include "patches.h"
#include "pixel_product.h"
#include "simd.h"
#include "work.h"

namespace vitfast {
namespace {

// A chunk is worth a thread from so many rows.
constexpr int64_t kMinRows = 32;
// Rows per product, at most. With fewer the weight is read too often, with more the buffer leaves the cache.
constexpr int64_t kChunk = 112;

using Optional = std::optional<at::Tensor>;

constexpr const char* kOp = "patch_embed";

template <typename row_t, typename product_t>
VITFAST_INLINE void add_loop(row_t* row, const product_t* product, const row_t* bias, const row_t* position,
                             const float* level, const float* sums, int64_t channels, int64_t n) {
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
    for (int64_t i = 0; i < count; ++i) row[first + i] = static_cast<float>(product[first + i]) + added[i];
  }
}

// row [n] = product + bias + position + level [channels] sums [channels, n]; bias and position may be null, and the
// product be the row.
VITFAST_SIMD void add(float* row, const float* product, const float* bias, const float* position, const float* level,
                      const float* sums, int64_t channels, int64_t n) {
  add_loop(row, product, bias, position, level, sums, channels, n);
}
VITFAST_SIMD void add(at::BFloat16* row, const at::BFloat16* product, const at::BFloat16* bias,
                      const at::BFloat16* position, const float* level, const float* sums, int64_t channels,
                      int64_t n) {
  add_loop(row, product, bias, position, level, sums, channels, n);
}
VITFAST_SIMD void add(at::BFloat16* row, const float* product, const at::BFloat16* bias, const at::BFloat16* position,
                      const float* level, const float* sums, int64_t channels, int64_t n) {
  add_loop(row, product, bias, position, level, sums, channels, n);
}

// What is added to products on their way to tokens: bias [C], position [L, C], prefix [P, C], and the levels of
// patches times the weight's sums over each channel [channels, C].
struct Added {
  Optional bias, position, prefix;
  const float* sums;
};

// Products [end - begin, C] become rows [begin, end) of out [B (P + L), C].
template <typename row_t, typename product_t>
void finish_rows(const Patches& p, int64_t begin, int64_t end, const product_t* product, const float* levels,
                 const Added& added, const at::Tensor& out) {
  const int64_t n = out.size(1);
  const row_t* bias = read<row_t>(kOp, "bias", added.bias);
  const row_t* position = read<row_t>(kOp, "position", added.position);
  const row_t* prefix = read<row_t>(kOp, "prefix", added.prefix);
  row_t* row = out.mutable_data_ptr<row_t>() + begin * n;
  for (int64_t r = begin; r < end; ++r, row += n, product += n, levels += p.order.channels) {
    const int64_t token = r % p.tokens(), patch = token - p.prefix;
    if (patch < 0) {
      std::copy(prefix + token * n, prefix + (token + 1) * n, row);
    } else {
      add(row, product, bias, position ? position + patch * n : nullptr, levels, added.sums, p.order.channels, n);
    }
  }
}

// What a weight [C, K] is; all but bf16 as pack_patch_embed_cpu makes it.
enum class Weight { floats, pixels, bf16, bf16_pairs };

// The tokens of images; `weight` is C rows, without what follows them.
at::Tensor embed(const at::Tensor& images, const Patches& p, Weight kind, const at::Tensor& weight, const float* sums,
                 const Optional& bias, const Optional& position, const Optional& prefix) {
  const int64_t n = weight.size(0), k = p.inner(), rows = product(kOp, {p.batch, p.tokens()});
  const bool bf16 = kind == Weight::bf16 || kind == Weight::bf16_pairs;
  const at::ScalarType dtype = bf16 ? at::kBFloat16 : at::kFloat, gathered = kind == Weight::pixels ? at::kByte : dtype;
  const GatherRows gather = gather_rows(images.scalar_type(), gathered);
  // Copied if need be, unlike the images: they are small, and contiguous already in a planned model.
  const Added added{contiguous(kOp, "bias", bias), contiguous(kOp, "position", position),
                    contiguous(kOp, "prefix", prefix), sums};
  const at::Tensor out = empty_output({p.batch, p.tokens(), n}, weight.options().dtype(dtype));
  if (out.numel() == 0) return out;
  const at::Tensor flat = out.view({rows, n});

  const int64_t chunks = round_up(Size(kOp, (rows + kChunk - 1) / kChunk), at::get_num_threads()).value();
  share_out(rows, std::max(kMinRows, (rows + chunks - 1) / chunks), [&] {
    const int64_t most = std::min(kChunk, rows);
    const at::Tensor buffer = at::empty({most, k}, gathered), levels = at::empty({most, p.order.channels});
    const at::Tensor products = at::empty({kind == Weight::bf16_pairs ? most : 0, n});
    return [&, buffer, levels, products](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd_in_this_thread;
      const int64_t count = end - begin;
      float* level = levels.mutable_data_ptr<float>();
      gather(images, p, begin, end, buffer, level);
      if (kind == Weight::bf16_pairs) {
        float* y = products.mutable_data_ptr<float>();
        multiply_packed_bf16(read<at::BFloat16>(kOp, "images", buffer), count, n, k,
                             static_cast<const char*>(read(kOp, "weight", weight)), y);
        return finish_rows<at::BFloat16>(p, begin, end, y, level, added, flat);
      }
      at::Tensor to = flat.narrow(0, begin, count);
      if (kind == Weight::bf16) {
        at::mm_out(to, buffer.narrow(0, 0, count), weight.t());
        return finish_rows<at::BFloat16>(p, begin, end, to.mutable_data_ptr<at::BFloat16>(), level, added, flat);
      }
      float* y = to.mutable_data_ptr<float>();
      if (kind == Weight::pixels) {
        multiply_pixels(read<uint8_t>(kOp, "images", buffer), count, n, k, read<int8_t>(kOp, "weight", weight), y);
      } else {
        multiply_packed(read<float>(kOp, "images", buffer), count, weight, y);
      }
      finish_rows<float>(p, begin, end, y, level, added, flat);
    };
  });
  return out;
}

// The order of a weight's K axis, once the arguments are checked.
Order order_of(const char* op, const at::Tensor& weight, at::IntArrayRef patch_size, bool channels_last) {
  check_dtype(op, "weight", weight, {at::kFloat, at::kBFloat16});
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
  if (weight.scalar_type() == at::kFloat || why_no_linear_bf16_cpu().empty()) {
    const at::Tensor packed =
        pack_patch_embed_cpu(weight, patch_size, channels_last, images.scalar_type() == at::kByte);
    return patch_embed_packed_cpu(images, packed, bias, position, prefix, patch_size, channels_last);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Patches patches(images, patch_size, channels_last, prefix);
  const at::Tensor kernel = contiguous(kOp, "weight", weight);
  const at::Tensor sums = at::empty({patches.order.channels, kernel.size(0)}, at::kFloat);
  sum_channels(patches.order, kernel, sums.mutable_data_ptr<float>());
  return embed(images, patches, Weight::bf16, kernel, read<float>(kOp, "weight", sums), bias, position, prefix);
}

at::Tensor pack_patch_embed_cpu(const at::Tensor& weight, at::IntArrayRef patch_size, bool channels_last, bool uint8) {
  constexpr const char* op = "pack_patch_embed";
  const Order order = order_of(op, weight, patch_size, channels_last);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor kernel = contiguous(op, "weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  if (weight.scalar_type() == at::kBFloat16) {
    const std::string reason = why_no_linear_bf16_cpu();
    TORCH_CHECK_VALUE(reason.empty(), op, ": weight has dtype torch.bfloat16, but ", reason);
    const at::Tensor packed = at::empty({n, pairs_columns(k, order.channels)}, kernel.options());
    const at::Tensor panels = packed.view(-1).narrow(0, 0, n * (k + k % 2)).view({n, k + k % 2});
    pack_linear_bf16(kernel, panels);
    sum_channels(order, kernel, reinterpret_cast<float*>(panels.mutable_data_ptr<at::BFloat16>() + panels.numel()));
    return packed;
  }
  if (uint8) {
    const at::Tensor bytes = pixel_weight(order, kernel);
    if (pack_pixel_weight(order, kernel, bytes.mutable_data_ptr<int8_t>()).empty()) return bytes;
  }
  const at::Tensor packed = at::empty({n, (Size(op, k) + order.channels).value()}, kernel.options());
  float* panels = packed.mutable_data_ptr<float>();
  pack_panels(kernel, panels);
  sum_channels(order, kernel, panels + n * k);
  return packed;
}

std::string why_no_integers_cpu(const at::Tensor& weight, at::IntArrayRef patch_size, bool channels_last) {
  constexpr const char* op = "why_no_integers";
  check_dtype(op, "weight", weight, {at::kFloat});
  const Order order = order_of(op, weight, patch_size, channels_last);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor kernel = contiguous(op, "weight", weight);
  return pack_pixel_weight(order, kernel, pixel_weight(order, kernel).mutable_data_ptr<int8_t>());
}

at::Tensor patch_embed_packed_cpu(const at::Tensor& images, const at::Tensor& packed, const Optional& bias,
                                  const Optional& position, const Optional& prefix, at::IntArrayRef patch_size,
                                  bool channels_last) {
  check_patch_embed(images, packed, bias, position, prefix, patch_size, channels_last,
                    {at::kFloat, at::kBFloat16, at::kChar}, /*packed=*/true);
  TORCH_CHECK_VALUE(packed.is_contiguous(), kOp, ": weight is not as pack_patch_embed returned it: strides ",
                    shape_text(packed.strides()));
  TORCH_CHECK_VALUE(is_aligned(packed, sizeof(float)), kOp,
                    ": weight that pack_patch_embed returned is not aligned to ", sizeof(float),
                    " bytes; clone() aligns it");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Patches patches(images, patch_size, channels_last, prefix);
  const int64_t n = packed.size(0), k = patches.inner();
  if (packed.scalar_type() == at::kChar) {
    check_dtype(kOp, "images", images, {at::kByte});  // the weight was packed for
    const std::string reason = why_no_pixel_product(k);
    TORCH_CHECK_VALUE(reason.empty(), kOp, ": weight is packed for integer products: ", reason);
    const float* rest = pixel_rest(n, k, read<int8_t>(kOp, "weight", packed));
    return embed(images, patches, Weight::pixels, packed, rest, bias, position, prefix);
  }
  const bool pairs = packed.scalar_type() == at::kBFloat16;
  if (pairs) {
    const std::string reason = why_no_linear_bf16_cpu();
    TORCH_CHECK_VALUE(reason.empty(), kOp, ": weight is packed in pairs of bf16, but ", reason);
  }
  const int64_t width = pairs ? k + k % 2 : k;
  const at::Tensor panels = packed.view(-1).narrow(0, 0, n * width).view({n, width});
  const auto* sums = static_cast<const char*>(read(kOp, "weight", packed)) + panels.nbytes();
  return embed(images, patches, pairs ? Weight::bf16_pairs : Weight::floats, panels,
               reinterpret_cast<const float*>(sums), bias, position, prefix);
}

}  // namespace vitfast
