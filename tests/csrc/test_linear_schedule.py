"""Why the CUDA linear's warpgroups share a tile: a model of schedules, at the products of ViT-B and ViT-L."""

import json
import shutil
from dataclasses import replace

import pytest
from helpers.emulated import needs_nvcc
from helpers.scripts import compiling

from vitfast.diagnostics import chips, code_times, native_code, predict, sass, schedule
from vitfast.diagnostics.schedule import Schedule, tensor_busy
from vitfast.models.config import NAMED

PRODUCTS = {"qkv of B": 768, "fc2 of B": 3072, "qkv of L": 1024, "fc2 of L": 4096}
EPILOGUE = 17 * 128
"""Clocks of a warpgroup's epilogue of 64 by 256 sums: 17 instructions an element, as those in Triton have."""

TOGETHER = Schedule(64, 256, together=True, stages=3)
CLUSTER = Schedule(64, 256, together=True, stages=3, weight_shared=2)  # what csrc/cuda/linear.cuh does
PING_PONG = {
    "64x256": Schedule(64, 256, together=False, stages=4),
    "128x128": Schedule(128, 128, together=False, stages=5),  # sums of a warpgroup: as many
}


def busy(schedule, k):
    return tensor_busy(schedule, steps=k // 64, epilogue=EPILOGUE)


@pytest.mark.parametrize("k", PRODUCTS.values(), ids=PRODUCTS)
def test_a_shared_tile_is_better_than_ping_pong(k):
    """Ping-pong hides the epilogue, but its tiles are half as large: L2 binds at less than the epilogue costs."""
    together = busy(TOGETHER, k)
    best = max(busy(schedule, k) for schedule in PING_PONG.values())
    assert together > best + 0.1
    assert 0.7 < together < 0.83 and 0.5 < best < 0.65


def test_bytes_decide():
    """With free operands ping-pong would be the better: the model does know what it hides."""
    free = {"x_shared": 1000, "weight_shared": 1000}
    together, ping_pong = (
        busy(Schedule(64, 256, together=together, stages=3, **free), 768) for together in (True, False)
    )
    assert ping_pong > together > 0.75


def test_two_blocks_that_share_weights_lift_the_bound():
    """TMA's multicast to a cluster of two; ping-pong so is bound by L2 still."""
    for k in PRODUCTS.values():
        assert busy(CLUSTER, k) > busy(TOGETHER, k) + 0.05
        assert busy(CLUSTER, k) > 0.85
        for ping_pong in PING_PONG.values():
            assert busy(replace(ping_pong, weight_shared=2), k) < 0.83


def test_busy_by_hand():
    """With no epilogue a tile in a cluster takes its products, and shared memory's port as long; alone, L2's bytes."""
    assert native_code.busy_at(0, 0, 3072) == pytest.approx(1)
    assert native_code.busy_at(0, 1024, 3072) == pytest.approx(48 / 49)  # of 48 steps of 1024 clocks
    l2 = 1024 * schedule.L2_SHARE / (2 * 64 * (128 + 256))
    assert native_code.busy_at(0, 0, 3072, weight_shared=1) == pytest.approx(l2, rel=0.01)
    assert native_code.busy_at(2000, 0, 768) < native_code.busy_at(1000, 0, 768) < native_code.busy_at(1000, 0, 3072)


def test_microseconds_by_hand():
    """591 tiles of 256 by 256 on 66 clusters are 9 rounds; with no epilogue a tile of K = 768 takes 12,288 clocks."""
    row, chip = {"epilogue_clocks": 0, "epilogue_shared_clocks": 0}, {"multiprocessors": 132, "clock_ghz": 2.0}
    dims = {"M": 50432, "N": 768, "K": 768}
    clocks = 9 * 12288 / native_code.busy_at(0, 0, 768)
    found = native_code.microseconds(row, dims, chip, memory_us=10.0)
    assert found == pytest.approx(clocks / (2000 * code_times.SUSTAINED_CLOCK) + chips.LAUNCH_US)
    assert native_code.microseconds(row, dims, chip, memory_us=500.0) == 500 + chips.LAUNCH_US


LISTING = """
        /*0000*/ S2R R0, SR_TID.X ;
.L_tile:
        /*0010*/ IADD3 R1, R1, 0x1, RZ ;
        /*0020*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0030*/ FADD R2, R2, R3 ;
.L_step:
        /*0040*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0050*/ @P0 BRA `(.L_step) ;
        /*0060*/ FMUL R24, R24, R2 ;
        /*0070*/ @P1 BRA `(.L_tile) ;
        /*0080*/ EXIT ;
"""


def test_what_is_exposed_by_hand():
    """Neither what runs once, nor what is done under the first step's products, nor the loop."""
    exposed = native_code._exposed(sass.parse(LISTING))
    assert [i.name for i in exposed] == ["IADD3", "FMUL", "BRA"]


def test_a_forward_by_hand():
    """Products that fill the chip take this kernel's time, by their epilogue; others what they had."""
    rows = [
        {"config": f"x_{name}", "epilogue_clocks": clocks, "epilogue_shared_clocks": 0}
        for name, clocks in (("norm", 500), ("norm_gelu", 2000), ("residual_stats", 1500))
    ]
    prediction = predict.predict(NAMED["vit_base_patch16_224"], batch=256, chip="h100")
    native_code.add_native(prediction, rows)
    launches = {row["site"]: row for row in prediction["launches"]}
    for site, row in zip(("qkv", "fc1", "fc2"), rows, strict=True):
        launch = launches[site]
        us = native_code.microseconds(row, launch["dims"], prediction["chip"], launch["memory_us"])
        assert launch["native_us"] == us, site
    assert "native_us" not in launches["head"] and "native_us" not in launches["attention"]
    total = sum(row["count"] * row.get("native_us", row["time_us"]) for row in prediction["launches"])
    assert prediction["by_native"]["images_per_s"] == pytest.approx(256 / total * 1e6)


def test_without_nvcc(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="nvcc, which is not on the PATH"):
        native_code.inspect_linear()


@pytest.mark.full
@needs_nvcc
def test_products_are_busy():
    """The code of each epilogue: no spill, no warning, and tensor cores as busy as ViT-B and ViT-L want them."""
    found = json.loads(compiling("-m", "vitfast", "inspect", "--native", "--json"))
    found = [row for row in found if row["kernel"] == "linear, native"]
    assert [row["config"].partition("_")[2] for row in found] == list(native_code.EPILOGUES)
    assert all(row["spill_bytes"] == 0 and row["ptxas_warnings"] == [] for row in found)
    busy = {row["config"].partition("_")[2]: row["tensor_busy_at"] for row in found}
    least = {
        "qkv": (0.85, busy["norm"]["768"], busy["norm"]["1024"]),
        "proj": (0.80, busy["residual_stats"]["768"], busy["residual_stats"]["1024"]),
        "fc1": (0.85, busy["norm_gelu"]["768"], busy["norm_gelu"]["1024"]),
        "fc2": (0.92, busy["residual_stats"]["3072"], busy["residual_stats"]["4096"]),
    }
    assert {name: shares for name, (bound, *shares) in least.items() if min(shares) < bound} == {}


@pytest.mark.full
@needs_nvcc
def test_a_forward_with_it_is_predicted():
    options = ("--model", "vit_base_patch16_224", "--batch", "256", "--native", "--json")
    found = json.loads(compiling("-m", "vitfast", "inspect", *options))
    native = {row["site"]: row["native_us"] for row in found["launches"] if "native_us" in row}
    assert set(native) == {"qkv", "proj", "fc1", "fc2"}
    # Hence its place in vitfast.ops.registry.KERNELS_BY_CODE.
    assert all(row["native_us"] < row["code_us"] for row in found["launches"] if row["site"] in native)
    assert found["by_native"]["images_per_s"] > found["by_code"]["images_per_s"]
    assert all(us > row["flops"] / 989e6 for row in found["launches"] if (us := native.get(row["site"])))
