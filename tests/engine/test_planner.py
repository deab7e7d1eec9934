"""Plans: what is chosen by which measurement, what is fused and folded."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.grids import thinned

import vitfast
from vitfast import testing
from vitfast.engine import cases, clock, forms, plan_cache, planner
from vitfast.engine.sites import HEAD_ROWS, plan_sites, site_case, site_spec
from vitfast.models.plan import PRODUCTS, SITES, Plan
from vitfast.ops import registry

SMALL = vitfast.ViTConfig((32, 48), (16, 16), width=64, depth=2, heads=2, mlp_dim=128, num_classes=10, name="small")
WIDE = dataclasses.replace(SMALL, width=128, head_dim=64, mlp_dim=256, name="heads of 64")
LINEAR = tuple(name for name, site in SITES.items() if site.op == "linear")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setattr(plan_cache, "plans_dir", lambda: tmp_path / "plans")
    return tmp_path / "plans"


def norm_case(dtype=torch.float32):
    return site_case(SMALL, SITES["layer_norm"], 1, testing.device(), dtype)


# --- the table ---


def test_every_site_is_a_field_of_the_plan_and_names_sites_only():
    fields = {field.name for field in dataclasses.fields(Plan)}
    for name, site in SITES.items():
        assert name == site.name and name in fields
        assert site.op in registry.OPS and site.op in cases.OPS
        assert {*site.parts, *filter(None, (site.passes_to, site.product))} <= SITES.keys()
        assert not site.parts or site.optional
        assert not site.product or SITES[site.product].op == "linear"
        assert site.quantized or not site.op.startswith("quantize")
    assert PRODUCTS == ("qkv", "proj", "fc1", "fc2")
    assert {name for name, site in SITES.items() if site.fused} == {"attention_block", "mlp"}


def test_which_sites_a_model_has():
    def names(config, quantized=None, skip=()):
        return {site.name for site in plan_sites(config, quantized, frozenset(skip))}

    plain = {name for name, site in SITES.items() if not site.quantized}
    assert names(SMALL) == plain
    kept = {"patch_embed", "layer_norm", "attention", "head"}
    in_8_bits = {name for name, site in SITES.items() if site.quantized}
    assert names(WIDE, torch.int8) == kept | in_8_bits
    assert names(SMALL, torch.int8) == kept | in_8_bits - {"attention_quantize", "proj_head_scales"}
    assert names(WIDE, torch.int8, ["blocks.1.fc2"]) == kept | in_8_bits | {"fc2"}


BATCH, ROWS = 3, 3 * 7
SIZES = {
    "patch_embed": {"width": 128, "patch": 768},
    "layer_norm": {"width": 128},
    "row_stats": {"width": 128},
    "qkv": {"M": ROWS, "K": 128, "N": 3 * 128},
    "attention": {"head_dim": 64, "queries": 7, "keys": 7},
    "proj": {"M": ROWS, "K": 128, "N": 128},
    "attention_block": {"tokens": 7, "width": 128, "head_dim": 64},
    "fc1": {"M": ROWS, "K": 128, "N": 512},
    "fc2": {"M": ROWS, "K": 256, "N": 128},
    "mlp": {"rows": ROWS, "width": 128, "hidden": 512},
    "head": {"M": HEAD_ROWS, "K": 128, "N": 10},
    "quantize": {"rows": ROWS, "width": 256},
}


@pytest.mark.parametrize("site", SITES)
def test_sizes_of_every_site_by_hand(site):
    """With heads of 64, and SwiGLU: fc1 has 2 * 256 rows."""
    config = dataclasses.replace(WIDE, activation="swiglu")
    quantized = torch.int8 if SITES[site].quantized else None
    spec = site_spec(config, SITES[site], BATCH, torch.device("cpu"), torch.bfloat16, quantized)
    assert dict(spec.dims) == SIZES[SITES[site].product or ("attention" if site == "attention_quantize" else site)]
    features = {
        "quantized_fc1": ("swiglu",),
        "fc1_requantize": ("swiglu", "scale groups"),
        "fc2_group_scales": ("scale groups",),
        "proj_head_scales": ("scale groups of 64",),
        "attention_quantize": ("int8 output",),
    }
    assert spec.features == features.get(site, ())
    assert spec.dtype == (torch.int8 if SITES[site].op.startswith("quantize") else torch.bfloat16)


ODD = vitfast.ViTConfig(
    (32, 48), (16, 8), width=72, depth=1, heads=3, mlp_dim=40, in_channels=4, prefix_tokens=5, activation="swiglu",
    layer_scale=True, num_classes=1,
)  # fmt: skip


def dequantized(answer):
    """The numbers that a result stands for; its first tensor, where it has statistics, too."""
    values, scales = answer if isinstance(answer, tuple) else (answer, None)
    if values.dtype != torch.int8:
        return values.double()
    scales = scales.view(*values.shape[:-1], -1)
    return values.double() * scales.repeat_interleave(-(-values.shape[-1] // scales.shape[-1]), dim=-1)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("config", [WIDE, ODD], ids=["heads of 64", "odd"])
def test_every_site_is_tried_on_arguments_of_its_real_shapes_and_scale(config, site):
    """A product of K terms near 1 would be near sqrt(K), and its epilogue would be lost beside it."""
    found = SITES[site]
    case = site_case(config, found, 2, torch.device("cpu"), torch.bfloat16 if found.quantized else torch.float32,
                     torch.int8 if found.quantized else None)  # fmt: skip
    call, run = case.inputs(), case.table[case.op].reference
    want, got = (dequantized(run(*call.args, **call.kwargs, upcast=upcast)) for upcast in (True, False))
    assert got.isfinite().all()
    error = (got - want).square().mean() / want.square().mean()
    assert error.sqrt() < 1e-2, "bf16 and int8 differ from float64 by less"
    if site != "row_stats":
        assert 0.2 < want.std() < 5, f"{site} gives numbers of size {want.std():.3g}"
    if found.op in ("linear", "quantized_linear"):
        at = 1 if found.op == "linear" else 2
        weight = call.args[at].double() * (1 if at == 1 else call.args[3][:, None])
        assert (
            tuple(weight.shape)
            == config.weight_shapes()[f"blocks.0.{found.product}.weight" if found.product else "head.weight"][0]
        )
        product = weight.std() * weight.shape[1] ** 0.5
        assert 0.7 < product < 1.4, f"a product of {site} is {product:.3g} times as large as its input"
    assert ("layer_scale" in call.kwargs and call.kwargs["layer_scale"] is not None) == (
        found.fused or ("residual" in found.features and config.layer_scale)
    )


# --- what is measured ---


def planned(monkeypatch, cost, config=SMALL, measure=None, **options):
    """The plan on a GPU that is not here, where Triton's calls take so many milliseconds by op."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(planner, "candidates", lambda spec: ([registry.backend(spec.op, "triton")] * 2, {}))
    monkeypatch.setattr(cases, "device_capability", lambda device: (9, 0))
    monkeypatch.setattr(plan_cache, "plan_key", lambda *args: {"costs": dict(cost)})

    def at_cost(case, able, device, timed):
        return able[0], {"ms": {"triton": cost.get(case.op, 0.1)}, "refused": {}}

    monkeypatch.setattr(planner, "measure", measure or at_cost)
    return planner.build(config, device=cuda, dtype=torch.bfloat16, batch=1, **options)


