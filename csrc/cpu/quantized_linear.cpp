// quantized_linear on the CPU in int8, as vitfast/ops/reference.py defines it, where there is AVX-512 VNNI.
//
// `vpdpbusd` multiplies bytes without sign with bytes that have one. The weight is packed with 128 added, and what that
// adds to the product of a row of x is 128 times the row's sum, which the sums start with, negative. They are exact;
// with a scale for each group of columns of x, each group's are.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../guards.h"
#include "../ops.h"
#include "narrow_product.h"
#include "tile_epilogue.h"

namespace vitfast {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr const char* kOp = "quantized_linear";
constexpr int64_t kBlockBytes = 1 << 19;  // of tiles of x, which stay in cache while the weight goes by
constexpr int64_t kGroups[] = {128, 64};  // columns of x that may share a scale: SCALE_GROUPS of the reference

struct Call {
  int64_t m, n, k;
  const int8_t* x;       // [M, K]
  const float* x_scale;  // [M, groups]
  int64_t group;         // columns of x that share a scale
  const int8_t* packed;  // panel p begins at p * kNarrowPanel * words * 4
  TileEpilogue epilogue;

  int64_t words() const { return (k + 3) / 4; }
  int64_t groups() const { return (k + group - 1) / group; }
};

// Memory of a thread, in words: tiles of x, the sums that each starts with, and the last panel, widened.
struct Layout {
  int64_t tiles, tile, starts, panel, size;

  explicit Layout(const Call& c) {
    const Size words = Size(kOp, c.words()) * kTileStride;
    tile = words.value();
    tiles = std::max<int64_t>(1, kBlockBytes / 4 / tile);
    starts = (words * tiles).value();
    const Size panel_at = round_up(Size(kOp, starts) + Size(kOp, c.groups() * tiles) * kTileStride, kWide);
    panel = panel_at.value();
    size = (panel_at + Size(kOp, c.words()) * kNarrowPanel + kNarrowPanel).value();
  }
};

// to [kNarrowChunk of a row] (+)= sums * scale of the row
struct AddScaled {
  float* to;
  const float* scale;
  int64_t groups;
  bool first;
  VITFAST_INLINE void operator()(int i, int j, const Words& sums) const {
    float* at = to + i * kNarrowChunk + j * kWide;
    const Floats scaled = __builtin_convertvector(sums, Floats) * scale[i * groups];
    store<kWide>(at, first ? scaled : load<kWide>(at) + scaled);
  }
};

#ifdef VITFAST_SIMD_LEVELS

#define VITFAST_VNNI VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512vnni")

VITFAST_VNNI void multiply(int64_t count, const int32_t* x, const int32_t* panel, int64_t words, const int32_t* start,
                           const AddScaled& sink) {
  multiply_tile_rows<Int8Fours>(count, x, panel, words, start, sink);
}

// start [groups, kTileStride] = -128 times the sum of each group of columns of x [count, K].
VITFAST_VNNI void start_sums(const Call& c, const int8_t* x, int64_t count, int32_t* start) {
  for (int64_t g = 0; g < c.groups(); ++g, start += kTileStride) {
    for (int64_t i = 0; i < count; ++i) {
      int32_t total = 0;
      for (int64_t k = g * c.group; k < std::min((g + 1) * c.group, c.k); ++k) total += x[i * c.k + k];
      start[i] = -128 * total;
    }
  }
}

template <typename scalar_t>
VITFAST_VNNI void finish(const TileEpilogue& e, int64_t m, int64_t count, int64_t first, float* sums) {
  for (int64_t i = 0; i < count; ++i) finish_row<scalar_t>(e, m + i, first, sums + i * kNarrowChunk);
}

void compute(const Call& c, Share rows, Share columns, int32_t* memory) {
  auto* finish_in = &finish<float>;
  if (c.epilogue.dtype == at::kHalf) finish_in = &finish<at::Half>;
  if (c.epilogue.dtype == at::kBFloat16) finish_in = &finish<at::BFloat16>;
  const Layout l(c);
  const int64_t words = c.words(), groups = c.groups();
  const int64_t tiles = (rows.size() + kTileRows - 1) / kTileRows;
  int32_t* wide = memory + l.panel;
  if (columns.end == c.n) widen_last_panel(c.packed, c.n, words, wide);
  alignas(64) float sums[kTileRows * kNarrowChunk];
  for (int64_t block = 0; block < tiles; block += l.tiles) {
    const int64_t block_end = std::min(block + l.tiles, tiles);
    for (int64_t t = block; t < block_end; ++t) {
      const Share tile = tile_of(rows, t, tiles);
      const int8_t* x = c.x + tile.begin * c.k;
      pack_tile(x, c.k, tile.size(), memory + (t - block) * l.tile);
      start_sums(c, x, tile.size(), memory + l.starts + (t - block) * groups * kTileStride);
    }
    for (int64_t n = columns.begin; n < columns.end; n += kNarrowChunk) {
      const int64_t n_end = std::min(n + kNarrowChunk, columns.end);
      for (int64_t t = block; t < block_end; ++t) {
        const Share tile = tile_of(rows, t, tiles);
        const int32_t* x = memory + (t - block) * l.tile;
        const int32_t* start = memory + l.starts + (t - block) * groups * kTileStride;
        for (int64_t p = n; p < n_end; p += kNarrowPanel) {
          const int32_t* panel = panel_at(c.packed, p, c.n, words, wide);
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t from = g * (c.group / 4), to = groups == 1 ? words : std::min(from + c.group / 4, words);
            const AddScaled sink{sums + (p - n), c.x_scale + tile.begin * groups + g, groups, g == 0};
            multiply(tile.size(), x + from * kTileStride, panel + from * kNarrowPanel, to - from,
                     start + g * kTileStride, sink);
          }
        }
        finish_in(c.epilogue, tile.begin, tile.size(), n, sums);
      }
    }
  }
}

