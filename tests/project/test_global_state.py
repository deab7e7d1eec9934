"""A test that changes a setting of the process and leaves it so fails, and no other test with it."""

import re
import shutil
import subprocess
import sys
import threading

import pytest
from helpers.global_state import SETTINGS, restore, snapshot, threads_since
from helpers.scripts import ROOT

CULPRITS = {
    "torch's threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "the cores this process may use": "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
    "the SIMD level": "from vitfast import _C; _C.limit_simd('default')",
    "the default dtype": "torch.set_default_dtype(torch.float64)",
    "whether gradients are recorded": "torch.set_grad_enabled(False)",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True)",
    "precision of fp32 products": "torch.set_float32_matmul_precision('high')",
    "TF32 in cuDNN": "torch.backends.cudnn.allow_tf32 = True",
    "nn.MultiheadAttention's fast path": "torch.backends.mha.set_fastpath_enabled(False)",
    "the working directory": "os.chdir('/')",
}


def able(name: str) -> bool:
    """Whether the setting can be changed here."""
    before = snapshot()[name]
    return len(before) > 1 if name.startswith("the cores") else before not in (None, "default")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_seen_and_put_back(name):
    if name == "the SIMD level":
        pytest.importorskip("vitfast._C", reason="vitfast._C is not built (a C++ compiler builds it on install)")
    if not able(name):
        pytest.skip(f"{name} cannot be changed on this machine")
    before = snapshot()
    exec("import os, torch; " + CULPRITS[name])
    (changed,) = restore(before)
    assert changed.startswith(f"{name}: {before[name]} became ")
    assert snapshot() == before
    assert restore(before) == []


def test_the_culprit_fails_and_no_other(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_threads.py").write_text(
        "import torch\n"
        "before = torch.get_num_threads()\n"
        "def test_culprit(): torch.set_num_threads(before + 1)\n"
        "def test_next(): assert torch.get_num_threads() == before\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={ROOT} {ROOT}/tests"]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ERROR at teardown of test_culprit" in done.stdout, done.stdout
    assert re.search(r"^the test left changed torch's threads: \d+ became \d+$", done.stdout, re.MULTILINE)
    assert "2 passed, 1 error" in done.stdout


def test_a_thread_left_behind_is_named():
    before, end = set(threading.enumerate()), threading.Event()
    ours = threading.Thread(target=lambda: end.wait(), name="left behind")
    others = threading.Thread(target=end.wait)  # whose frames are all of the standard library
    ours.start(), others.start()
    try:
        assert threads_since(before, 0.01) == ["left behind"]
        assert threads_since({*before, ours}, 0.01) == []
    finally:
        end.set()
    assert threads_since(before) == []
