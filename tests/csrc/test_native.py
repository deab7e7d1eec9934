"""The C++ extension: its patch_embed against the oracle, its errors, and building without it."""

import importlib
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.global_state import threads
from helpers.patch_embed import GRID, inputs, packed

from vitfast import ops, testing
from vitfast.ops import accuracy, checks, reference, registry

ROOT = Path(__file__).resolve().parents[2]

built = importlib.util.find_spec("vitfast._C") is not None
needs_extension = pytest.mark.skipif(not built, reason="vitfast._C is not built (a C++ compiler builds it on install)")


def native(*args, **kwargs):
    return registry.backend("patch_embed", "native").call(*args, **kwargs)


@needs_extension
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GRID, ids=lambda case: case[-1])
def test_patch_embed(case, dtype, pixels, channels_last):
    args = [None if t is None else testing.guarded(t) for t in inputs(case, dtype, pixels, channels_last)]
    testing.check_op(native, reference.patch_embed, *args, patch_size=case[4], channels_last=channels_last)


# Pixels multiplied as floats, and as integers; without a limit the level is this machine's highest.
LEVELS = pytest.mark.parametrize("level", ["avx2", "avx512_vnni"], indirect=True)
WITHOUT_BF16 = pytest.mark.parametrize("level", ["default", "avx2", "avx512_vnni"], indirect=True)
BF16 = pytest.mark.parametrize("level", ["avx512_bf16"], indirect=True)


@needs_extension
@LEVELS
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("case", GRID, ids=lambda case: case[-1])
def test_packed_weight(case, channels_last, level):
    images, weight, *rest = inputs(case, torch.float32, torch.uint8, channels_last)
    kwargs = {"patch_size": case[4], "channels_last": channels_last}
    testing.check_op(packed, reference.patch_embed, images, testing.strided(weight), *rest, **kwargs)


@needs_extension
@BF16
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("case", GRID, ids=lambda case: case[-1])
def test_packed_weight_in_bf16(case, channels_last, pixels, level):
    images, weight, *rest = inputs(case, torch.bfloat16, pixels, channels_last)
    kwargs = {"patch_size": case[4], "channels_last": channels_last}
    testing.check_op(packed, reference.patch_embed, images, testing.strided(weight), *rest, **kwargs)


@needs_extension
@WITHOUT_BF16
@pytest.mark.parametrize("case", GRID, ids=lambda case: case[-1])
def test_bf16_without_its_instruction(case, level):
    args, kwargs = inputs(case, torch.bfloat16, torch.uint8, True), {"patch_size": case[4], "channels_last": True}
    testing.check_op(native, reference.patch_embed, *args, **kwargs)
    with pytest.raises(ValueError, match=r"weight has dtype torch.bfloat16, but there is no AVX512-BF16 here"):
        packed(*args, **kwargs)


@needs_extension
@BF16
def test_a_weight_in_pairs_needs_the_instruction(level):
    images, weight, *rest = inputs(GRID[0], torch.bfloat16, torch.uint8, True)
    kwargs = {"patch_size": (16, 16), "channels_last": True}
    ready = ops.native.pack_patch_embed(weight, **kwargs)
    assert ready.shape == (64, 774)
    with pytest.raises(ValueError, match=r"needs K = 3\*16\*16 = 768, got 762"):
        ops.native.patch_embed_packed(images, weight, *rest, **kwargs)
    importlib.import_module("vitfast._C").limit_simd("avx512_vnni")  # the fixture sets it back
    with pytest.raises(ValueError, match="weight is packed in pairs of bf16, but there is no AVX512-BF16 here"):
        ops.native.patch_embed_packed(images, ready, *rest, **kwargs)


@needs_extension
def test_packed_weight_is_checked():
    images, weight, *rest = inputs(GRID[0], torch.float32, torch.uint8, True)
    kwargs = {"patch_size": (16, 16), "channels_last": True}
    with pytest.raises(ValueError, match=r"weight has dtype torch.float16, allowed: torch.float32, torch.bfloat16"):
        packed(images, weight.half(), *rest, **kwargs)
    with pytest.raises(ValueError, match=r"K a multiple of the patch 16x16, got shape \(64, 767\)"):
        packed(images, weight[:, 1:], *rest, **kwargs)
    with pytest.raises(ValueError, match=r"needs K = 3\*16\*16 = 768, got 765"):
        ops.native.patch_embed_packed(images, weight, *rest, **kwargs)
    ready = ops.native.pack_patch_embed(weight, **kwargs)
    assert ready.shape == (64, 771)
    with pytest.raises(ValueError, match=r"not as pack_patch_embed returned it: strides \(1, 64\)"):
        ops.native.patch_embed_packed(images, ready.t().contiguous().t(), *rest, **kwargs)


