"""Plans: what is chosen by which measurement, what is fused and folded, what is kept on disk."""

import dataclasses
import json

import pytest
import torch

import vitfast
from vitfast import testing
from vitfast.engine import plan_cache, planner, sites
from vitfast.models import plan

SMALL = vitfast.ViTConfig((32, 48), (16, 16), width=64, depth=2, heads=2, mlp_dim=128, num_classes=10, name="small")


def test_a_small_models_plan_may_fuse_halves_of_a_block(monkeypatch):
    """Measured faster than its parts together, the one launch is chosen, and norms are folded all the same."""
    monkeypatch.setattr(planner, "candidates", lambda spec: ([vitfast.ops.registry.backend(spec.op, "triton")] * 2, {}))
    cost = {"mlp": 1.0, "linear": 0.6, "attention": 0.2, "attention_block": 1.5}
    monkeypatch.setattr(
        planner, "measure", lambda call, able, device: (able[0], {"ms": {"triton": cost.get(call.op, 0.1)}})
    )

    def planned(config=SMALL):
        found = planner._site_backends(config, torch.device("cuda"), torch.bfloat16, "auto", 1)[0]
        return planner.assemble(config, found, device=torch.device("cuda"), dtype=torch.bfloat16, packed=True)

    monkeypatch.setattr(planner, "site_call", lambda config, site, *rest: planner.Call(
        "linear" if site in planner.LINEAR_SITES else site, None, (), {}))  # fmt: skip
    monkeypatch.setattr(sites, "device_capability", lambda device: (9, 0))
    for mlp, attention in ((1.0, 1.5), (1.3, 1.5), (1.0, 1.3), (1.3, 1.3)):  # of parts that cost 1.2 and 1.4
        cost |= {"mlp": mlp, "attention_block": attention}
        assert (planned().fuse_mlp, planned().fuse_attention) == (mlp < 1.2, attention < 1.4)
        assert planned().fold_norm
    cost |= {"mlp": 0.0, "attention_block": 0.0}
    wide = planned(dataclasses.replace(SMALL, width=448, heads=7))  # wider than one launch goes
    assert not wide.fuse_mlp and not wide.fuse_attention


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_unmeasured_plan_fuses_attention(backend):
    plan = planner.build(SMALL, device=testing.device(), dtype=torch.bfloat16, backend=backend)
    assert plan.fuse_mlp == (backend == "triton") and not plan.fuse_attention
    assert "attention_block" not in plan.backends


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
    sites_of_plan = ("row_stats", "qkv", "attention", "proj", "fc1", "fc2", *fused)
    op = dict.fromkeys(planner.LINEAR_SITES, "linear")
    chosen = {
        site: vitfast.ops.registry.backend(op.get(site, site), "torch" if site in torchs else "triton")
        for site in sites_of_plan
    }
    plan = planner.assemble(SMALL, chosen, device=testing.device(), dtype=torch.bfloat16, packed=True)
    assert plan.fold_norm == folds


def test_measure_refuses_a_wrong_backend_and_keeps_the_fastest(monkeypatch):
    call = planner.site_call(SMALL, "layer_norm", 1, testing.device(), torch.float32)
    right = vitfast.ops.registry.backend("layer_norm", "torch")
    slow = dataclasses.replace(right, name="native", call=lambda *a, **k: right.call(*a, **k))
    wrong = dataclasses.replace(right, name="triton", call=lambda *a, **k: right.call(*a, **k) * 1.01)
    monkeypatch.setattr(planner, "time_calls", lambda calls, device: [2.0, 1.0][: len(calls)])
    best, record = planner.measure(call, [right, slow, wrong], testing.device())
    assert best.name == "native"
    assert record["ms"] == {"torch": 2.0, "native": 1.0}
    assert "exceeds" in record["refused"]["triton"]
    with pytest.raises(planner.PlanError, match="exceeds"):
        planner.measure(call, [wrong], testing.device())


def test_choices_survive_on_disk(tmp_path):
    path, key = tmp_path / "plans" / "a.json", {"device": "a", "torch": "2"}
    assert plan_cache.load_plan(path, key) is None
    saved = {"qkv": "torch"}, {"qkv": {"ms": {"torch": 1.0}, "refused": {}}}
    plan_cache.save_plan(path, key, *saved)
    assert plan_cache.load_plan(path, key) == saved


def test_a_plan_made_elsewhere_is_refused_with_the_reason_and_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cache, "plans_dir", lambda: tmp_path / "plans")
    asked = {"config": SMALL, "device": testing.device(), "dtype": torch.float32}
    first = planner.build(**asked)
    (path,) = (tmp_path / "plans").iterdir()
    measured = []
    monkeypatch.setattr(planner, "_site_backends", lambda *args: measured.append(args) or planner_choices)
    planner_choices = (
        {
            site: vitfast.ops.registry.backend(site if site not in planner.LINEAR_SITES else "linear", name)
            for site, name in first.backends.items()
        },
        {},
    )
    assert planner.build(**asked).backends == first.backends
    assert not measured  # read, not measured
    plan = json.loads(path.read_text())
    plan["key"]["device"] = "another chip"
    path.write_text(json.dumps(plan))
    with pytest.warns(UserWarning, match=r"measured again, it was made for device 'another chip', here '"):
        assert planner.build(**asked).backends == first.backends
    assert len(measured) == 1
    assert json.loads(path.read_text())["key"]["device"] != "another chip"


def test_a_head_that_is_not_there_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cache, "plans_dir", lambda: tmp_path / "plans")
    headless = planner.build(dataclasses.replace(SMALL, num_classes=0), device=testing.device(), dtype=torch.float32)
    assert "head" not in headless.measured
    if testing.device().type == "cuda" or not vitfast.ops.registry.backend("linear", "native").missing:
        assert "fc1" in headless.measured
    planner.build(dataclasses.replace(SMALL, num_classes=1), device=testing.device(), dtype=torch.float32, batch=1)


def test_a_tie_keeps_the_first(monkeypatch):
    call = planner.site_call(SMALL, "layer_norm", 1, testing.device(), torch.float32)
    first = vitfast.ops.registry.backend("layer_norm", "torch")
    second = dataclasses.replace(first, name="native")
    for ratio, winner in ((0.9, "torch"), (0.8, "native")):
        monkeypatch.setattr(planner, "time_calls", lambda calls, device, ratio=ratio: [1.0, ratio])
        assert planner.measure(call, [first, second], testing.device())[0].name == winner


def test_every_site_has_a_right_example_call():
    for site in plan.SITES:
        call = planner.site_call(SMALL, site, 2, testing.device(), torch.float32)
        result = getattr(vitfast.ops.reference, call.op)(*call.args, **call.kwargs)
        assert result.isfinite().all()
        assert call.spec.op == call.op
