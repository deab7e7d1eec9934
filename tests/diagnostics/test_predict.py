"""The analytic model against numbers derived by hand, and its command."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vitfast.benchmarks import predicted, shapes
from vitfast.cli.app import app
from vitfast.diagnostics import chips, code_times, launches, predict
from vitfast.engine.dtypes import QUANTIZED
from vitfast.models.config import NAMED


def prediction(model="vit_base_patch16_224", **changes):
    return predict.predict(NAMED[model], **{"batch": 256, "chip": "h100", **changes})


def row(result, site):
    return next(row for row in result["launches"] if row["site"] == site)


@pytest.mark.parametrize(
    ("model", "gflop"),
    [
        ("vit_tiny_patch16_224", 2.51),
        ("vit_small_patch16_224", 9.20),
        ("vit_base_patch16_224", 35.13),
        ("vit_large_patch16_224", 123.1),
        ("vit_huge_patch14_224", 334.6),
        ("vit_large_patch14_518", 1014),
    ],
)
def test_flops_are_twice_the_multiply_adds_of_the_literature(model, gflop):
    assert prediction(model)["gflop_per_image"] == pytest.approx(gflop, rel=2e-3)


def test_flops_and_bytes_of_vit_base_by_hand():
    result, m, c, f = prediction(), 256 * 197, 768, 3072
    assert row(result, "qkv")["flops"] == 2 * m * c * 3 * c
    assert row(result, "attention")["flops"] == 2 * 2 * 256 * 12 * 197 * 197 * 64
    assert row(result, "patch_embed")["flops"] == 2 * 256 * 196 * 768 * c
    assert row(result, "qkv")["bytes"] == 2 * (m * c + 3 * c * c + 3 * c + m * 3 * c)
    assert row(result, "fc2")["bytes"] == 2 * (m * f + c * f + c + 2 * m * c)
    assert row(result, "attention")["bytes"] == 2 * 4 * m * c
    assert row(result, "patch_embed")["bytes"] == 256 * 224 * 224 * 3 + 2 * (c * 768 + c + 196 * c + m * c)
    assert row(result, "row_stats")["bytes"] == 2 * m * c


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_flops_and_bytes_of_quantised_vit_base_by_hand(dtype):
    result, m, c = prediction(dtype=dtype), 256 * 197, 768
    assert result["gflop_per_image"] == prediction()["gflop_per_image"]
    # Operands are one byte and scales four; bias, output and residual two.
    assert row(result, "quantized_qkv")["bytes"] == m * c + 3 * c * c + 4 * (m + 3 * c) + 2 * (3 * c + m * 3 * c)
    # 12 heads of a row have a scale each.
    assert row(result, "attention_quantize")["bytes"] == 2 * 3 * m * c + m * c + 4 * m * 12
    assert row(result, "proj_head_scales")["bytes"] == m * c + c * c + 4 * (12 * m + c) + 2 * (c + 2 * m * c)
    # 24 groups of the hidden rows have a scale each.
    assert (
        row(result, "fc1_requantize")["bytes"]
        == m * c + 4 * c * c + 4 * (m + 4 * c) + 2 * 4 * c + m * 4 * c + 4 * m * 24
    )
    assert row(result, "fc2_group_scales")["bytes"] == m * 4 * c + 4 * c * c + 4 * (24 * m + c) + 2 * (c + 2 * m * c)
    assert row(result, "quantize_qkv")["bytes"] == 2 * m * c + m * c + 4 * m + 2 * 2 * c
    plain, mixed = row(prediction(), "attention"), row(result, "attention_quantize")
    differ = {name for name in plain if plain[name] != mixed[name]}
    assert differ == {"site", "dims", "bytes", "memory_us", "time_us", "share"}
    peak = {"fp8": 1979, "int8": 1979}[dtype] * chips.SUSTAINED_EIGHT
    qkv = row(result, "quantized_qkv")
    assert qkv["math_us"] == pytest.approx(
        2 * m * c * 3 * c / peak / 1e6 / qkv["tile_efficiency"] / qkv["wave_efficiency"]
    )


def test_launches_are_those_of_the_forward():
    sites = {row["site"]: row["count"] for row in prediction()["launches"]}
    assert sites == {
        "patch_embed": 1, "row_stats": 1, "qkv": 12, "attention": 12, "proj": 12, "fc1": 12, "fc2": 12,
        "norm": 1, "head": 1,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_launches_of_a_quantised_forward(dtype):
    sites = {row["site"]: row["count"] for row in prediction(dtype=dtype)["launches"]}
    block = ("quantize_qkv", "quantized_qkv", "attention_quantize", "proj_head_scales", "quantize_fc1",
             "fc1_requantize", "fc2_group_scales")  # fmt: skip
    assert sites == {"patch_embed": 1, **dict.fromkeys(block, 12), "norm": 1, "head": 1}


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_launches_of_a_quantised_forward_with_other_heads(dtype):
    """Heads of 80: attention writes bf16, and a pass quantises it."""
    result, m, c = prediction("vit_huge_patch14_224", dtype=dtype), 256 * 257, 1280
    sites = [row["site"] for row in result["launches"]]
    assert sites[3:6] == ["attention", "quantize_proj", "quantized_proj"] and len(sites) == 11
    assert row(result, "attention")["bytes"] == 2 * 4 * m * c
    assert row(result, "quantized_proj")["bytes"] == m * c + c * c + 4 * (m + c) + 2 * (c + 2 * m * c)
    assert row(result, "quantize_proj")["bytes"] == 2 * m * c + m * c + 4 * m


def test_split_products_of_vit_base_at_batch_1_by_hand():
    """fc2 has 4 x 6 tiles of 64 x 128 and cuts K into 4 parts, whose fp32 sums are written, and read by a launch."""
    result, m, c, f = prediction(batch=1), 197, 768, 3072
    fc2, added = row(result, "fc2"), row(result, "fc2_sum")
    assert fc2["config"] == "tma_64x128x64_split4"
    assert fc2["wave_efficiency"] == pytest.approx(4 * 4 * 6 / 264)
    assert fc2["bytes"] == 2 * (m * f + c * f) + 4 * 4 * m * c
    assert added["bytes"] == 4 * 4 * m * c + 2 * (c + 2 * m * c)
    assert (added["count"], added["flops"], added["bound"]) == (12, 0, "memory")
    assert row(result, "fc1")["config"] == "tma_64x128x64"


def test_sum_share_and_rate_agree():
    result = prediction()
    total = sum(row["count"] * row["time_us"] for row in result["launches"])
    assert result["time_us"] == pytest.approx(total)
    assert sum(row["share"] for row in result["launches"]) == pytest.approx(1)
    assert result["images_per_s"] == pytest.approx(256 / total * 1e6)
    assert result["predicted"] is True


def forwards():
    """Every prediction that can be made, with the peak of its 8-bit products."""
    for model in NAMED:
        for chip, card in chips.CHIPS.items():
            yield card, card.half_tflops, prediction(model, chip=chip)
            for dtype, kind in QUANTIZED.items():
                if peak := chips.peak_tflops(card, kind):
                    yield card, peak, prediction(model, chip=chip, dtype=dtype)


def test_no_prediction_beats_the_data_sheet():
    """Nor does any have a share above 1, or a bound that is not the longest of its times."""
    seen = 0
    for card, peak, result in forwards():
        for row in result["launches"]:
            in_8_bits = "precision" in row["dims"]
            assert row["flops"] / row["time_us"] / 1e6 <= (peak if in_8_bits else card.half_tflops), row
            assert row["bytes"] / row["time_us"] / 1e3 <= card.memory_gb_s, row
            times = {"math": row["math_us"], "memory": row["memory_us"], "exp": row["exp_us"]}
            assert times[row["bound"]] == max(times.values()), row
            assert row["time_us"] == times[row["bound"]] + chips.LAUNCH_US, row
            assert 0 < row["tile_efficiency"] <= 1, row
            assert 0 < row["wave_efficiency"] <= 1, row
            seen += 1
    assert seen > 8 * len(NAMED) * len(chips.CHIPS)


def test_tile_and_wave_efficiencies_by_hand():
    assert launches._wave_efficiency(132, 132) == 1
    assert launches._wave_efficiency(133, 132) == pytest.approx(133 / 264)
    attention = row(prediction(), "attention")  # 197 queries in 4 tiles of 64, 197 keys in 208
    assert attention["tile_efficiency"] == pytest.approx(197 * 197 / (256 * 208))


@pytest.mark.parametrize(("head_dim", "computed"), [(64, 64), (72, 80), (80, 80), (88, 96), (104, 128), (128, 128)])
def test_padded_head_dims_are_no_useful_work(head_dim, computed):
    """A head's columns are multiplied in one or two powers of two of at least 16."""
    config = dataclasses.replace(NAMED["vit_base_patch16_224"], head_dim=head_dim)
    attention = row(predict.predict(config, batch=256, chip="h100"), "attention")
    assert attention["tile_efficiency"] == pytest.approx(197 * 197 / (256 * 208) * head_dim / computed)


