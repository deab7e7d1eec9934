"""The tests that a GPU's minutes go to: every op on every backend at a few real and awkward shapes, a planned model.

`-m device` picks them, and those of engine, graphs, streams and native kernels that are marked so. Without a GPU the
same runs in Triton's interpreter, in the full suite.
"""

import functools
import importlib.util

import pytest
import torch

import vitfast
from vitfast import testing
from vitfast.benchmarks import cases, kernels, smoke
from vitfast.engine import planner
from vitfast.models.plan import SITES
from vitfast.ops import accuracy, registry

ON_GPU = torch.cuda.is_available()
DEVICE = testing.device()
pytestmark = [pytest.mark.device] + ([] if ON_GPU else [pytest.mark.full])

REAL = {
    "linear": ({"M": 16 * 197, "K": 768, "N": 2304, "epilogue": "norm"},
               {"M": 16 * 197, "K": 768, "N": 3072, "epilogue": "norm gelu"},
               {"M": 16 * 197, "K": 3072, "N": 768, "epilogue": "residual stats"}),
    "attention": ({"batch": 16, "tokens": 197, "heads": 12, "head_dim": 64},
                  {"batch": 4, "tokens": 1370, "heads": 6, "head_dim": 64}),
    "attention_backward": ({"batch": 16, "tokens": 197, "heads": 12, "head_dim": 64},),
    "layer_norm": ({"rows": 16 * 197, "width": 768},),
    "patch_embed": ({"batch": 16, "image": 224, "patch": 16, "width": 768, "pixels": "uint8"},),
    "quantized_linear": tuple({"M": 16 * 197, "K": 768, "N": 3072, "epilogue": "bias", "precision": p}
                              for p in ("fp8", "int8")),
}  # fmt: skip
"""Of ViT-B/16, which the interpreter would take minutes for."""


def tried():
    """(op, sizes, backend): every form that smoke.SMALL has, and the sizes of a real model where there is a GPU."""
    for op, found in smoke.SMALL.items():
        for dims in (*found, *(REAL.get(op, ()) if ON_GPU else ())):
            for backend in ("triton", "native"):
                if (op, backend) in smoke.pairs() and op != "block":
                    yield pytest.param(op, dims, backend, id=f"{backend}-{cases.Case(op, dims, DEVICE, None).name}")


@pytest.mark.parametrize(("op", "dims", "backend"), tried())
def test_every_op_on_every_backend(op, dims, backend):
    case = cases.Case(op, dims, DEVICE, torch.bfloat16)
    entry = registry.backend(case.spec.op, backend)
    if reasons := entry.why_not(case.spec):
        pytest.skip("; ".join(reasons))
    call = case.inputs()
    run = entry.call
    if op == "attention_backward":
        run = cases.gradients(functools.partial(vitfast.ops.attention, backend=backend))
    answers = [case.table[op].reference(*call.args, **call.kwargs, upcast=upcast) for upcast in (True, False)]
    options = cases.backend_options(call.kwargs)
    for _ in range(2):  # a race gives something else the second time
        bounds = accuracy.tolerances_for(call.args, call.kwargs.get("activation"))
        accuracy.assert_close(run(*call.args, **options), *answers, what=case.name, tolerances=bounds)


SMALL = vitfast.ViTConfig((64, 64), (16, 16), width=128, depth=2, heads=2, mlp_dim=256, num_classes=16, name="small")


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_model(backend, dtype, monkeypatch, tmp_path):
    """As it is planned here, forms of a block included, and forced; graphs and eager; against fp32."""
    monkeypatch.setattr(planner.plan_cache, "plans_dir", lambda: tmp_path)
    checkpoint = vitfast.Checkpoint(SMALL, testing.random_weights(SMALL))
    images = testing.make(3, 3, 64, 64)
    exact = vitfast.Engine(checkpoint, device=DEVICE, dtype="fp32", backend="torch")(images).embedding
    bound = accuracy.MODEL_TOLERANCES[torch.bfloat16 if dtype == "bf16" else torch.float16]
    for graphs in (True, False) if ON_GPU else (False,):
        made = vitfast.Engine(checkpoint, device=DEVICE, dtype=dtype, backend=backend, graphs=graphs)
        for _ in range(2):
            got = made(images).embedding.float()
            assert ((got - exact).square().mean() / exact.square().mean()).sqrt() < bound.rms, made.plan
    if ON_GPU and backend == "auto":
        assert made.plan.measured["forms"]["ms"], made.plan.measured
        assert not {name for site, record in made.plan.measured.items() for name in record["refused"]}, made.plan


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_model_in_8_bits(precision):
    if ON_GPU and precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    checkpoint = vitfast.Checkpoint(SMALL, testing.random_weights(SMALL))
    images = testing.make(3, 3, 64, 64)
    exact = vitfast.Engine(checkpoint, device=DEVICE, dtype="fp32", backend="torch")(images).embedding
    got = vitfast.Engine(checkpoint, device=DEVICE, dtype=precision)(images).embedding.float()
    assert torch.cosine_similarity(got, exact).min() > 0.98


def test_smoke_has_every_op():
    """Of the registry and of the benchmarks; a new op must be tried on a GPU first of all."""
    assert smoke.SMALL.keys() == cases.OPS.keys()
    assert {site.op for site in SITES.values()} <= smoke.SMALL.keys()


@pytest.mark.skipif(not ON_GPU, reason="the extension's CUDA kernels run on a GPU")
def test_the_extension_is_there_for_this_gpu():
    if importlib.util.find_spec("vitfast._C") is None:
        pytest.skip("vitfast._C is not built")
    archs = importlib.import_module("vitfast._C").build_info()["cuda"].split(";")
    assert any(arch.startswith("{}{}".format(*torch.cuda.get_device_capability())) for arch in archs), archs


def test_a_gate_refuses_a_wrong_kernel():
    """The rule by which all of these are judged has teeth on this device, too."""
    case = cases.Case("linear", {"M": 131, "K": 192, "N": 256, "epilogue": "bias"}, DEVICE, torch.bfloat16)
    call = case.inputs()
    right = case.table["linear"].reference(*call.args)
    wrong = right.clone()
    wrong[-1, -1] += 1.0
    provider = kernels.Provider("wrong", lambda call: lambda: wrong)
    assert kernels.Gate(case, call).judge(lambda: right, provider)["correct"]
    assert not kernels.Gate(case, call).judge(lambda: wrong, provider)["correct"]