@needs_extension
@pytest.mark.parametrize("given", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_optional_arguments(given):
    images, weight, *rest = inputs(GRID[0], torch.float32, torch.uint8, True)
    rest = [tensor if there else None for tensor, there in zip(rest, given, strict=True)]
    testing.check_op(native, reference.patch_embed, images, weight, *rest, patch_size=(16, 16), channels_last=True)


@needs_extension
@LEVELS
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
def test_strided_inputs(channels_last, level):
    images, *tensors = inputs(GRID[0], torch.float32, torch.uint8, channels_last)
    tensors = [testing.strided(t) for t in tensors]
    for view in (testing.strided(images), images.transpose(1, 3).contiguous().transpose(1, 3), images.flip(0)[::2]):
        testing.check_op(
            native, reference.patch_embed, view, *tensors, patch_size=(16, 16), channels_last=channels_last
        )


@needs_extension
def test_prefix_does_not_meet_the_weight():
    images, weight, bias, position, prefix = inputs(GRID[0], torch.float32, torch.uint8, True)
    weight[0, 0] = float("inf")
    out = native(images, weight, bias, position, prefix, patch_size=(16, 16), channels_last=True)
    assert torch.equal(out[:, :1], prefix.expand(2, 1, -1))


@needs_extension
def test_empty_batch_and_prefix():
    images, weight, bias, position, prefix = inputs(GRID[0], torch.float32, torch.uint8, True)
    out = native(images[:0], weight, bias, position, prefix, patch_size=(16, 16), channels_last=True)
    assert out.shape == (0, 7, 64)
    out = native(images, weight, bias, position, prefix[:0], patch_size=(16, 16), channels_last=True)
    assert out.shape == (2, 6, 64)


@needs_extension
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@LEVELS
def test_flat_patches_are_nearly_exact(pixels, channels_last, level):
    """Their products cancel; the plain sum leaves the rounding of large terms in a small result."""
    images, weight, *_ = inputs(GRID[0], torch.float32, pixels, channels_last)
    level = torch.tensor([17.0, 120.0, 249.0]) if pixels == torch.uint8 else torch.tensor([-1.8, 0.7, 2.2])
    images.movedim(3 if channels_last else 1, -1).copy_(level)
    per_channel = weight.view(64, -1, 3) if channels_last else weight.view(64, 3, -1)
    per_channel -= per_channel.mean(dim=1 if channels_last else 2, keepdim=True)
    kwargs = {"patch_size": (16, 16), "channels_last": channels_last}
    exact = reference.patch_embed(images, weight, **kwargs, upcast=True)
    ours, plain = ((call(images, weight, **kwargs) - exact).abs().max() for call in (packed, reference.patch_embed))
    assert ours < 0.05 * plain


@needs_extension
def test_threads_agree():
    case = GRID[-1]
    args = inputs(case, torch.float32, torch.uint8, True)
    with threads(1):
        one = native(*args, patch_size=case[4], channels_last=True)
    with threads(3):
        three = native(*args, patch_size=case[4], channels_last=True)
    baseline = reference.patch_embed(*args, patch_size=case[4], channels_last=True)
    accuracy.assert_close(three, one, baseline)


@needs_extension
def test_grad_and_inference_mode():
    images, weight, *rest = inputs(GRID[0], torch.float32, torch.uint8, True)
    want = native(images, weight, *rest, patch_size=(16, 16), channels_last=True)
    with torch.inference_mode():
        assert torch.equal(native(images, weight, *rest, patch_size=(16, 16), channels_last=True), want)
    weight.requires_grad_()
    got = native(images, weight, *rest, patch_size=(16, 16), channels_last=True)
    assert torch.equal(got.detach(), want)


@needs_extension
def test_public_op_reaches_it():
    images, weight, *rest = inputs(GRID[0], torch.bfloat16, torch.uint8, True)
    got = ops.patch_embed(images, weight, *rest, patch_size=(16, 16), channels_last=True, backend="native")
    assert torch.equal(got, native(images, weight, *rest, patch_size=(16, 16), channels_last=True))
    able, _ = registry.candidates(checks.patch_embed_spec(images, weight))
    assert able[0].name == "torch"  # never the unmeasured default


def bad_inputs():
    """Arguments of patch_embed that differ from good ones in one thing."""
    good = dict(
        zip(
            ("images", "weight", "bias", "position", "prefix"),
            inputs(GRID[0], torch.float32, torch.uint8, True),
            strict=True,
        )
    )
    good |= {"patch_size": (16, 16), "channels_last": True}
    images, weight, bias, position, prefix = (good[name] for name in ("images", "weight", "bias", "position", "prefix"))
    for changed in (
        {"images": images.int()},
        {"images": images[0]},
        {"images": images[:, :31]},
        {"images": images[:, :8]},
        {"images": images[..., :2]},
        {"weight": weight.double()},
        {"weight": weight[0]},
        {"weight": weight[:, 1:]},
        {"bias": bias[1:]},
        {"bias": bias.bfloat16()},
        {"position": position[:5]},
        {"position": position.double()},
        {"prefix": prefix[:, 1:]},
        {"prefix": prefix[0]},
        {"prefix": prefix.half()},
        {"patch_size": (0, 16)},
        {"patch_size": (64, 16)},
        {"channels_last": False},
    ):
        yield pytest.param({**good, **changed}, id=f"{next(iter(changed))}-{len(str(changed))}")


@needs_extension
@pytest.mark.parametrize("arguments", list(bad_inputs()))
def test_bad_input_is_refused_in_the_same_words(arguments):
    with pytest.raises(ValueError, match="patch_embed: ") as ours:
        native(**arguments)
    with pytest.raises(ValueError, match="patch_embed: ") as theirs:
        checks.check_patch_embed(**arguments)
    # The native op takes fewer dtypes; the lists of what is allowed differ, and nothing else.
    assert str(ours.value).partition(", allowed")[0] == str(theirs.value).partition(", allowed")[0]


@needs_extension
def test_patch_size_needs_two_numbers():
    images, weight, *_ = inputs(GRID[0], torch.float32, torch.uint8, True)
    with pytest.raises(ValueError, match=r"patch_size must be \(height, width\), got \(16,\)"):
        native(images, weight, patch_size=[16], channels_last=True)


@needs_extension
def test_half_is_not_offered():
    images, weight, *_ = inputs(GRID[0], torch.float16, torch.uint8, True)
    with pytest.raises(registry.BackendError, match="float16"):
        ops.patch_embed(images, weight, patch_size=(16, 16), channels_last=True, backend="native")
    with pytest.raises(ValueError, match=r"weight has dtype torch.float16, allowed: torch.float32, torch.bfloat16"):
        native(images, weight, patch_size=(16, 16), channels_last=True)


@needs_extension
def test_build_info():
    from vitfast import _C

    info = _C.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["simd"] in ("avx512_bf16", "avx512_vnni", "avx512f", "avx2", "default")
    assert set(info) == {"compiler", "flags", "torch", "simd", "threads", "cuda"}
    assert info["cuda"].startswith("not built: ") or torch.version.cuda is not None
    assert set(_C.ops()) <= set(registry.OPS)
    for name in _C.ops():
        assert not registry.backend(name, "native").missing


def test_missing_extension_has_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "vitfast._C", None)
    entry = registry._native("patch_embed")
    assert "the C++ extension is not built" in entry.missing
    with pytest.raises(
        registry.BackendError, match="'native' cannot run patch_embed: the C\\+\\+ extension is not built"
    ):
        entry.call()


