"""vitfast doctor: what would run here, and every reason why not."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import peers
from helpers.grids import thinned
from helpers.scripts import python
from typer.testing import CliRunner

import vitfast
from vitfast import testing
from vitfast.cli.app import app
from vitfast.diagnostics import doctor
from vitfast.engine import plan_cache
from vitfast.ops import registry

ROOT = Path(vitfast.__file__).parents[1]


@pytest.fixture(scope="module")
def report():
    return doctor.report()


def shown(report):
    from rich.console import Console

    console = Console(width=250, record=True, file=io.StringIO())
    console.print(doctor.render(report))
    return console.export_text()


def report_without(*modules, **environment):
    """The report of a process in which these modules cannot be imported; of packages, only triton."""
    code = "import json, sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in modules)
    code += "from vitfast.diagnostics import doctor\ndoctor.OPTIONAL = {'triton': 'the kernels'}\n"
    code += "print(json.dumps(doctor.report()))"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_report_is_json(report):
    assert json.loads(json.dumps(report)) == report


def test_versions_and_platform(report):
    import numpy
    import triton

    versions = report["versions"]
    assert versions["vitfast"] == vitfast.__version__
    assert versions["torch"] == torch.__version__
    assert versions["triton"] == triton.__version__
    assert versions["numpy"] == numpy.__version__
    assert versions["cuda"] == torch.version.cuda
    assert report["platform"]["cpu_threads"] == torch.get_num_threads()
    products = report["platform"]["native_products"]
    if registry.backend("linear", "native").missing:
        assert products is None
    else:
        assert "fp32: " in products
        for name, instruction, lacks in (("bf16", "vdpbf16ps", "AVX512-BF16"), ("int8", "vp(dpbusd|maddwd)", "AVX2")):
            found = re.findall(f"{name}: ({instruction}|there is no {lacks} here)", products)
            assert len(found) == 1, products
    assert len(report["devices"]) == torch.cuda.device_count()


PRODUCTS = {
    "avx2": "fp32: AVX2 FMA, bf16: there is no AVX512-BF16 here, int8: vpmaddwd",
    "default": "fp32: the compiler's vectors, bf16: there is no AVX512-BF16 here, int8: there is no AVX2 here",
    "avx512f": "fp32: AVX-512 FMA, bf16: there is no AVX512-BF16 here, int8: vpmaddwd",
    "avx512_vnni": "fp32: AVX-512 FMA, bf16: there is no AVX512-BF16 here, int8: vpdpbusd",
    "avx512_bf16": "fp32: AVX-512 FMA, bf16: vdpbf16ps, int8: vpdpbusd",
}


@pytest.mark.parametrize("level", thinned(PRODUCTS, 5))
def test_products_of_a_cpu_that_can_no_more(level):
    pytest.importorskip("vitfast._C", reason="vitfast._C is not built (a C++ compiler builds it on install)")
    script = "import torch; from vitfast import _C; from vitfast.diagnostics import doctor\n"
    script += "print(_C.build_info()['simd'], doctor._native_products(), sep='\\n')"
    reached, products = python(script, VITFAST_SIMD=level).splitlines()
    if reached != level:
        pytest.skip(f"this CPU has no {level}")
    assert products == PRODUCTS[level]


def test_every_op_device_and_dtype_is_answered_as_the_registry_answers(report):
    found = {(entry["op"], entry["device"], entry["dtype"]): entry for entry in report["backends"]}
    devices = {"cpu", "cuda:0"} if torch.cuda.is_available() else {"cpu"}
    floats, others = {"float32", "float16", "bfloat16"}, {"resample": {"uint8"}}
    others |= {op: {"float8_e4m3fn", "int8"} for op in registry.QUANTIZED_OPS}
    assert len(found) == len(report["backends"])
    assert {op for op, _, _ in found} == set(registry.OPS) == set(doctor.DIMS)
    for op in registry.OPS:
        assert {dtype for name, _, dtype in found if name == op} == others.get(op, floats)
    assert devices <= {device for _, device, _ in found}
    for (op, device, dtype), entry in found.items():
        capability = registry.device_capability(torch.device(device))
        spec = registry.Spec(op, device.split(":")[0], getattr(torch, dtype), capability, doctor.DIMS[op])
        assert entry["uses"] == registry.choose(spec).name
        assert {entry["uses"], *entry["others"]} == set(registry.BACKENDS)
        for name, reasons in entry["others"].items():
            refused = registry.backend(op, name).why_not(spec)
            assert reasons == refused or (not refused and "comes first in default order" in reasons[0])


def test_dims_are_those_of_real_calls():
    """The names in DIMS are the names that limits are stated in."""
    from vitfast.ops import checks

    x, weight = testing.make(2, 3, 8), testing.make(24, 8)
    heads, images = testing.make(2, 3, 1, 8), testing.make(1, 3, 4, 4)
    specs = [
        checks.linear_spec(x, weight),
        checks.mlp_spec(x, weight),
        checks.attention_block_spec(x, testing.make(8, 8), 1),
        checks.attention_spec(heads, heads),
        checks.patch_embed_spec(images, testing.make(8, 48)),
    ]
    for spec in specs:
        assert set(spec.dims) == set(doctor.DIMS[spec.op])


def test_packages(report):
    packages = report["packages"]
    assert set(packages) == set(doctor.OPTIONAL)
    for name, package in packages.items():
        assert (package["version"] is None) != (package["reason"] is None), name
    import rich  # imported by these tests, so surely here

    assert packages[rich.__name__]["version"][0].isdigit()


def test_a_broken_or_missing_package_keeps_its_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise OSError('libsomething.so: cannot open')")
    names = ("broken_package", "missing_package", "triton")
    monkeypatch.setattr(doctor, "OPTIONAL", dict.fromkeys(names, "this test"))
    monkeypatch.syspath_prepend(str(tmp_path))
    report = doctor.report()
    assert report["packages"]["broken_package"]["reason"] == "OSError: libsomething.so: cannot open"
    assert report["packages"]["missing_package"]["reason"] == "ModuleNotFoundError: No module named 'missing_package'"
    assert "broken_package" not in sys.modules
    warnings = "\n".join(report["warnings"])
    assert "broken_package is installed but cannot be imported: OSError" in warnings
    assert "missing_package" not in warnings
    assert "OSError: libsomething.so" in shown(report)


def test_a_package_that_kills_the_process_is_reported(tmp_path, monkeypatch):
    (tmp_path / "deadly_package.py").write_text("import os, sys; print('all is lost', file=sys.stderr); os._exit(9)")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor._versions_in_child(["deadly_package"])["deadly_package"]
    assert found["version"] is None
    assert found["reason"].endswith("CalledProcessError; all is lost")


def test_without_triton_and_without_the_extension():
    report = report_without("triton", "vitfast._C")
    assert report["versions"]["triton"] is None
    assert "triton" in report["packages"]["triton"]["reason"]
    for entry in report["backends"]:
        assert entry["uses"] == "torch"
        assert entry["others"]["triton"][0].startswith("triton kernels cannot be imported: ")
        assert entry["others"]["native"][0].startswith("the C++ extension is not built: ")
    warnings = "\n".join(report["warnings"])
    assert "there are no Triton kernels: triton cannot be imported" in warnings
    assert "the C++ extension is not built" in warnings
    assert "where torch and a C++ compiler are, `pip install --no-build-isolation" in warnings
    assert "triton kernels cannot be imported" in shown(report)


@pytest.mark.parametrize(
    ("interpret", "state"), [pytest.param("0", "is not set", marks=pytest.mark.full), ("1", "is set")]
)
def test_triton_without_a_gpu_says_that_kernels_are_only_interpreted(interpret, state):
    report = report_without(TRITON_INTERPRET=interpret, CUDA_VISIBLE_DEVICES="")
    assert report["devices"] == []
    sentence = next(line for line in report["warnings"] if line.startswith("triton without a CUDA device"))
    assert sentence.endswith(f"TRITON_INTERPRET=1, which {state})")
    reasons = next(entry for entry in report["backends"] if entry["op"] == "linear")["others"]["triton"]
    if interpret == "1":
        assert reasons == ["able, but torch comes first in default order"]
    else:
        assert reasons == ["device cpu is not among cuda"]


def test_what_can_go_wrong_is_warned_of(report):
    bad = report | {
        "versions": report["versions"] | {"torch": "2.10.1", "triton": "3.5.0", "driver": "580.65.06"},
        "devices": [],
        "backends": [report["backends"][0] | {"uses": None}],
    }
    warnings = "\n".join(doctor._warnings(bad))
    assert "torch 2.10.1 is older than 2.11" in warnings
    assert "triton 3.5.0 is older than 3.6" in warnings
    assert "there is an NVIDIA driver (580.65.06), but torch 2.10.1" in warnings
    assert "nothing can run patch_embed in float32" in warnings
    old = {"device": "cuda:0", "name": "T4", "capability": "7.5", "memory": 16 * 2**30, "multiprocessors": 40}
    assert "cuda:0: compute capability 7.5 is below 8.0" in doctor._warnings(report | {"devices": [old]})
    assert "T4, compute capability 7.5, 16 GiB, 40 multiprocessors" in shown(report | {"devices": [old]})


@pytest.mark.parametrize(
    ("triton", "capability", "warned"),
    [("3.6.0", "9.0", True), ("3.7.0", "9.0", False), ("3.6.0", "8.0", False), ("3.6.0", "10.0", False)],
)
def test_the_fence_that_an_old_triton_leaves_out_is_warned_of(report, triton, capability, warned):
    gpu = {"device": "cuda:0", "name": "G", "capability": capability, "memory": 2**30, "multiprocessors": 1}
    given = report | {"devices": [gpu], "versions": report["versions"] | {"triton": triton}}
    assert ("pull request 10537" in "\n".join(doctor._warnings(given))) == warned


def test_an_extension_without_cuda_beside_a_gpu_is_warned_of(report, monkeypatch):
    entry = dataclasses.replace(registry.backend("attention", "torch"), name="native")
    monkeypatch.setattr(doctor.registry, "backend", lambda op, name: entry)
    gpu = {"device": "cuda:0", "name": "A", "capability": "8.0", "memory": 2**30, "multiprocessors": 1}
    for state, warned in (("not built: there is no nvcc", True), ("80;90", False)):
        monkeypatch.setattr(doctor, "_cuda_kernels", lambda state=state: state)
        text = "\n".join(doctor._warnings(report | {"devices": [gpu]}))
        assert ("the C++ extension has no CUDA kernels (there is no nvcc); once that is mended" in text) == warned
        assert "no CUDA kernels" not in "\n".join(doctor._warnings(report | {"devices": []}))


def test_render_names_every_op_package_and_warning(report):
    text = shown(report)
    assert all(word in text for word in (*registry.OPS, *doctor.OPTIONAL, torch.__version__))
    assert text.count("warning: ") == len(report["warnings"])


def test_plan_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cache, "plans_dir", lambda: tmp_path / "plans")
    transformers = peers.import_transformers()
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=96,
                                    image_size=32, patch_size=8, num_labels=5)  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    found = doctor.plan(tmp_path / "model", device="cpu", dtype="fp32")
    sites = {entry["site"]: entry for entry in found["sites"]}
    assert set(sites) >= {"patch_embed", "qkv", "attention", "proj", "fc1", "fc2", "head"}
    assert sites["qkv"]["dims"] == {"M": 17, "K": 64, "N": 192}
    for entry in sites.values():
        assert entry["uses"] in entry["ms"] or not entry["ms"]
        assert entry["uses"] not in entry["refused"]
        everything = {entry["uses"], *entry["ms"], *entry["refused"]}
        assert everything >= {"torch", "native"}, entry  # each backend is chosen, timed or refused with a reason
    able = {(e["op"], e["device"], e["dtype"]): e["engine"] for e in doctor.report()["backends"]}
    for entry in found["sites"]:  # what the report says that an engine takes is what the plan has taken
        assert entry["uses"] in able[entry["op"], "cpu", "float32"]
    again = doctor.plan(tmp_path / "model", device="cpu", dtype="fp32")
    assert again == found  # read from the cache, measurements included
    result = CliRunner().invoke(app, ["doctor", "--plan", str(tmp_path / "model"), "--device", "cpu", "--json"])
    assert result.exit_code == 0
    assert {entry["site"] for entry in json.loads(result.stdout)["sites"]} == set(sites)
    text = CliRunner().invoke(app, ["doctor", "--plan", str(tmp_path / "model"), "--device", "cpu"]).stdout
    assert "attention" in text
    assert "why not the others" in text
    assert found["memory"]["weights"] > 4 * (64 * 3 * 64 + 2 * 64 * 96)
    assert f"{found['memory']['weights'] / 2**20:.1f} MiB of weights" in text
    # Sites that were dropped cost, too.
    assert found["seconds"] >= sum(entry["seconds"] for entry in found["sites"]) > 0
    assert f"measured once in {found['seconds']:.1f} s" in text and found["most_seconds"] is None
    quantized = {entry["site"]: entry for entry in doctor.plan(tmp_path / "model", device="cpu", dtype="fp8")["sites"]}
    assert quantized["quantized_fc1"]["refused"]["torch._scaled_mm"] == "device cpu is not among cuda"
    assert "it has no scale groups" in quantized["fc2_group_scales"]["refused"]["torch._scaled_mm"]
    assert "torch._scaled_mm" not in quantized["quantize"]["refused"]
    assert "it has no scale groups" in quantized["fc2_group_scales"]["refused"]["oneDNN"]
    assert "oneDNN" not in quantized["quantize"]["refused"]
    assert (quantized["attention_quantize"]["op"], quantized["proj_head_scales"]["op"]) == (
        "attention",
        "quantized_linear",
    )
    assert "it has no scale groups of 64" in quantized["proj_head_scales"]["refused"]["torch._scaled_mm"]
    native = quantized["attention_quantize"]["refused"]["native"]
    assert native == "it has no float8_e4m3fn output" or "not built" in native


def test_device_without_plan_is_refused():
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"])
    assert result.exit_code == 2
    assert "--plan" in json.loads(result.stdout)["error"]
