// Schemas, registration and the Python module vitfast._C; no computation.

#include "ops.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <iterator>
#include <string>

#include "cpu/memory.h"
#include "cpu/product_roof.h"
#include "cpu/simd.h"
#include "cuda/attention.h"
#include "cuda/linear.h"

namespace py = pybind11;

// Each op is called exactly like its reference in vitfast/ops/reference.py.
TORCH_LIBRARY(vitfast_native, m) {
  m.def(
      "patch_embed(Tensor images, Tensor weight, Tensor? bias=None, Tensor? position=None, Tensor? prefix=None, *, "
      "int[] patch_size, bool channels_last=False) -> Tensor");
  // The same with what pack_patch_embed made of a weight; uint8: of images that are.
  m.def("pack_patch_embed(Tensor weight, *, int[] patch_size, bool channels_last=False, bool uint8=False) -> Tensor");
  // Why pack_patch_embed makes no integers of a weight for uint8 images, or "".
  m.def("why_no_integers(Tensor weight, *, int[] patch_size, bool channels_last=False) -> str");
  m.def(
      "patch_embed_packed(Tensor images, Tensor packed, Tensor? bias=None, Tensor? position=None, Tensor? prefix=None, "
      "*, int[] patch_size, bool channels_last=False) -> Tensor");
  // vitfast/ops/native.py calls these two like the reference. y, and with stats the row statistics of y.
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def(
      "linear_packed(Tensor x, Tensor packed, Tensor? bias, str? activation, Tensor? layer_scale, Tensor? residual, "
      "Tensor? row_stats, Tensor? weight_sum, float eps, bool stats) -> Tensor[]");
  // Like the reference in vitfast/ops/native.py, too. y, and with requantize its scales.
  m.def(
      "quantized_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation, "
      "Tensor? layer_scale, Tensor? residual, ScalarType dtype, bool requantize) -> Tensor[]");
  // The same in int8 on a CPU, with what pack_quantized_linear made of the weight.
  m.def("pack_quantized_linear(Tensor weight) -> Tensor");
  m.def(
      "quantized_linear_packed(Tensor x, Tensor x_scale, Tensor packed, Tensor weight_scale, Tensor? bias, "
      "str? activation, Tensor? layer_scale, Tensor? residual, ScalarType dtype, bool requantize) -> Tensor[]");
  m.def(
      "quantize(Tensor x, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-06, *, ScalarType dtype) -> "
      "(Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps=1e-06) -> Tensor");
  m.def("add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps=1e-06) -> (Tensor, Tensor)");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, *, Tensor? bias=None, Tensor? mask=None, bool causal=False, "
      "float? scale=None) -> Tensor");
  // The same in int8, on a CPU: values and a scale for each head of a row.
  m.def(
      "attention_quantize(Tensor q, Tensor k, Tensor v, *, Tensor? bias=None, Tensor? mask=None, bool causal=False, "
      "float? scale=None) -> (Tensor, Tensor)");
  // keep, which the reference has not: the first so many channels, along rows.
  m.def("resample(Tensor images, Tensor first, Tensor weights, *, int axis, int? keep=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(vitfast_native, CPU, m) {
  m.impl("patch_embed", &vitfast::patch_embed_cpu);
  m.impl("pack_patch_embed", &vitfast::pack_patch_embed_cpu);
  m.impl("why_no_integers", &vitfast::why_no_integers_cpu);
  m.impl("patch_embed_packed", &vitfast::patch_embed_packed_cpu);
  m.impl("pack_linear", &vitfast::pack_linear_cpu);
  m.impl("linear_packed", &vitfast::linear_packed_cpu);
  m.impl("pack_quantized_linear", &vitfast::pack_quantized_linear_cpu);
  m.impl("quantized_linear_packed", &vitfast::quantized_linear_packed_cpu);
  m.impl("quantize", &vitfast::quantize_cpu);
  m.impl("layer_norm", &vitfast::layer_norm_cpu);
  m.impl("add_layer_norm", &vitfast::add_layer_norm_cpu);
  m.impl("attention", &vitfast::attention_cpu);
  m.impl("attention_quantize", &vitfast::attention_quantize_cpu);
  m.impl("resample", &vitfast::resample_cpu);
}

#ifdef VITFAST_CUDA
TORCH_LIBRARY_IMPL(vitfast_native, CUDA, m) {
  m.impl("patch_embed", &vitfast::patch_embed_cuda);
  m.impl("linear_packed", &vitfast::linear_packed_cuda);
  m.impl("quantized_linear", &vitfast::quantized_linear_cuda);
  m.impl("attention", &vitfast::attention_cuda);
}
#endif

