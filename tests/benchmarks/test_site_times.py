"""Where the time of a forward goes: rows by site, their FLOPs, their share of the roofs."""

import dataclasses
import json
import time
import types

import pytest
import torch
from helpers.benching import bench, result
from helpers.engines import FAMILIES, PREPROCESS, SMALL

import vitfast
from vitfast import testing
from vitfast.benchmarks import page, result_file, roofs, site_times
from vitfast.benchmarks.device import CpuDevice
from vitfast.diagnostics.predict import predict
from vitfast.engine.engine import Engine
from vitfast.models import libraries
from vitfast.models.config import NAMED
from vitfast.ops import registry

FAULTS = {"page_faults": 0}
BLOCK = {"qkv", "attention", "proj", "fc1", "fc2"}


def cpu_engine(config=SMALL, **kwargs):
    checkpoint = vitfast.Checkpoint(config, testing.random_weights(config), PREPROCESS)
    return Engine(checkpoint, device="cpu", backend="torch", **kwargs)


def images(batch=2, config=SMALL):
    return testing.make(batch, 3, *config.image_size).cpu()


def measured(engine, batch=2, rounds=3):
    return {row["site"]: row for row in site_times.measure(engine, images(batch, engine.config), rounds)}


def site(name, ms, **more):
    return {"site": name, "calls": 1, "median_ms": ms, "p20_ms": ms, "p80_ms": ms, **FAULTS, **more}


def by_hand():
    """1 ms of products at half of 1 TFLOP/s, 0.5 ms at 0.4 of 2, and 0.5 ms of others."""
    return [
        site("qkv", 1.0, flops=500_000_000, dtype="float32", gflop_per_s=500.0),
        site("quantized_fc1", 0.5, flops=400_000_000, dtype="int8", gflop_per_s=800.0),
        site("layer_norm", 0.3),
        site("rest", 0.2),
        site("forward", 2.0, flops=900_000_000, gflop_per_s=450.0),
    ]


def model_row(sites):
    times = {"median_ms": 2.0, "p20_ms": 2.0, "p80_ms": 2.0, "spread": 0.0, "noisy": False, "ratio": 1.0}
    return {"case": "small", "provider": "vitfast", "correct": True, **times, "sites": sites}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_a_forward_is_there(family):
    config = dataclasses.replace(SMALL, **FAMILIES[family])
    made = cpu_engine(config)
    plan, want = made.plan, made(images(config=config))
    rows = measured(made)
    assert list(rows)[-2:] == ["rest", "forward"] and rows.keys() > BLOCK
    assert all(rows[name]["calls"] == config.depth for name in BLOCK) and rows["patch_embed"]["calls"] == 1
    assert rows["layer_norm"]["calls"] == 2 * config.depth + config.final_norm + config.pre_norm + config.pool_norm
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows.values())
    assert 0 < sum(row["p20_ms"] for name, row in rows.items() if name != "forward") <= rows["forward"]["p80_ms"]
    assert made.plan is plan and torch.equal(made(images(config=config)).tokens, want.tokens)


def test_flops_are_those_of_the_prediction():
    name, batch = "vit_tiny_patch16_224", 2
    made = cpu_engine(dataclasses.replace(NAMED[name], name=""))
    rows = measured(made, batch, rounds=2)
    predicted = {
        row["site"]: row["count"] * row["flops"] for row in predict(NAMED[name], batch=batch, chip="h100")["launches"]
    }
    assert {site: row["flops"] for site, row in rows.items() if "dtype" in row} == {
        site: flops for site, flops in predicted.items() if flops
    }
    assert rows["forward"]["flops"] == sum(predicted.values())
    for row in rows.values():
        assert ("gflop_per_s" in row) == bool(row.get("flops"))
        if "flops" in row:
            assert row["gflop_per_s"] == pytest.approx(row["flops"] / row["median_ms"] / 1e6)


def test_quantised_products_are_in_8_bits_and_the_others_in_the_models_dtype():
    rows = measured(cpu_engine(dtype="int8", skip_quantize=("blocks.0.fc2",)), rounds=2)
    kinds = {name: row["dtype"] for name, row in rows.items() if "dtype" in row}
    eight = {name for name, kind in kinds.items() if kind == "int8"}
    passed_on = {"fc1_requantize", "fc2_group_scales"}  # but in block 0
    assert eight == {"quantized_qkv", "quantized_proj", "quantized_fc1", *passed_on}
    assert {kinds[name] for name in kinds.keys() - eight} == {"bfloat16"} and kinds["fc2"] == "bfloat16"
    assert rows["fc2"]["calls"] == 1 and "flops" not in rows["quantize"] and rows["quantize"]["calls"] > 2


