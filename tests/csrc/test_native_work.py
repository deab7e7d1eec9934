"""How threads share out the work of the native ops on a CPU: csrc/cpu/work.h by itself, and ops with it."""

import subprocess

import pytest
import torch
from helpers.emulated import COMPILER, ROOT, needs_compiler
from helpers.global_state import threads

from vitfast import testing
from vitfast.ops import reference, registry

PARALLEL = """
#pragma once
#include <cstdint>
#include <thread>
#include <vector>
namespace at {
inline int64_t get_num_threads() { return 4; }
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  std::vector<std::thread> team;
  for (int64_t i = begin; i < end; ++i) team.emplace_back([&f, i] { f(i, i + 1); });
  for (std::thread& one : team) one.join();
}
}  // namespace at
"""
"""In place of torch's: a thread for each share."""

PROGRAM = """
#include "work.h"
#include <cstdio>
using vitfast::Work;

int main(int, char** arguments) {
  if (arguments[1][0] == 'o') {  // one thread comes first
    const int64_t items[] = {3, 0, 2, 5};
    Work work(4, [&](int64_t share) { return items[share]; });
    Work::Item item;
    while (work.take(2, item)) std::printf("%d.%d ", int(item.share), int(item.index));
    std::printf("%d", work.take(0, item));
    return 0;
  }
  constexpr int64_t kShares = 6, kItems = 40000;
  for (int times = 0; times < 5; ++times) {
    std::vector<std::atomic<int>> taken(kShares * kItems);
    std::atomic<int64_t> stolen{0};
    Work work(kShares, [&](int64_t share) { return share == 1 ? 0 : kItems; });
    work.run([&](int64_t mine) {
      for (Work::Item item; work.take(mine, item);) {
        ++taken[item.share * kItems + item.index];
        stolen += item.share != mine;
      }
    });
    for (int64_t i = 0; i < kShares * kItems; ++i) {
      if (taken[i] != (i / kItems != 1)) return std::printf("item %d: %d times", int(i), int(taken[i])), 0;
    }
    if (stolen == 0) return std::printf("nobody took from another"), 0;
  }
  std::vector<std::atomic<int>> seen(1000);
  vitfast::share_out(1000, 7, [&] {
    return [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++seen[i];
    };
  });
  for (int64_t i = 0; i < 1000; ++i) {
    if (seen[i] != 1) return std::printf("number %d: %d times", int(i), int(seen[i])), 0;
  }
  vitfast::share_out(0, 7, [&] { return [&](int64_t, int64_t) { std::printf("of nothing something "); }; });
  std::printf("each once");
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    (folder / "ATen").mkdir()
    (folder / "ATen" / "Parallel.h").write_text(PARALLEL)
    (folder / "work.cpp").write_text(PROGRAM)
    command = [*COMPILER, "-std=c++20", "-O2", "-Wall", "-Wextra", "-pthread", f"-I{folder}", f"-I{ROOT}/csrc/cpu"]
    made = subprocess.run([*command, folder / "work.cpp", "-o", folder / "work"], capture_output=True, text=True)
    assert made.returncode == 0 and not made.stderr, made.stderr
    return lambda what: subprocess.run([folder / "work", what], capture_output=True, text=True, check=True).stdout


@needs_compiler
def test_whose_share_is_done_takes_the_last_of_the_longest(program):
    assert program("one") == "2.0 2.1 3.4 3.3 0.2 3.2 0.1 3.1 0.0 3.0 0"


@needs_compiler
def test_each_item_is_taken_once(program):
    assert program("many") == "each once"


def arguments(op, rows, dtype):
    """Of several blocks of rows, and chunks of columns; 384 of them are read where they lie, 1024 packed."""
    x, wide = testing.make(rows, 384, dtype=dtype), testing.make(rows, 1024, dtype=dtype)
    weight = torch.randint(-127, 128, (520, 384), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    return {
        "linear": [(x, testing.make(520, 384, dtype=dtype)), (wide, testing.make(300, 1024, dtype=dtype))],
        "attention": [testing.make(3, 150, 3, 4, 64, dtype=dtype).unbind(2)],
        "layer_norm": [(x, torch.ones(384, dtype=dtype), torch.zeros(384, dtype=dtype), 1e-6)],
        "quantize": [(x,)],
        "quantized_linear": [(*reference.quantize(x, dtype=torch.int8), weight, torch.ones(520))],
    }[op]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["linear", "attention", "layer_norm", "quantize", "quantized_linear"])
def test_more_threads_than_cores_give_the_same_bits(op, dtype):
    """Those that run first do most of what there is to do."""
    native = registry.backend(op, "native")
    if reasons := native.why_not(registry.Spec(op, "cpu", torch.int8 if "quantize" in op else dtype)):
        pytest.skip("; ".join(reasons))
    call = native.call if op != "quantize" else lambda x: native.call(x, dtype=torch.int8)
    for given in arguments(op, 700, dtype):
        with threads(1):
            want = call(*given)
        for count in (2, 5, 16):
            with threads(count):
                for _ in range(5):
                    torch.testing.assert_close(call(*given), want, rtol=0, atol=0)
