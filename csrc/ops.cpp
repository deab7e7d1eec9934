// Schemas, registration and the Python module vitfast._C; no computation.

#include "ops.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/simd.h"

namespace py = pybind11;

// Each op is called exactly like its reference in vitfast/ops/reference.py.
TORCH_LIBRARY(vitfast_native, m) {
  m.def(
      "patch_embed(Tensor images, Tensor weight, Tensor? bias=None, Tensor? position=None, Tensor? prefix=None, *, "
      "int[] patch_size, bool channels_last=False) -> Tensor");
  // vitfast/ops/native.py calls these two like the reference. y, and with stats the row statistics of y.
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def(
      "linear_packed(Tensor x, Tensor packed, Tensor? bias, str? activation, Tensor? layer_scale, Tensor? residual, "
      "Tensor? row_stats, Tensor? weight_sum, float eps, bool stats) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(vitfast_native, CPU, m) {
  m.impl("patch_embed", &vitfast::patch_embed_cpu);
  m.impl("pack_linear", &vitfast::pack_linear_cpu);
  m.impl("linear_packed", &vitfast::linear_packed_cpu);
}

namespace {

// op -> what it can do, in the words of vitfast.ops.registry.Backend.
py::dict ops() {
  py::dict patch_embed;
  patch_embed["devices"] = py::make_tuple("cpu");
  patch_embed["dtypes"] = py::make_tuple("float32", "bfloat16");
  py::dict linear;
  linear["devices"] = py::make_tuple("cpu");
  linear["dtypes"] = py::make_tuple("float32");
  py::dict all;
  all["patch_embed"] = patch_embed;
  all["linear"] = linear;
  return all;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = VITFAST_COMPILER;
  info["flags"] = VITFAST_CXX_FLAGS;
  info["torch"] = TORCH_VERSION;
  info["simd"] = vitfast::simd_level();
#ifdef _OPENMP
  info["threads"] = "openmp";
#else
  info["threads"] = "none";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The C++ extension of vitfast. Importing it registers torch.ops.vitfast_native; import torch first.";
  m.def("ops", &ops, "The ops in torch.ops.vitfast_native, each with the devices and dtypes it runs on.");
  m.def("build_info", &build_info, "Compiler, flags, torch version, SIMD level in use here, and threading.");
}