def test_a_slow_site_is_where_it_is_seen():
    made = cpu_engine()
    proj = made.plan.proj
    slow = dataclasses.replace(made.plan, proj=lambda *args, **kwargs: (time.sleep(0.03), proj(*args, **kwargs))[1])
    made.runner.plan = slow
    rows = measured(made)
    assert rows["proj"]["median_ms"] >= 30 * SMALL.depth
    assert rows["forward"]["median_ms"] >= rows["proj"]["median_ms"]
    others = [row["median_ms"] for name, row in rows.items() if name not in ("proj", "forward")]
    assert max(others) < rows["proj"]["median_ms"]
    assert made.plan is slow


def test_the_plan_is_whole_after_an_error():
    made = cpu_engine()
    plan = made.plan
    with pytest.raises(ValueError, match="channels"):
        site_times.measure(made, images()[:, :2], 2)
    assert made.plan is plan


def test_memory_that_is_touched_for_the_first_time_is_counted():
    made = cpu_engine()
    head, kept = made.plan.head, []

    def wasteful(*args, **kwargs):
        kept.append(torch.ones(2**24))  # 64 MiB that nothing has used before, and that stay in use
        return head(*args, **kwargs)

    made.runner.plan = dataclasses.replace(made.plan, head=wasteful)
    rows = measured(made)
    assert rows["head"]["page_faults"] >= 32  # of 2 MiB at most
    assert rows["forward"]["page_faults"] >= rows["head"]["page_faults"]


def test_a_gpu_is_refused():
    with pytest.raises(ValueError, match="does not see what a cuda does"):
        site_times.measure(types.SimpleNamespace(device=torch.device("cuda")), images(), 2)


def test_shares_of_the_roofs_by_hand(tmp_path):
    file = result_file.Results("model", CpuDevice(), {}, tmp_path / "r.json")
    measured_roofs = {"tflops": {}, "copy_gb_per_s": 10.0, "instruction_tflops": {"float32": 1.0, "int8": 2.0}}
    file.add([model_row(by_hand())], roofs=measured_roofs)
    shares = {
        site["site"]: site.get("roof_share")
        for site in json.loads((tmp_path / "r.json").read_text())["rows"][0]["sites"]
    }
    assert shares["qkv"] == pytest.approx(0.5) and shares["quantized_fc1"] == pytest.approx(0.4)
    assert shares["forward"] == pytest.approx((0.5 + 0.2) / 2)
    assert shares["layer_norm"] is None and shares["rest"] is None
    sites = by_hand()
    sites[-1]["instruction_tflops"] = {"float32": 0.5, "int8": 1.0}  # what the machine allowed in these very rounds
    file.add([model_row(sites)])
    assert [sites[i]["roof_share"] for i in (0, 1, -1)] == pytest.approx([1.0, 0.8, 0.7])


@pytest.mark.parametrize("known", [{}, {"instruction_tflops": {"float32": 1.0}}])
def test_without_a_roof_there_is_no_share(known, tmp_path):
    file = result_file.Results("model", CpuDevice(), {}, tmp_path / "r.json")
    sites = by_hand()
    file.add([model_row(sites)], roofs={"tflops": {}, "copy_gb_per_s": 10.0, **known})
    assert "roof_share" not in sites[1] and "roof_share" not in sites[4]
    assert ("roof_share" in sites[0]) == bool(known)


def test_the_higher_roof_of_two_is_kept():
    def once(fp32, int8):
        return {"tflops": {}, "copy_gb_per_s": 1.0, "instruction_tflops": {"float32": fp32, "int8": int8}}

    best = roofs.better(once(1.0, 5.0), once(2.0, 4.0))
    assert best["instruction_tflops"] == {"float32": 2.0, "int8": 5.0}


def test_shown_on_a_page():
    made = page.page([result([model_row(by_hand())]) | {"kind": "model"}])
    assert "Where the time of a forward goes: small, vitfast" in made and "quantized_fc1" in made
    cells = result_file.site_cells(by_hand())
    assert cells[0] == ["qkv", "1", "1", "50.0%", "0.500", "500", "", "0"]
    assert cells[2][4:7] == ["", "", ""]


def test_sites_from_the_command_line(tmp_path):
    try:
        libraries.import_library("timm")
    except ImportError as error:
        pytest.skip(str(error))
    arguments = ("model", "-m", "test_vit", "--batch", 2, "--provider", "vitfast", "--device", "cpu", "--rounds", 2)
    with registry.without([("layer_norm", "native")], "one site has no choice then"):
        done = bench(*arguments, "--sites", "--no-roofs", "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    rows = {row["provider"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert {"qkv", "rest", "forward"} <= {site["site"] for site in rows["vitfast"]["sites"]}
    assert "sites" not in rows["timm eager"]
    assert "vitfast, by site" in done.output and "faults" in done.output and "attention " in done.output


def test_sites_on_a_gpu_are_refused(monkeypatch):
    from vitfast.cli import bench as commands

    device = types.SimpleNamespace(torch_device=torch.device("cuda"))
    monkeypatch.setattr(commands, "open_here", lambda *_: (device, torch.float32))
    done = bench("model", "--sites", "--device", "cuda")
    assert done.exit_code == 2 and "--sites times ops by the CPU's clock" in done.output