def test_exponentials_of_vit_base_by_hand():
    """16 a clock and multiprocessor, for all scores of the tiles: 256 queries by 208 keys in each of 256 * 12 heads."""
    attention = row(prediction(), "attention")
    assert attention["exp_us"] == pytest.approx(256 * 12 * 256 * 208 / (132 * 16 * 1.83e3))
    assert {launch["site"] for launch in prediction()["launches"] if launch["exp_us"]} == {"attention"}
    narrow = dataclasses.replace(NAMED["vit_base_patch16_224"], head_dim=16)
    bound = row(predict.predict(narrow, batch=256, chip="h100"), "attention")
    assert bound["bound"] == "exp" and bound["time_us"] == bound["exp_us"] + chips.LAUNCH_US


def test_gradients_of_attention_by_hand():
    """dq has three products and dkdv four; tiles of 64 tokens walk over 197 of the others as over 208."""
    result, m, c = prediction(backward=True), 256 * 197, 768
    dq, dkdv = result["launches"]
    assert [(row["site"], row["op"], row["count"]) for row in (dq, dkdv)] == [
        (name, name, 12) for name in ("attention_dq", "attention_dkdv")
    ]
    product = 2 * 256 * 12 * 197 * 197 * 64
    assert (dq["flops"], dkdv["flops"]) == (3 * product, 4 * product)
    for row in (dq, dkdv):  # six tensors like q, and three fp32 a row of each head
        assert row["bytes"] == 2 * 6 * m * c + 3 * 4 * m * 12
        assert row["tile_efficiency"] == pytest.approx(197 * 197 / (256 * 208))
        assert row["exp_us"] == pytest.approx(256 * 12 * 256 * 208 / (132 * 16 * 1.83e3))
    assert result["time_us"] == pytest.approx(12 * (dq["time_us"] + dkdv["time_us"]))


