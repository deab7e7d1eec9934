"""What tests of CUDA kernels look for in nvcc's report is there where it should be: spills, and products that wait."""

import subprocess

import pytest
from helpers.emulated import ROOT, needs_nvcc

pytestmark = [pytest.mark.full, needs_nvcc]

SPILLING = """
__global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float values[96];
  for (int i = 0; i < 96; ++i) values[i] = x[threadIdx.x + i * 1024];
  __syncthreads();
  for (int i = 0; i < 96; ++i) x[threadIdx.x * 96 + i] = values[i] * values[95 - i];
}
"""
# Sums are changed after each product, with a wait for it or without.
WAITING = """
#include "device/products.cuh"
using namespace vitfast;

__global__ void __launch_bounds__(128, 1) products(float* y, uint32_t x, uint32_t w, int steps) {
  float sums[64] = {};
  for (int step = 0; step < steps; ++step) {
    product_fence();
    multiply_add_async(bf16{}, sums, operand(x + step * 128), operand(w + step * 128), step > 0);
    product_commit();
    product_wait<0>();
    for (auto& s : sums) s *= 0.5f;
  }
  for (int i = 0; i < 64; ++i) y[threadIdx.x * 64 + i] = sums[i];
}
"""


def report(source, tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text(source)
    command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-cubin", "-o", tmp_path / "kernel.cubin", file]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_spills(tmp_path):
    assert " 0 bytes spill stores" not in report(SPILLING, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores" in report(SPILLING.replace("1024, 2", "256, 1"), tmp_path)


def test_products_that_wait(tmp_path):
    """Only information to ptxas, so that its -Werror lets it pass."""
    assert "warpgroup" not in report(WAITING, tmp_path)
    noted = report(WAITING.replace("product_wait<0>();", ""), tmp_path)
    assert "warpgroup" in noted and "C7517" in noted
