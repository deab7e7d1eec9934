"""Tuning: what gets into a GPU's table, and that the launchers and the registry read it."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from helpers.benching import CountedDevice

from vitfast import testing
from vitfast.benchmarks import sweep
from vitfast.benchmarks.cases import Case
from vitfast.benchmarks.providers import BASELINE
from vitfast.kernels import linear
from vitfast.kernels._parts import launch
from vitfast.kernels.linear import POINTER_CONFIGS, TMA_CONFIGS
from vitfast.ops import registry

DEVICE = testing.device()
ENTRY = {"gpu": "NVIDIA H100", "date": "2026", "commit": "0" * 40, "torch": "2", "packages": {"triton": "3.9"}}


def kernel_file(op):
    return importlib.import_module(f"vitfast.kernels.{op}")


def case(op="linear", dtype=torch.float16, **dims):
    base = {"linear": {"M": 9, "K": 40, "N": 24, "epilogue": "gelu"},
            "mlp": {"rows": 9, "width": 32, "hidden": 64, "activation": "gelu"},
            "attention_block": {"batch": 1, "tokens": 9, "heads": 1, "head_dim": 32, "width": 32},
            "quantized_linear": {"M": 9, "K": 40, "N": 24, "epilogue": "gelu", "precision": "fp8"},
            "layer_norm": {"rows": 7, "width": 64}, "row_stats": {"rows": 7, "width": 64}}[op]  # fmt: skip
    return Case(op, base | dims, DEVICE, dtype)


def measured(op, key, dims=None, **ms):
    rows = [{"provider": p.replace("_", " "), "correct": t is not None, "median_ms": t} for p, t in ms.items()]
    return case(op, **(dims or {})), key, [{"provider": BASELINE, "correct": True, "median_ms": 1.0}, *rows]


def test_the_fastest_that_is_right_everywhere_is_chosen():
    found = [
        measured("mlp", "a", vitfast_triton_x=0.5, vitfast_triton_y=0.6, vitfast_triton_z=0.1),
        measured("mlp", "a", vitfast_triton_x=0.9, vitfast_triton_y=0.6, vitfast_triton_z=None),  # z is wrong here
    ]
    choices = sweep.decide(found)
    expected = {"swept": {"mlp": ["float16"]}, "proven": {"mlp": ["float16"]}, "configs": {"mlp": {"a": "y"}}}
    assert choices == expected


def test_an_op_slower_anywhere_is_tuned_but_not_proven():
    choices = sweep.decide([
        measured("linear", "a", vitfast_triton_x=0.5), measured("linear", "b", vitfast_triton_x=1.1),
        measured("layer_norm", "", vitfast_triton=0.7),
    ])  # fmt: skip
    assert choices["proven"] == {"layer_norm": ["float16"]}
    assert choices["configs"] == {"linear": {"a": "x", "b": "x"}}


def test_an_op_is_proven_in_each_dtype_by_itself():
    fp8, int8 = ({"precision": precision} for precision in ("fp8", "int8"))
    choices = sweep.decide([
        measured("quantized_linear", "a", dims=fp8, vitfast_triton_x=0.5),
        measured("quantized_linear", "b", dims=int8, vitfast_triton_x=1.1),
    ])  # fmt: skip
    assert choices["swept"] == {"quantized_linear": ["float8_e4m3fn", "int8"]}
    assert choices["proven"] == {"quantized_linear": ["float8_e4m3fn"]}


def test_an_op_wrong_anywhere_is_neither():
    choices = sweep.decide([measured("linear", "a", vitfast_triton_x=None)])
    assert choices["proven"] == {} and choices["configs"] == {}


def test_sweep_gates_every_config(monkeypatch):
    """A config made faster than all and slightly wrong must not be chosen; one made fast and right must."""
    device = CountedDevice()
    right = linear.linear

    def doctored(*args, config, **kwargs):
        y = right(*args, **kwargs, config=config)
        device.now += {"tma_64x64x64": 1.0, "tma_64x128x64": 2.0}.get(config.name, 5.0)
        return y * 1.02 if config.name == "tma_64x64x64" else y

    monkeypatch.setattr(linear, "linear", doctored)
    rows = []
    choices = sweep.sweep([case()], device, rounds=2, on_rows=rows.extend)
    by_provider = {row["provider"]: row for row in rows}
    assert by_provider["vitfast triton tma_64x64x64"]["error"].startswith("incorrect")
    assert "median_ms" not in by_provider["vitfast triton tma_64x64x64"]
    assert by_provider.keys() == {BASELINE, *(f"vitfast triton {config.name}" for config in TMA_CONFIGS)}  # not all
    (key,) = choices["configs"]["linear"]
    assert choices["configs"]["linear"][key] == "tma_64x128x64"


@pytest.mark.parametrize("op", ["linear", "attention_block", "mlp", "quantized_linear"])
def test_the_launcher_takes_what_the_sweep_wrote(op, tmp_path, monkeypatch):
    """Keys agree: every config of an op, written under the key of a case, is the one that a plain call then uses."""
    module, one = kernel_file(op), case(op)
    call, used = one.inputs(), []
    problem = sweep.problem_of(one, call)
    original = launch.tuned
    monkeypatch.setattr(launch, "tuned", lambda *a: used.append(original(*a)) or used[-1])
    for config in module.CONFIGS:
        choices = {"swept": {op: ["float16"]}, "proven": {}, "configs": {op: {problem.key: config.name}}}
        sweep.write_table(tmp_path / "gpu.json", choices, ENTRY)
        table = json.loads((tmp_path / "gpu.json").read_text())
        monkeypatch.setattr(launch, "tuned_choices", lambda device, table=table: table["configs"])
        if module.why_not(config, problem):
            with pytest.raises(ValueError, match=f"config {config.name}"):
                getattr(module, op)(*call.args, **call.kwargs)
        else:
            getattr(module, op)(*call.args, **call.kwargs)
        assert used[-1] is config
    monkeypatch.setattr(launch, "tuned_choices", lambda device: {op: {problem.key: "gone"}})
    with pytest.raises(ValueError, match="'gone'"):
        getattr(module, op)(*call.args, **call.kwargs)


def test_a_sweep_cut_short_proves_nothing_of_what_is_left(monkeypatch):
    cases, clock = [case("layer_norm"), case("layer_norm", rows=9), case("row_stats")], iter(range(100))
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(sweep.kernels, "run_case", lambda one, *a: measured(one.op, "", vitfast_triton=0.5)[2])
    whole = sweep.sweep([cases[2], *cases[:2]], CountedDevice(), seconds=50, on_rows=lambda rows: None)
    assert set(whole["proven"]) == {"row_stats", "layer_norm"}
    cut = sweep.sweep([cases[2], *cases[:2]], CountedDevice(), seconds=2.5, on_rows=lambda rows: None)
    assert set(cut["swept"]) == {"row_stats", "layer_norm"} and set(cut["proven"]) == {"row_stats"}


def test_wide_halves_of_a_block_are_not_swept():
    """They are products and attention, tuned as such."""
    wide = [case(op, width=768) for op in ("mlp", "attention_block")]
    choices = sweep.sweep(wide, CountedDevice(), on_rows=lambda rows: None)
    assert choices == {"swept": {}, "proven": {}, "configs": {}}


def test_tuning_changes_no_order_of_summation():
    assert {config.blocks["BLOCK_K"] for config in TMA_CONFIGS + POINTER_CONFIGS} == {64}


def test_tables_grow(tmp_path):
    path = tmp_path / "configs" / "gpu.json"
    both = {"linear": ["float16"], "mlp": ["float16"]}
    first = {"swept": both, "proven": both, "configs": {"linear": {"a": "x", "b": "x"}}}
    second = {"swept": {"linear": ["float16"]}, "proven": {}, "configs": {"linear": {"b": "y"}}}
    third = {"swept": {"mlp": ["bfloat16"]}, "proven": {"mlp": ["bfloat16"]}, "configs": {}}
    for choices in (first, second, third):
        sweep.write_table(path, choices, ENTRY)
    table = json.loads(path.read_text())
    assert table["configs"] == {"linear": {"a": "x", "b": "y"}}
    assert table["proven"] == {"mlp": ["bfloat16", "float16"]}  # linear was swept again, and lost
    assert (table["gpu"], table["triton"]) == ("NVIDIA H100", "3.9")


def test_registry_and_launchers_read_one_table(tmp_path, monkeypatch):
    right = {"linear": ["bfloat16"]}
    choices = {"swept": right, "proven": right, "configs": {"linear": {"key": "64x64x64"}}}
    sweep.write_table(tmp_path / "kernels" / "configs" / "nvidia-h100.json", choices, ENTRY)
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "ops" / "registry.py"))
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "kernels" / "_parts" / "launch.py"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    registry.proven.cache_clear()
    launch.tuned_choices.cache_clear()
    try:
        assert registry.proven("linear", torch.bfloat16, "NVIDIA H100")
        assert not registry.proven("linear", torch.float32, "NVIDIA H100")
        assert not registry.proven("mlp", torch.bfloat16, "NVIDIA H100")
        assert not registry.proven("linear", torch.bfloat16, "NVIDIA A100")
        gpu = torch.device("cuda", 0)
        assert launch.tuned("linear", gpu, linear.CONFIGS, "key").name == "64x64x64"
        assert launch.tuned("linear", gpu, linear.CONFIGS, "another") is None
    finally:
        registry.proven.cache_clear()
        launch.tuned_choices.cache_clear()


def test_committed_tables_name_what_there_is():
    for path in (Path(launch.__file__).parents[1] / "configs").glob("*.json"):
        table = json.loads(path.read_text())
        assert set(table["proven"]) <= set(registry.OPS), path
        for op, chosen in table["configs"].items():
            names = {config.name for config in kernel_file(op).CONFIGS}
            assert set(chosen.values()) <= names, path
