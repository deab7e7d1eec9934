"""Test set-up: Triton's interpreter where there is no GPU, poisoned allocations everywhere.

VITFAST_EXECUTE=90 (or 80) runs what the compiler makes of the kernels for that chip instead: `helpers.ptx.device`.
"""

import os
import threading

import torch

if not torch.cuda.is_available():
    if "VITFAST_EXECUTE" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    # The interpreter's numpy and torch's thread pools fight over cores; tests are small.
    torch.set_num_threads(min(torch.get_num_threads(), 2))

import pytest
from helpers import global_state, interpreter

from vitfast import testing
from vitfast.attention import sdpa
from vitfast.engine import plan_cache
from vitfast.ops import registry

EXECUTE = int(os.environ.get("VITFAST_EXECUTE", 0))
"""The chip whose compiled kernels are executed, 0 for none."""
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
if not torch.cuda.is_available() and not EXECUTE:
    testing.repair_interpreter()
    interpreter.hasten()


def pytest_runtest_logreport(report):
    """A GPU's context that a test killed fails all tests after it: end this worker, and xdist begins another."""
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            os.write(2, f"{report.nodeid} killed the GPU's context: {error}\n".encode())
            os._exit(1)


@pytest.fixture(autouse=True)
def _global_state():
    """A test that leaves a setting of the process changed fails, and the next one finds it as it was."""
    before = global_state.snapshot()
    yield
    if changed := global_state.restore(before):
        pytest.fail(f"the test left changed {'; '.join(changed)}", pytrace=False)


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """Threads that a module's tests start end with it: one left spinning slows, and disturbs, all that come after."""
    before = set(threading.enumerate())
    yield
    if left := global_state.threads_since(before):
        pytest.fail(f"threads are left running: {', '.join(left)}", pytrace=False)


@pytest.fixture(autouse=True)
def _poison():
    with testing.poisoned_allocations():
        yield


@pytest.fixture(autouse=True, scope="session")
def _executor():
    """The GPU made of compiled code, where it is asked for."""
    if not EXECUTE:
        yield
        return
    from helpers.ptx.device import executing

    with executing(EXECUTE) as device:
        yield device


@pytest.fixture(autouse=True, scope="session")
def _own_plans(tmp_path_factory):
    """Plans measured here stay here, and none that another version left behind is read."""
    folder = tmp_path_factory.mktemp("plans")
    patch = pytest.MonkeyPatch()
    patch.setattr(plan_cache, "plans_dir", lambda: folder)
    yield
    patch.undo()


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of vitfast's attention."""
    made, original, fused = [], sdpa.scaled_dot_product_attention, sdpa.fused

    def counted(*args, **kwargs):
        made.append(kwargs)
        return original(*args, **kwargs)

    def counted_fused(*args, **kwargs):
        out = fused(*args, **kwargs)
        made.extend([kwargs] * (out is not None))
        return out

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(sdpa, "fused", counted_fused)
    return made


SIMD_LEVELS = ("default", "avx2", "avx512f", "avx512_vnni", "avx512_bf16")


@pytest.fixture(params=[level for level in SIMD_LEVELS if level != "avx512_vnni"])
def level(request):
    """The C++ extension's CPU ops at each SIMD level that this machine has; the integers' own where a test names it."""
    _C = pytest.importorskip("vitfast._C", reason="vitfast._C is not built (a C++ compiler builds it on install)")
    for op in registry.OPS:  # what this machine lacks is looked up once: not while it is limited
        registry.backend(op, "native")
    _C.limit_simd(request.param)
    try:
        if _C.build_info()["simd"] != request.param:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param
    finally:
        _C.limit_simd(SIMD_LEVELS[-1])
