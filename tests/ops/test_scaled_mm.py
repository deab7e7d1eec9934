"""torch._scaled_mm as the torch backend's quantized_linear on CUDA: its arguments, its refusals, its place in a plan.

No product of it runs on a GPU here: torch's form for the CPU computes with the same arguments, and torch's own checks
for CUDA look at them on tensors without storage.
"""

import dataclasses

import pytest
import torch
from helpers.engines import SMALL
from torch._subclasses import FakeTensorMode

from vitfast import ops, testing
from vitfast.engine import planner, sites
from vitfast.models.plan import SITES
from vitfast.ops import reference, registry, scaled_mm
from vitfast.testing import check_op, make

FP8 = torch.float8_e4m3fn
TORCH = registry.backend("quantized_linear", "torch")


def case_of(site, dtype=FP8):
    return sites.site_case(SMALL, SITES[site], 1, torch.device("cpu"), torch.bfloat16, dtype)


def spec(site="quantized_fc1", dtype=FP8, capability=(9, 0), device="cuda", **dims):
    plain = case_of(site, dtype).spec
    return dataclasses.replace(plain, device=device, capability=capability, dims={**plain.dims, **dims})


@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
@pytest.mark.parametrize("extra", [(), ("residual",), ("layer_scale",), ("layer_scale", "residual")], ids="+".join)
def test_values(activation, extra):
    rows, width = (32 if activation == "swiglu" else 16), 16
    x = reference.quantize(make(2, 7, 48).cpu(), dtype=FP8)
    weight = reference.quantize(make(rows, 48, seed=1, scale=0.15).cpu(), dtype=FP8)
    given = {"residual": make(2, 7, width, seed=3), "layer_scale": make(width, seed=4)}
    given = {name: given[name].cpu().bfloat16() for name in extra}
    bias = make(rows, seed=2).cpu().bfloat16()
    check_op(scaled_mm.linear, reference.quantized_linear, *x, *weight, bias, activation=activation, **given)


def test_torchs_checks_for_cuda_take_the_arguments():
    with FakeTensorMode():
        x, weight = (torch.empty(*shape, device="cuda").to(FP8) for shape in ((2, 7, 64), (32, 64)))
        scales = torch.empty(2, 7, device="cuda"), torch.empty(32, device="cuda")
        bias = torch.empty(32, device="cuda", dtype=torch.bfloat16)
        y = scaled_mm.linear(x, scales[0], scaled_mm.pack(weight), scales[1], bias, activation="gelu")
        assert (y.shape, y.dtype, y.device.type) == ((2, 7, 32), torch.bfloat16, "cuda")


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"capability": (8, 9)}, []),
        ({"device": "cpu", "capability": None}, ["device cpu is not among cuda"]),
        ({"dtype": torch.int8}, ["dtype int8 is not among float8_e4m3fn"]),
        ({"capability": (8, 6)}, ["compute capability 8.6 is below 8.9"]),
        ({"K": 40, "N": 24}, ["K 40 is no multiple of 16", "N 24 is no multiple of 16"]),
        ({"site": "fc2_group_scales"}, ["it has no scale groups"]),
    ],
)
def test_every_reason_against_it(changes, reasons):
    asked = spec(**changes)
    assert scaled_mm.why_not(asked) == reasons
    on_cuda = planner.packed_op(TORCH, asked)
    assert (on_cuda == (scaled_mm.pack, scaled_mm.linear)) == (not reasons)


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float16, ()), (torch.bfloat16, (1,))])
def test_bad_arguments(dtype, groups):
    x, weight = (reference.quantize(make(16, 16).cpu(), dtype=FP8) for _ in range(2))
    with pytest.raises(ValueError, match="a scale a row"):
        scaled_mm.linear(x[0], x[1].view(16, *groups), *weight, dtype=dtype)


def test_a_plan_measures_it_and_a_forced_torch_does_not_take_it(monkeypatch):
    """With arguments on the CPU, described as they would be on a GPU."""
    for site in ("quantized_qkv", "quantized_proj", "quantized_fc1"):
        case = case_of(site)
        entries = [TORCH, registry.backend("quantized_linear", "triton")]
        if not torch.cuda.is_available():
            monkeypatch.setattr(type(case), "spec", spec(site))
            _, record = planner.measure(case, entries, torch.device("cpu"))
            monkeypatch.undo()
            assert set(record["ms"]) == {"torch", "triton"}, record
    where = testing.device(), torch.bfloat16, FP8
    needed = ("patch_embed", "layer_norm", "attention", "head", "quantized_qkv", "fc1_requantize", "fc2_group_scales")
    chosen = {site: ops.choose(sites.site_spec(SMALL, SITES[site], 1, *where), "torch") for site in needed}
    assemble = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "quantized": FP8}
    plan = planner.assemble(SMALL, chosen, packed=False, **assemble)
    assert plan.quantized_qkv is reference.quantized_linear and not plan.packs