def test_the_form_of_a_block_that_is_fastest_as_a_whole_is_chosen(monkeypatch, folder):
    """Whatever its sites cost one by one; a tie keeps the norms apart."""
    both, mlp = "folded, attention_block and mlp in one launch", "folded, mlp in one launch"
    asked = []

    def measure(config, plans, plain, **options):
        asked.append(list(plans))
        assert not plans["unfused"].fold_norm and all(plans[name].fold_norm for name in plans if name != "unfused")
        assert set(plain.backends.values()) == {"torch"}
        return {"ms": {name: ms[name] for name in plans}, "refused": {}}

    monkeypatch.setattr(forms, "measure", measure)
    for fastest, folds, fused in (("unfused", False, ()), ("folded", True, ()), (mlp, True, ("mlp",)),
                                  (both, True, ("attention_block", "mlp"))):  # fmt: skip
        ms = dict.fromkeys(("unfused", "folded", "folded, attention_block in one launch", mlp, both), 1.0)
        ms[fastest] = 0.96
        plan_cost = {"linear": 0.6, "case": fastest}
        found = planned(monkeypatch, plan_cost)
        assert found.fold_norm == folds and found.measured["forms"]["ms"] == ms
        assert tuple(site for site in ("attention_block", "mlp") if site in found.backends) == fused
        again = planned(monkeypatch, plan_cost)  # from the cache
        assert again.backends == found.backends and again.fold_norm == folds
    assert len(asked) == 4 and asked[0] == list(ms)
    ms = dict.fromkeys(ms, 1.0) | {"folded": 0.98}
    assert not planned(monkeypatch, {"case": "a tie"}).fold_norm
    wide = dataclasses.replace(SMALL, width=448, heads=7)  # wider than one launch goes
    planned(monkeypatch, {"case": "wide"}, wide)
    assert asked[-1] == ["unfused", "folded"]