namespace {

// A dtype that an op has, but not on this CPU, and why; nothing where there is no reason.
py::dict lacking(const char* dtype, const std::string& reason) {
  py::dict why;
  if (!reason.empty()) why[dtype] = reason;
  return why;
}

// op -> what it can do, in the words of vitfast.ops.registry.Backend.
py::dict ops() {
  using namespace py::literals;
  const py::tuple devices = py::make_tuple("cpu"), dtypes = py::make_tuple("float32", "bfloat16");
  py::dict all;
  all["linear"] = py::dict("devices"_a = devices, "dtypes"_a = dtypes,
                           "lacking"_a = lacking("bfloat16", vitfast::why_no_linear_bf16_cpu()));
  for (const char* op : {"patch_embed", "layer_norm", "add_layer_norm"}) {
    all[op] = py::dict("devices"_a = devices, "dtypes"_a = dtypes);
  }
  all["attention"] =
      py::dict("devices"_a = devices, "dtypes"_a = dtypes, "limits"_a = py::dict("head_dim"_a = py::make_tuple(1, 256)),
               "features"_a = py::make_tuple("causal", "int8 output"));
  all["quantize"] = py::dict("devices"_a = devices, "dtypes"_a = py::make_tuple("int8"));
  all["resample"] = py::dict("devices"_a = devices, "dtypes"_a = py::make_tuple("uint8"));
  py::dict in_int8("dtypes"_a = py::make_tuple("int8"),
                   "limits"_a = py::dict("K"_a = py::make_tuple(1, vitfast::kQuantizedLinearMaxInner)),
                   "features"_a = py::make_tuple("scale groups", "scale groups of 64", "swiglu"),
                   "lacking"_a = lacking("int8", vitfast::why_no_quantized_linear_cpu()));
  all["quantized_linear"] = py::dict("devices"_a = devices, "per_device"_a = py::dict("cpu"_a = in_int8));
#ifdef VITFAST_CUDA
  py::tuple head_dims(std::size(vitfast::kAttentionHeadDims));
  for (size_t i = 0; i < head_dims.size(); ++i) head_dims[i] = vitfast::kAttentionHeadDims[i];
  for (const char* op : {"patch_embed", "attention"}) all[op]["devices"] = py::make_tuple("cpu", "cuda");
  all["patch_embed"]["per_device"] =
      py::dict("cuda"_a = py::dict("dtypes"_a = py::make_tuple("bfloat16"), "min_capability"_a = py::make_tuple(8, 0)));
  all["attention"]["per_device"] = py::dict(
      "cuda"_a = py::dict("dtypes"_a = py::make_tuple("float16", "bfloat16"), "min_capability"_a = py::make_tuple(8, 0),
                          "limits"_a = py::dict("keys"_a = py::make_tuple(0, vitfast::kAttentionMaxKeys)),
                          "choices"_a = py::dict("head_dim"_a = head_dims), "features"_a = py::make_tuple()));
  if (vitfast::linear_cuda_built()) {
    const py::int_ multiple(vitfast::kLinearMultiple);
    all["linear"]["devices"] = all["attention"]["devices"];
    all["linear"]["per_device"] = py::dict(
        "cuda"_a = py::dict("dtypes"_a = py::make_tuple("float16", "bfloat16"),
                            "min_capability"_a = py::make_tuple(9, 0), "max_capability"_a = py::make_tuple(9, 0),
                            "multiples"_a = py::dict("K"_a = multiple, "N"_a = multiple), "lacking"_a = py::dict()));
    const py::int_ in_8_bits(vitfast::kQuantizedMultiple);
    all["quantized_linear"] =
        py::dict("devices"_a = py::make_tuple("cpu", "cuda"), "dtypes"_a = py::make_tuple("float8_e4m3fn"),
                 "min_capability"_a = py::make_tuple(9, 0), "max_capability"_a = py::make_tuple(9, 0),
                 "multiples"_a = py::dict("K"_a = in_8_bits, "N"_a = in_8_bits),
                 "features"_a = py::make_tuple("scale groups"), "per_device"_a = py::dict("cpu"_a = in_int8));
  }
#endif
  return all;
}

void limit_simd(const std::string& name) { vitfast::simd_limit() = vitfast::simd_named(name); }

py::dict product_roofs() {
  py::dict roofs;
  for (const auto& [dtype, rate] : vitfast::product_roofs()) roofs[dtype.c_str()] = rate;
  return roofs;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = VITFAST_COMPILER;
  info["flags"] = VITFAST_CXX_FLAGS;
  info["torch"] = TORCH_VERSION;
  info["simd"] = vitfast::kSimdNames[static_cast<int>(vitfast::simd_level())];
#ifdef _OPENMP
  info["threads"] = "openmp";
#else
  info["threads"] = "none";
#endif
  info["cuda"] = VITFAST_CUDA_STATE;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  vitfast::simd_limit();  // so that a level that VITFAST_SIMD misspells is an error now
  m.doc() = "The C++ extension of vitfast. Importing it registers torch.ops.vitfast_native; import torch first.";
  m.def("ops", &ops, "The ops in torch.ops.vitfast_native, each with the devices and dtypes it runs on.");
  m.def("build_info", &build_info,
        "Compiler, flags, torch version, SIMD level in use here, threading, and CUDA or why not.");
  m.def("product_roofs", &product_roofs,
        "FLOP/s of the CPU's product instructions in loops that stay in registers, by dtype; for benchmarks.");
  py::class_<vitfast::MemoryPool, std::shared_ptr<vitfast::MemoryPool>>(
      m, "MemoryPool",
      "Memory that ops on the CPU leave to each other: entered as a context, it holds the large outputs of what the "
      "thread calls inside. Outputs may outlive it.")
      .def(py::init(&std::make_shared<vitfast::MemoryPool>))
      .def("__enter__", &vitfast::MemoryPool::enter)
      .def("__exit__", [](vitfast::MemoryPool&, const py::args&) { vitfast::MemoryPool::exit(); })
      .def_property_readonly("idle_bytes", &vitfast::MemoryPool::idle_bytes, "Bytes it holds that no tensor uses.");
  m.def("limit_simd", &limit_simd,
        "The highest SIMD level the CPU's ops may use: for tests of the levels below this CPU's.");
}