#endif

void run(const Call& c) {
#ifdef VITFAST_SIMD_LEVELS
  const Grid grid(c.m, c.n, at::get_num_threads());
  const int64_t size = Layout(c).size;
  at::parallel_for(0, grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd_in_this_thread;
    const at::Tensor memory = at::empty({size}, at::kInt);
    for (int64_t i = begin; i < end; ++i) {
      compute(c, share_of(c.m, 1, i / grid.columns, grid.rows),
              share_of(c.n, kNarrowChunk, i % grid.columns, grid.columns), memory.mutable_data_ptr<int32_t>());
    }
  });
#endif
}

int64_t group_of(const at::Tensor& x, const at::Tensor& x_scale) {
  if (x_scale.dim() != x.dim()) return x.size(-1);
  for (int64_t group : kGroups) {
    if ((x.size(-1) + group - 1) / group == x_scale.size(-1)) return group;
  }
  TORCH_CHECK_VALUE(false, kOp, ": x_scale has shape ", shape_text(x_scale.sizes()), " for x of shape ",
                    shape_text(x.sizes()), "; its columns share a scale, or each 128 of them, or each 64");
}

void check(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& packed, const at::Tensor& weight_scale,
           const Optional& bias, const Optional& layer_scale, const Optional& residual, at::ScalarType dtype) {
  const std::string reason = why_no_quantized_linear_cpu();
  TORCH_CHECK_VALUE(reason.empty(), kOp, ": ", reason);
  check_dtype(kOp, "x", x, {at::kChar});
  check_dtype(kOp, "weight", packed, {at::kChar});
  check_dtype(kOp, "x_scale", x_scale, {at::kFloat});
  check_dtype(kOp, "weight_scale", weight_scale, {at::kFloat});
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, kOp,
                    ": dtype must be one of torch.float32, torch.float16, torch.bfloat16, got ", dtype_text(dtype));
  TORCH_CHECK_VALUE(packed.dim() == 2 && x.dim() >= 1 && x.size(-1) >= 1 && x.size(-1) <= kQuantizedLinearMaxInner &&
                        packed.size(1) == (x.size(-1) + 3) / 4 * 4,
                    kOp, ": x [..., K] and packed weight [N, K rounded up to fours], with K from 1 to ",
                    kQuantizedLinearMaxInner, ", do not fit: ", shape_text(x.sizes()), " and ",
                    shape_text(packed.sizes()));
  TORCH_CHECK_VALUE(packed.is_contiguous(), kOp, ": weight is not as pack_quantized_linear returned it: strides ",
                    shape_text(packed.strides()));
  const int64_t n = packed.size(0), group = group_of(x, x_scale);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = (x.size(-1) + group - 1) / group;
  if (x_scale.dim() != x.dim()) shape.pop_back();
  check_shape(kOp, "x_scale", x_scale, shape);
  check_shape(kOp, "weight_scale", weight_scale, {n});
  check_shape(kOp, "bias", bias, {n});
  check_shape(kOp, "layer_scale", layer_scale, {n});
  shape = x.sizes().vec();
  shape.back() = n;
  check_shape(kOp, "residual", residual, shape);
  const std::pair<const char*, const Optional&> in_dtype[] = {
      {"bias", bias}, {"layer_scale", layer_scale}, {"residual", residual}};
  for (const auto& [name, tensor] : in_dtype) {
    if (tensor) check_dtype(kOp, name, *tensor, {dtype});
  }
}

}  // namespace