def test_no_memory_for_the_forms_is_not_kept(monkeypatch, folder):
    def hungry(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forms, "measure", hungry)
    with pytest.warns(UserWarning, match=r"memory was too short to measure forms \(unfused, folded"):
        found = planned(monkeypatch, {"linear": 0.6})
    assert not found.fold_norm and not folder.exists()


@pytest.mark.parametrize(("measured", "late"), [(3, "qkv, .*, head"), (11, "forms")])
def test_a_plan_on_a_gpu_takes_no_longer_than_it_may(measured, late, monkeypatch, folder):
    """What there is no time for runs on the first able backend; the plan says so, and is not kept."""
    now = [0.0]
    monkeypatch.setattr(planner.time, "perf_counter", lambda: now[0])

    def measure(*args, **options):
        now[0] += planner.GPU_SECONDS / (measured - 0.5)  # the last one begins in time
        return registry.backend("layer_norm", "triton"), {"ms": {"triton": 1.0}, "refused": {}}

    with pytest.warns(UserWarning, match=rf"the 30 s that a plan may take were over before {late}: .* is not kept"):
        found = planned(monkeypatch, {"case": "late"}, measure=measure)
    left = {site for site, record in found.measured.items() if "late" in record}
    assert len(found.measured) - len(left) == measured and not found.fold_norm
    assert planner.seconds(found) == pytest.approx(planner.GPU_SECONDS * measured / (measured - 0.5))
    reasons = {why for site in left for why in found.measured[site]["refused"].values()}
    assert reasons == {"not measured: the 30 s of a plan were over"}
    assert not folder.exists()
    planned(monkeypatch, {"case": "late"}, deterministic=True, measure=measure)  # asks no clock


def test_native_products_fold_too(monkeypatch):
    """With Triton's first statistics; each product may be the faster of both."""
    monkeypatch.setattr(cases, "device_capability", lambda device: (9, 0))
    entries = {
        site: {name: registry.backend(SITES[site].op, name) for name in ("torch", "triton")}
        for site in ("patch_embed", "layer_norm", "row_stats", "qkv", "attention", "proj", "fc1", "fc2", "head")
    }
    native = dataclasses.replace(registry.backend("linear", "torch"), name="native")
    for site in ("qkv", "proj", "fc1", "fc2"):
        entries[site]["native"] = native
    chosen = {site: found["torch"] for site, found in entries.items()}
    times = {site: {"triton": 2.0, "native": 1.0 if site == "fc1" else 3.0} for site in ("qkv", "proj", "fc1", "fc2")}
    made = forms.candidates(chosen, entries, times)
    names = {form: {choices[site].name for site in ("qkv", "proj", "fc1", "fc2")} for form, choices in made.items()}
    assert names == {"unfused": {"torch"}, "folded": {"triton", "native"}, "folded triton": {"triton"},
                     "folded native": {"native"}}  # fmt: skip
    for form, choices in made.items():
        plan = planner.assemble(SMALL, choices, device=torch.device("cuda"), dtype=torch.bfloat16, packed=True)
        assert plan.fold_norm == (form != "unfused")
    for order in (("triton", "native"), ("native", "triton")):  # where nothing is measured, the default order
        ordered = entries | {site: {name: entries[site][name] for name in order} for site in times}
        folded = forms.candidates(chosen, ordered, {})["folded"]
        assert {folded[site].name for site in times} == {order[0]}
    del entries["fc1"]["triton"], entries["fc1"]["native"]  # one that cannot fold, and none does
    assert list(forms.candidates(chosen, entries, times)) == ["unfused"]