def test_clocks_of_a_backward_tile_become_microseconds():
    """4 tiles of each head, of queries or of keys, shared by 132 multiprocessors; then memory binds."""
    result = prediction(backward=True)
    tile = {"bound": "issue", "clocks": 10_000, "tensor_clocks": 2_500}
    for row, blocks in zip(result["launches"], ({"BLOCK_M": 64, "BLOCK_N": 32}, {"BLOCK_M": 32, "BLOCK_N": 64}),
                           strict=True):  # fmt: skip
        clock = 1.83e3 * code_times.SUSTAINED_CLOCK
        us = 4 * 256 * 12 * 10_000 / (132 * row["wave_efficiency"]) / clock
        found = code_times.time_by_code(row, blocks, tile, result["chip"])
        assert (found["code_bound"], found["tensor_busy"]) == ("issue", 0.25)
        assert found["code_us"] == pytest.approx(us + chips.LAUNCH_US)
        bound = code_times.time_by_code(row, blocks, {**tile, "clocks": 1}, result["chip"])
        assert (bound["code_us"], bound["code_bound"]) == (row["memory_us"] + chips.LAUNCH_US, "memory")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chip": "v100"}, "'v100'"),
        ({"dtype": "fp4"}, "'fp4'"),
        ({"batch": 0}, "got 0"),
        ({"chip": "a100", "dtype": "fp8"}, "A100 SXM 80 GB has no"),
        ({"backward": True, "dtype": "int8"}, "gradients are in bf16, fp16, fp32, got dtype 'int8'"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        prediction(**changes)


def command(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "vitfast", "inspect", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(256, "bf16"), pytest.param(1, "bf16", marks=pytest.mark.full), pytest.param(256, "fp8", marks=pytest.mark.full)],
)
def test_command_prints_one_json_document_with_the_occupancy_of_every_launch(batch, dtype):
    options = ("--batch", str(batch), "--chip", "h100", "--dtype", dtype, "--json")
    done = command("--model", "vit_base_patch16_224", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("occupancy_note") == ""
    for launch in found["launches"]:
        assert launch.pop("occupancy")["blocks_per_sm"] >= 1, launch
        launch.pop("measured_us", None)
        for name in ("code_us", "code_bound", "tensor_busy"):
            launch.pop(name)
    by_code = found.pop("by_code")
    assert by_code["launches_by_code"] >= 5  # the products of a block and its attention
    assert 0.3 < by_code["images_per_s"] / found["images_per_s"] < 1.5
    if dtype == "bf16":
        errors = found.pop("errors")
        assert errors["band"] == ("M >= 8192" if batch == 256 else "M < 1024")
        assert 0.5 < errors["flat"]["p10"] < errors["flat"]["median"] < errors["flat"]["p90"] < 1.5
    for name in ("measured_images_per_s", "measured_in"):
        found.pop(name, None)
    assert found == json.loads(json.dumps(prediction(batch=batch, dtype=dtype)))


def test_occupancy_that_is_not_known_is_said():
    """Here kernels are interpreter stubs, or there is a GPU and they compile."""
    result = prediction()
    predict.add_machine_code(result)
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert "TRITON_INTERPRET" in result["occupancy_note"]
        assert all(launch["occupancy"] is None for launch in result["launches"])
    else:
        assert result["occupancy_note"] == ""


KERNELS = {"op": "linear", "provider": "vitfast triton", "correct": True, "dtype": "bfloat16", "median_ms": 0.25,
           "dims": {"M": 256 * 197, "K": 768, "N": 3072, "epilogue": "norm gelu"}}  # fmt: skip
WHOLE = {"model": "vit_base_patch16_224", "batch": 256, "provider": "vitfast", "correct": True, "dtype": "bfloat16",
         "images_per_s": 15000.0}  # fmt: skip


def test_measurements_stand_beside_the_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr(predicted, "results_folder", lambda: tmp_path)
    others = [{**KERNELS, "dtype": "float16"}, {**KERNELS, "provider": "torch eager"}, {**KERNELS, "correct": False}]
    files = {
        "nvidia-h100-80gb-hbm3/b-old": ("kernels", "2026-01-01", [{**KERNELS, "median_ms": 0.5}]),
        "nvidia-h100-80gb-hbm3/a-new": ("kernels", "2026-02-01", [KERNELS, *({**o, "median_ms": 9.0} for o in others)]),
        "nvidia-h100-80gb-hbm3/c": ("model", "2026-01-01", [WHOLE, {**WHOLE, "batch": 1, "images_per_s": 1.0}]),
        "nvidia-h200/d": ("kernels", "2026-03-01", [{**KERNELS, "median_ms": 9.0}]),
    }
    for name, (kind, date, rows) in files.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        content = {"schema": 2, "kind": kind, "environment": {"date": date}, "method": {}, "rows": rows}
        path.write_text(json.dumps(content))
    result = prediction()
    predicted.add_measured(result, NAMED["vit_base_patch16_224"], predicted.results_of("h100"))
    assert {launch["site"]: launch.get("measured_us") for launch in result["launches"]} == {
        **dict.fromkeys((launch["site"] for launch in result["launches"]), None), "fc1": 250.0,
    }  # fmt: skip
    assert (result["measured_images_per_s"], result["measured_in"]) == (15000.0, "c.json")
    console = Console(width=160, record=True, file=io.StringIO())
    for part in predict.render(result):
        console.print(part)
    text = console.export_text()
    assert "predicted, not measured" in text and "measured: 15,000 img/s (c.json)" in text and "250.0" in text


def test_measurements_of_a_quantised_forward():
    """Products in 8 bits by rows in 8 bits, all else by those in bf16."""
    config, fp8 = NAMED["vit_base_patch16_224"], "float8_e4m3fn"
    kinds = [kind for kind in shapes.model_dims(config, 256) if kind[1].get("precision") != "int8"]
    rows = [
        {**KERNELS, "op": op, "dims": dims, "dtype": fp8 if "precision" in dims else "bfloat16", "median_ms": i}
        for i, (op, dims) in enumerate(kinds, 1)
    ]
    rows += [{**row, "dtype": "int8", "median_ms": 99} for row in rows]
    rows += [{**WHOLE, "images_per_s": 1.0}, {**WHOLE, "provider": "vitfast fp8", "dtype": fp8, "images_per_s": 2.0}]
    result = prediction(dtype="fp8")
    predicted.add_measured(result, config, [(Path("x.json"), {"rows": rows})])
    for launch in result["launches"]:
        assert launch["measured_us"] == 1e3 * (1 + kinds.index((launch["op"], launch["dims"]))), launch
    assert result["measured_images_per_s"] == 2.0


@pytest.mark.full
def test_command_predicts_the_gradients_of_attention():
    """By the machine code of both kernels, and with what binds them; nothing stands beside it that is of a forward."""
    done = command("--model", "vit_base_patch16_224", "--backward", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backward"] and found["occupancy_note"] == "" and "errors" not in found
    for launch in found["launches"]:
        assert max(launch["memory_us"], launch["exp_us"]) < launch["code_us"] < 5 * launch["time_us"]
        assert 0 < launch["tensor_busy"] < 1
    assert [row["code_bound"] for row in found["launches"]] == ["memory", "issue"]  # as docs/speed-log.md has it
    said = " ".join(command("--model", "vit_base_patch16_224", "--backward").stdout.split())
    assert "gradients of attention in vit_base_patch16_224 batch 256 bf16" in said and "img/s" not in said


@pytest.mark.full
def test_command_says_that_it_predicts_and_how_well():
    said = " ".join(command("--model", "vit_tiny_patch16_224").stdout.split())
    assert "predicted, not measured" in said
    assert "error of the models, predicted over measured (by others, cuBLAS, M >= 8192; median, p10 to p90)" in said
    assert "img/s if a forward is off as those products are: flat" in said
    assert "errors" not in json.loads(command("--model", "vit_tiny_patch16_224", "--chip", "a100", "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "vit_tiny_patch16_224", "--arch", "sm_90"), "one or the other"),
        (("--backward",), "--backward goes with --model"),
        (("--native", "--backward"), "it goes without --arch, --kernel and --backward"),
        (("--model", "resnet50"), "resnet50"),
    ],
)
def test_command_refuses_mixtures(arguments, message):
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