def test_a_device_may_have_limits_of_its_own():
    entry = registry.Backend(
        "native",
        "attention",
        print,
        devices=("cpu", "cuda"),
        dtypes=("float32",),
        limits={"head_dim": (1, 256)},
        per_device={"cuda": {"dtypes": ("float16",), "choices": {"head_dim": (32, 64)}, "limits": {"keys": (0, 320)}}},
    )

    def why_not(device, dtype, head_dim, keys):
        return entry.why_not(registry.Spec("attention", device, dtype, None, {"head_dim": head_dim, "keys": keys}))

    assert why_not("cpu", torch.float32, 256, 1000) == []
    assert why_not("cuda", torch.float16, 64, 320) == []
    assert why_not("cuda", torch.float32, 48, 321) == [
        "dtype float32 is not among float16",
        "keys 321 is outside 0..320",
        "head_dim 48 is not among 32, 64",
    ]


def toolkit(folder):
    """A CUDA toolkit as far as setup.py looks at it."""
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        file = folder / name
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    return folder


def test_toolkit_is_found_beside_an_nvcc_that_is_a_script(tmp_path, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("VITFAST_BUILD", "0")
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    locate = runpy.run_path(str(ROOT / "setup.py"))["locate_toolkit"]
    home, script = toolkit(tmp_path / "cuda"), tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.touch(mode=0o755)
    for nvcc, there, found in ((script, {}, str(home)), (home / "bin" / "nvcc", {}, None),
                               (script, {"CUDA_PATH": "elsewhere"}, None)):  # fmt: skip
        with monkeypatch.context() as context:
            context.delenv("CUDA_HOME", raising=False)
            context.delenv("CUDA_PATH", raising=False)
            context.setenv("PATH", str(nvcc.parent))
            for name, value in there.items():
                context.setenv(name, value)
            locate(home)
            assert os.environ.get("CUDA_HOME") == found
            os.environ.pop("CUDA_HOME", None)


@pytest.mark.full
def test_cuda_part_is_set_up_where_torch_has_cuda(tmp_path):
    home = toolkit(tmp_path)
    code = (
        "import json, runpy, sys, setuptools, torch.utils.cpp_extension as e;"
        f"e.torch.version.cuda = '13.0'; e.CUDA_HOME = {str(home)!r};"
        "sys.argv = ['setup.py', 'build_ext'];"
        "setuptools.setup = lambda ext_modules, **rest: print(json.dumps([ext_modules[0].sources,"
        " ext_modules[0].extra_compile_args['nvcc'], ext_modules[0].define_macros]));"
        "runpy.run_path('setup.py')"
    )

    def configured(archs):
        environment = {key: value for key, value in os.environ.items() if key != "VITFAST_BUILD"} | archs
        environment["CXX"] = sys.executable  # nothing is compiled: what tells its version will do
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)

    sources, nvcc, macros = json.loads(configured({"VITFAST_CUDA_ARCHS": "80;90"}).stdout)
    assert {f"csrc/cuda/{op}{part}" for op in ("patch_embed", "linear") for part in (".cu", "_op.cpp")} <= set(sources)
    assert {"csrc/cuda/attention.cu", "csrc/cuda/attention_op.cpp", "csrc/cpu/attention.cpp"} <= set(sources)
    assert {"-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"} <= set(nvcc)
    assert ["VITFAST_CUDA_STATE", '"80;90a"'] in macros
    if not torch.cuda.is_available():
        assert "no CUDA kernels: there is no GPU of compute capability 8.0" in configured({}).stderr
    (home / "include" / "cuda_runtime.h").unlink()
    assert f"there is no cuda_runtime.h below {home}" in configured({}).stderr