@pytest.mark.parametrize("config", thinned([SMALL, dataclasses.replace(WIDE, layer_scale=True, activation="swiglu")]))
def test_a_wrong_form_is_refused_and_right_ones_are_timed(config):
    """In the interpreter: folded as Triton has it, and the same with a proj that writes wrong statistics."""
    where = {"device": testing.device(), "dtype": torch.float32}
    entries = {site.name: {name: registry.backend(site.op, name) for name in ("torch", "triton")}
               for site in plan_sites(config, None, frozenset()) if site.name != "attention_block"}  # fmt: skip
    possible = forms.candidates({site: found["torch"] for site, found in entries.items()}, entries, {})
    right = entries["proj"]["triton"]

    def shifted(*args, stats=False, **kwargs):
        made = right.call(*args, stats=stats, **kwargs)
        return (made[0], made[1] * 1.1) if stats else made

    possible["wrong"] = possible["folded"] | {"proj": dataclasses.replace(right, call=shifted)}
    plans = {name: planner.assemble(config, choices, packed=True, **where) for name, choices in possible.items()}
    plain = planner.assemble(config, possible["unfused"], packed=False, **where)
    found = forms.measure(config, plans, plain, batch=2, **where)
    assert set(found["ms"]) == {"unfused", "folded", "folded, mlp in one launch"}, found
    assert set(found["refused"]) == {"wrong"} and "two blocks" in found["refused"]["wrong"]
    assert all(ms > 0 for ms in found["ms"].values())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_unmeasured_plan_fuses_attention(backend):
    found = planner.build(SMALL, device=testing.device(), dtype=torch.bfloat16, backend=backend)
    assert (found.mlp is not None) == (backend == "triton") and found.attention_block is None
    assert "attention_block" not in found.backends


@pytest.mark.parametrize(
    ("fused", "torchs", "folds"),
    [
        ((), (), True),
        ((), ("proj",), False),  # which writes fc1's statistics
        (("mlp",), ("proj", "fc1", "fc2"), True),
        (("attention_block",), ("row_stats", "qkv", "proj", "fc2"), True),  # attention_block writes those of fc1
        (("attention_block",), ("fc1",), False),
        (("attention_block", "mlp"), ("row_stats", "qkv", "proj", "fc1", "fc2"), True),
    ],
)
def test_norms_are_folded_where_all_that_need_it_are_triton(fused, torchs, folds):
    needed = ("patch_embed", "layer_norm", "row_stats", "qkv", "attention", "proj", "fc1", "fc2", "head", *fused)
    chosen = {site: registry.backend(SITES[site].op, "torch" if site in torchs else "triton") for site in needed}
    found = planner.assemble(SMALL, chosen, device=testing.device(), dtype=torch.bfloat16, packed=True)
    assert found.fold_norm == folds


def test_measure_refuses_a_wrong_backend_and_keeps_the_fastest(monkeypatch):
    right = registry.backend("layer_norm", "torch")
    slow = dataclasses.replace(right, name="native", call=lambda *a, **k: right.call(*a, **k))
    wrong = dataclasses.replace(right, name="triton", call=lambda *a, **k: right.call(*a, **k) * 1.01)
    monkeypatch.setattr(planner, "time_calls", lambda calls, device: [2.0, 1.0][: len(calls)])
    best, record = planner.measure(norm_case(), [right, slow, wrong], testing.device())
    assert best.name == "native"
    assert record["ms"] == {"torch": 2.0, "native": 1.0}
    assert "exceeds" in record["refused"]["triton"]
    with pytest.raises(planner.PlanError, match="exceeds"):
        planner.measure(norm_case(), [wrong], testing.device())


class PTXASError(Exception):
    """Triton's errors derive from Exception."""