std::string why_no_quantized_linear_cpu() {
  return simd_level() < Simd::avx512_vnni ? "there is no AVX-512 VNNI here" : "";
}

at::Tensor pack_quantized_linear_cpu(const at::Tensor& weight) {
  constexpr const char* op = "pack_quantized_linear";
  check_dtype(op, "weight", weight, {at::kChar});
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must be [N, K], got shape ", shape_text(weight.sizes()));
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t n = weight.size(0), k = weight.size(1), padded = round_up(Size(op, k), 4).value();
  const at::Tensor source = contiguous(op, "weight", weight);
  const at::Tensor packed = at::empty({n, padded}, weight.options());
  if (weight.numel() == 0) return packed;
  const char* rows = reinterpret_cast<const char*>(read<int8_t>(op, "weight", source));
  char* to = reinterpret_cast<char*>(packed.mutable_data_ptr<int8_t>());
  at::parallel_for(0, (n + kNarrowPanel - 1) / kNarrowPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kNarrowPanel; i < std::min(end * kNarrowPanel, n); i += kNarrowPanel) {
      pack_narrow_panel(rows + i * k, k, std::min(kNarrowPanel, n - i), 0x80808080u, to + i * padded);
    }
  });
  return packed;
}

std::vector<at::Tensor> quantized_linear_packed_cpu(const at::Tensor& x, const at::Tensor& x_scale,
                                                    const at::Tensor& packed, const at::Tensor& weight_scale,
                                                    const Optional& bias, const std::optional<std::string>& activation,
                                                    const Optional& layer_scale, const Optional& residual,
                                                    at::ScalarType dtype, bool requantize) {
  const Activation chosen = activation_named(kOp, activation);
  check(x, x_scale, packed, weight_scale, bias, layer_scale, residual, dtype);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t n = packed.size(0), m = rows_of(kOp, x);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  std::vector<at::Tensor> result{at::empty(shape, x.options().dtype(requantize ? at::kChar : dtype))};
  if (requantize) {
    shape.back() = (Size(kOp, n) + (kNarrowChunk - 1)).value() / kNarrowChunk;
    result.push_back(at::empty(shape, x_scale.options()));
  }
  if (m == 0 || n == 0) return result;

  // Copied if need be; the name is what an error calls them.
  const at::Tensor rows = contiguous(kOp, "x", x), scales = contiguous(kOp, "x_scale", x_scale);
  const at::Tensor columns = padded_columns(kOp, "weight_scale", weight_scale);
  const Optional b = padded_columns(kOp, "bias", bias), scale = padded_columns(kOp, "layer_scale", layer_scale);
  const Optional added = contiguous(kOp, "residual", residual);
  TileEpilogue epilogue;
  epilogue.weight_scale = read<float>(kOp, "weight_scale", columns);
  epilogue.bias = read<float>(kOp, "bias", b);
  epilogue.activation = chosen;
  epilogue.layer_scale = read<float>(kOp, "layer_scale", scale);
  epilogue.residual = read(kOp, "residual", added);
  if (requantize) {
    epilogue.values = result[0].mutable_data_ptr<int8_t>();
    epilogue.scales = result[1].mutable_data_ptr<float>();
  } else {
    epilogue.y = result[0].mutable_data_ptr();
  }
  epilogue.dtype = dtype, epilogue.n = n;
  run({m, n, x.size(-1), read<int8_t>(kOp, "x", rows), read<float>(kOp, "x_scale", scales), group_of(x, x_scale),
       read<int8_t>(kOp, "weight", packed), epilogue});
  return result;
}

}  // namespace vitfast