@pytest.mark.parametrize(
    ("environment", "code", "status", "message"),
    [
        ({"VITFAST_BUILD": "0"}, "", 0, "NOTICE: installing without the C++ extension: VITFAST_BUILD=0"),
        ({}, "sys.modules['torch'] = None;", 0, "NOTICE: installing without the C++ extension: torch cannot be"),
        ({"CXX": "no-such-c++"}, "", 0, "there is no C++ compiler 'no-such-c++'"),
        ({"CXX": "false"}, "", 0, "the C++ compiler 'false' does not even tell its version"),
        ({"VITFAST_BUILD": "1", "CXX": "no-such-c++"}, "", 1, "VITFAST_BUILD=1, but the C++ extension cannot be"),
    ],
    ids=["off", "no torch", "no compiler", "broken compiler", "insisted on"],
)
def test_install_without_extension(tmp_path, environment, code, status, message):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    shutil.copy(ROOT / "setup.py", tmp_path)
    code = f"import sys, runpy; {code} sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py')"
    clean = {key: value for key, value in os.environ.items() if key not in ("VITFAST_BUILD", "CXX")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == status, result.stderr
    assert message in result.stderr


@needs_extension
@pytest.mark.parametrize(
    ("level", "dtypes"),
    [
        ("default", set()),
        ("avx2", {"float32", "int8"}),
        ("avx512f", {"float32", "int8"}),
        ("avx512_vnni", {"float32", "int8"}),
        ("avx512_bf16", {"float32", "bfloat16", "int8"}),
    ],
    indirect=["level"],
)
def test_product_roofs(level, dtypes):
    from vitfast import _C

    roofs = _C.product_roofs()
    assert set(roofs) == dtypes and all(rate > 1e8 for rate in roofs.values())