@pytest.mark.parametrize("error", [PTXASError("no ptxas"), KeyError("BLOCK_M"), TypeError("an argument"), OSError("x")])
def test_any_error_of_a_backend_is_a_recorded_refusal(error):
    right = registry.backend("layer_norm", "torch")

    def broken(*args, **kwargs):
        raise error

    best, record = planner.measure(
        norm_case(), [dataclasses.replace(right, name="triton", call=broken), right], testing.device()
    )
    assert best.name == "torch" and set(record["ms"]) == {"torch"} and "out_of_memory" not in record
    assert record["refused"]["triton"] == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("no more"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("whose", ["one backend's", "all backends'", "the reference's"])
def test_want_of_memory_is_no_refusal_and_not_kept(error, whose, folder, monkeypatch):
    """The next load measures again."""
    right = registry.backend("layer_norm", "torch")
    state = {"short": True}

    def hungry(*args, **kwargs):
        if state["short"]:
            raise error
        return right.call(*args, **kwargs)

    entries = [right, dataclasses.replace(right, name="native", call=hungry)]
    if whose == "all backends'":
        entries[0] = dataclasses.replace(right, call=hungry)
    if whose == "the reference's":
        starved = dataclasses.replace(cases.OPS["layer_norm"], reference=hungry)
        monkeypatch.setitem(cases.OPS, "layer_norm", starved)
    plain = registry.candidates
    monkeypatch.setattr(planner, "candidates", lambda spec: (entries, {}) if spec.op == "layer_norm" else plain(spec))
    asked = {"config": SMALL, "device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.warns(UserWarning, match="memory was too short to measure layer_norm"):
        found = planner.build(**asked)
    # Of those that are able the first in the CPU's order, native, runs where nothing could be measured.
    assert found.backends["layer_norm"] == ("torch" if whose == "one backend's" else "native")
    assert not list(folder.glob("*")), "kept"
    state["short"] = False
    monkeypatch.setattr(planner, "time_calls", lambda calls, device: [9.0, *[1.0] * (len(calls) - 1)])
    again = planner.build(**asked)
    assert again.backends["layer_norm"] == "torch" and set(again.measured["layer_norm"]["ms"]) == {"torch", "native"}
    assert len(list(folder.glob("*"))) == 1


def test_memory_too_short_for_a_batch_is_tried_with_a_smaller_one(folder, monkeypatch):
    """Both are measured then, and the plan is not kept."""
    right = registry.backend("layer_norm", "torch")

    def hungry(x, *args, **kwargs):
        if x.shape[0] > 20 * SMALL.tokens():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right.call(x, *args, **kwargs)

    entries = [right, dataclasses.replace(right, name="native", call=hungry)]
    plain = registry.candidates
    monkeypatch.setattr(planner, "candidates", lambda spec: (entries, {}) if spec.op == "layer_norm" else plain(spec))
    with pytest.warns(UserWarning, match=r"memory was too short to measure layer_norm \(native\) on 64 images"):
        found = planner.build(SMALL, device=torch.device("cpu"), dtype=torch.float32, batch=64)
    record = found.measured["layer_norm"]
    assert (record["batch"], record["out_of_memory"]) == (16, ["native"])
    assert set(record["ms"]) == {"torch", "native"} and not record["refused"]
    assert not list(folder.glob("*")), "kept"


def test_a_tie_keeps_the_first(monkeypatch):
    first = registry.backend("layer_norm", "torch")
    second = dataclasses.replace(first, name="native")
    for ratio, winner in ((0.9, "torch"), (0.8, "native")):
        monkeypatch.setattr(planner, "time_calls", lambda calls, device, ratio=ratio: [1.0, ratio])
        assert planner.measure(norm_case(), [first, second], testing.device())[0].name == winner


@pytest.mark.parametrize(("seconds", "calls"), [(0.001, 11), (0.5, 6), (5.0, 4)])
def test_timing_is_short(seconds, calls, monkeypatch):
    """Ten rounds, and no more than three once two seconds have gone; one call before them."""
    now, made = [0.0], []
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call():
        now[0] += seconds
        made.append(now[0])

    assert clock.time_calls([call], torch.device("cpu")) == [pytest.approx(1000 * seconds)]
    assert len(made) == calls


def test_a_head_that_is_not_there_is_not_measured(folder):
    headless = planner.build(dataclasses.replace(SMALL, num_classes=0), device=testing.device(), dtype=torch.float32)
    assert "head" not in headless.measured
    if testing.device().type == "cuda" or not registry.backend("linear", "native").missing:
        assert "fc1" in headless.measured
    planner.build(dataclasses.replace(SMALL, num_classes=1), device=testing.device(), dtype=torch.float32, batch=1)


@pytest.mark.parametrize("quantized", [None, torch.int8])
def test_a_deterministic_plan_asks_no_clock_and_keeps_nothing(quantized, folder, monkeypatch):
    """The first right backend of the fixed order; a wrong one is left out all the same."""
    monkeypatch.setattr(planner, "time_calls", lambda *args: pytest.fail("a clock was asked"))
    asked = {"device": torch.device("cpu"), "dtype": torch.bfloat16 if quantized else torch.float32}
    found = planner.build(SMALL, **asked, quantized=quantized, deterministic=True)
    for site, name in found.backends.items():
        able, _ = registry.candidates(site_spec(SMALL, SITES[site], 1, *asked.values(), quantized))
        assert name == ("native" if "native" in {entry.name for entry in able} else "torch"), site
    assert not folder.exists()
    right, plain = registry.backend("layer_norm", "torch"), registry.candidates
    wrong = dataclasses.replace(right, name="native", call=lambda x, *rest: x)
    monkeypatch.setattr(
        planner, "candidates", lambda spec: ([wrong, right], {}) if spec.op == "layer_norm" else plain(spec)
    )
    again = planner.build(SMALL, **asked, quantized=quantized, deterministic=True)
    assert again.backends["layer_norm"] == "torch"
