"""Result files, what is compared and drawn from them, and whole models' rows."""

import csv
import itertools
import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from helpers.benching import CountedDevice, bench, result, rows_of, timed_provider

from vitfast import testing
from vitfast.benchmarks import compare, model, model_providers, page, report, result_file, svg
from vitfast.benchmarks.device import CpuDevice
from vitfast.benchmarks.environment import ROOT
from vitfast.benchmarks.providers import BASELINE
from vitfast.integrations.accelerate import accelerated


def row(provider="vitfast triton", ms=1.0, spread=0.02, case="attention", **more):
    times = {"median_ms": ms, "p20_ms": ms * (1 - spread / 2), "p80_ms": ms * (1 + spread / 2), "spread": spread}
    return {"case": case, "provider": provider, "correct": True, "noisy": spread > 0.05, "ratio": 1.0, **times, **more}


def wrong(provider="vitfast triton", case="attention"):
    return {"case": case, "provider": provider, "correct": False, "error": "incorrect: max error 1 exceeds 0"}


def saved(path, content):
    path.write_text(json.dumps(content))
    return path


# --- committed results ---


def test_readme_tables_come_from_their_result_files():
    text = (ROOT / "README.md").read_text()
    assert report.MARKED.search(text), "README.md has no marked table"
    assert report.redraw(text) == text, "run: vitfast bench report --update README.md"


def test_committed_results_name_their_commit_and_environment():
    paths = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert paths
    for path in paths:
        content = result_file.read(path)
        assert re.fullmatch(r"[0-9a-f]{40}", content["environment"]["commit"]), path
        assert content["environment"]["torch"] and content["rows"], path


def test_every_older_schema_is_read():
    """By committed files: their rows have what rows of today have, and lose nothing."""
    paths = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    written = {path: json.loads(path.read_text()) for path in paths}
    assert {1, 2} <= {content["schema"] for content in written.values()}
    for path, content in written.items():
        rows = result_file.read(path)["rows"]
        for before, after in zip(content["rows"], rows, strict=True):
            assert after.get("provider") == before.get("provider", before.get("peer")), path
            assert "peer" not in after
            same = before.keys() - {"peer", "dims"}
            assert {name: after[name] for name in same} == {name: before[name] for name in same}, path
            product = before.get("op") in ("linear", "quantized_linear")
            sizes = {"rows": "M", "inner": "K", "width": "N"} if product else {}
            dims = before.get("dims", {})
            assert after.get("dims", {}) == {sizes.get(name, name): value for name, value in dims.items()}, path


# --- writing and reading ---


def test_results_are_whole_after_every_row(tmp_path):
    file = result_file.Results("kernels", CpuDevice(), {"baseline": BASELINE}, tmp_path / "deep" / "r.json")
    file.add([row()])
    first = json.loads(file.path.read_text())
    file.add([row(case="linear")], not_run=["mlp"])
    second = json.loads(file.path.read_text())
    assert first["schema"] == result_file.SCHEMA and len(first["rows"]) == 1
    assert [r["case"] for r in second["rows"]] == ["attention", "linear"] and second["not_run"] == ["mlp"]
    assert list(file.path.parent.iterdir()) == [file.path]


def test_a_second_run_of_a_day_does_not_overwrite_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(result_file, "results_folder", lambda: tmp_path)
    names = []
    for _ in range(3):
        file = result_file.Results("model", CpuDevice(), {})
        file.add()
        names.append(file.path.name)
    assert len(set(names)) == 3 and names[1].endswith("-2.json")


def test_roof_share_by_hand(tmp_path):
    file = result_file.Results("kernels", CpuDevice(), {}, tmp_path / "r.json")
    roofs = {"tflops": {"bfloat16": 800.0}, "copy_gb_per_s": 3000.0}
    product = row("a", ms=1.0, flops=4e11, bytes=3e8, dtype="bfloat16")  # 0.5 ms at 800 TFLOP/s, 0.1 ms at 3 TB/s
    memory = row("b", ms=1.0, flops=0, bytes=6e8, dtype="bfloat16")  # 0.2 ms
    unknown = row("c", ms=1.0, flops=4e11, bytes=3e8, dtype="float16")
    file.add([product, memory, unknown], roofs=roofs)
    assert (product["roof_share"], product["roof_bound"]) == (pytest.approx(0.5), "product")
    assert (memory["roof_share"], memory["roof_bound"]) == (pytest.approx(0.2), "memory")
    assert "roof_share" not in unknown


def test_products_are_held_against_the_cpus_own_instructions(tmp_path):
    """1 GFLOP in 4 ms: of 0.5 TFLOP/s a half; torch's own product, at 0.3, is no roof where that is known."""
    file = result_file.Results("kernels", CpuDevice(), {}, tmp_path / "r.json")
    roofs = {"tflops": {"float32": 0.3, "float16": 0.1}, "instruction_tflops": {"float32": 0.5, "int8": 2.0}}
    made = {dtype: row(dtype, ms=4.0, flops=1e9, bytes=1e6, dtype=dtype) for dtype in ("float32", "int8", "float16")}
    bare = row("memory", ms=4.0, flops=1e6, bytes=2e7, dtype="float32")
    whole_model = row("model", ms=4.0, flops=1e9, dtype="int8")
    file.add([*made.values(), bare, whole_model], roofs=roofs | {"copy_gb_per_s": 10.0})
    shares = [one["roof_share"] for one in (*made.values(), bare, whole_model)]
    assert shares == pytest.approx([0.5, 0.125, 2.5, 0.5, 0.125])
    assert [bare["roof_bound"], made["int8"]["roof_bound"]] == ["memory", "product"]
    meanwhile = row("float32", ms=4.0, flops=1e9, bytes=1e6, dtype="float32", instruction_tflops={"float32": 0.25})
    file.add([meanwhile])
    assert meanwhile["roof_share"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "no result file"), ("[]", "no result file"), ('{"schema": 9, "rows": []}', "schema 9")]
)
def test_what_is_no_result_is_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        result_file.read(tmp_path / "r.json")


def test_csv_has_a_line_per_row(tmp_path):
    rows = [row(dims={"rows": 7}), wrong("other")]
    result_file.write_csv(tmp_path / "r.csv", [result(rows)])
    first, second = csv.DictReader((tmp_path / "r.csv").open())
    assert (first["provider"], first["median_ms"], json.loads(first["dims"])) == ("vitfast triton", "1.0", {"rows": 7})
    assert second["correct"] == "False" and second["median_ms"] == ""


# --- comparing ---


def test_a_slowed_kernel_is_caught():
    before, after = CountedDevice(), CountedDevice()
    quick = rows_of(before, timed_provider(before, "vitfast triton", 1.0)).values()
    slow = rows_of(after, timed_provider(after, "vitfast triton", 1.1)).values()
    again = {change.provider: change for change in compare.compare(result(quick), result(quick))}
    assert {change.verdict for change in again.values()} == {"same"}
    found = {change.provider: change for change in compare.compare(result(quick), result(slow))}
    assert found["vitfast triton"].verdict == "slower" and found["vitfast triton"].regression
    assert found["vitfast triton"].change == pytest.approx(0.1, abs=0.01)
    assert found[BASELINE].verdict == "same"
    back = {change.provider: change for change in compare.compare(result(slow), result(quick))}
    assert back["vitfast triton"].verdict == "faster" and not back["vitfast triton"].regression


@pytest.mark.parametrize(
    ("old", "new", "verdict", "regression"),
    [
        (row(ms=1.0), row(ms=1.02), "same", False),
        (row(ms=1.0), row(ms=1.04), "slower", True),
        (row(ms=1.0, spread=0.2), row(ms=1.04), "same", False),  # too noisy to say
        (row(ms=1.0), row(ms=0.9), "faster", False),
        (row(BASELINE, ms=1.0), row(BASELINE, ms=2.0), "slower", False),  # not ours
        (row(), wrong(), "incorrect", True),
        (wrong(), row(), "fixed", False),
    ],
)
def test_verdicts(old, new, verdict, regression):
    (change,) = compare.compare(result([old]), result([new]))
    assert (change.verdict, change.regression) == (verdict, regression)


def test_rows_that_vanish_or_appear_are_said():
    gone, new = compare.compare(result([row()]), result([row(case="linear")]))
    assert (gone.verdict, gone.regression, new.verdict, new.regression) == ("missing", True, "new", False)


def test_other_machines_are_not_compared():
    with pytest.raises(ValueError, match=r"different machines.*'H100'"):
        compare.compare(result([row()], gpu="H100"), result([row()]))


def test_compare_command(tmp_path):
    before, after = (saved(tmp_path / f"{ms}.json", result([row(ms=ms)])) for ms in (1.0, 1.5))
    assert bench("compare", before, before).exit_code == 0
    done = bench("compare", before, after)
    assert done.exit_code == 1
    assert "slower" in done.output and "1 regression(s) of 1 rows" in done.output


# --- showing ---


def full_result():
    work = {"dtype": "bfloat16", "flops": 10**12, "bytes": 10**9, "tflops": 500.0, "gb_per_s": 500.0}
    rows = [row(ms=2.0, **work), row(BASELINE, ms=2.5, spread=0.3, **work), wrong("vitfast native")]
    rows.append({"case": "attention", "provider": "flash-attn <3>", "correct": False, "error": "not installed"})
    content = result(rows, gpu="NVIDIA <H100>")
    content["roofs"] = {"tflops": {"bfloat16": 700.0}, "copy_gb_per_s": 2900.0}
    return content


def test_page_is_whole_and_asks_for_nothing():
    text = page.page([full_result()])
    ET.fromstring(re.sub(r"<!doctype html>|<(meta|link)[^>]*>", "", text))  # every tag is closed, every & escaped
    assert "<script" not in text and "http" not in text and "url(" not in text and "@import" not in text
    assert "NVIDIA &lt;H100&gt;" in text
    assert text.count('class="mark"') == 4  # two in the roofline, two in its legend
    assert "incorrect<title>" in text
    assert ">bfloat16: 700<" in text and "2900 GB/s" in text


def test_names_of_roofs_do_not_cover_each_other():
    content = full_result()
    content["rows"] += [{**content["rows"][0], "dtype": dtype} for dtype in ("float16", "float8_e4m3fn")]
    roofs = {"tflops": {"bfloat16": 700.0, "float16": 690.0, "float8_e4m3fn": 1400.0}, "copy_gb_per_s": 2900.0}
    drawn = svg.roofline(content["rows"], roofs, svg.style_of(["vitfast triton", BASELINE]))
    places = [float(y) for y in re.findall(r'<text class="tick" x="728" y="([\d.]+)">', drawn)]
    assert len(places) == 3 and all(below - above >= 15 for above, below in itertools.pairwise(places))


def test_bars_are_as_long_as_they_say():
    drawn = svg.bars(full_result()["rows"], svg.style_of(["vitfast triton", BASELINE]))
    widths = [float(width) for width in re.findall(r'<rect [^>]*?width="([\d.]+)"', drawn)]
    assert widths[0] / widths[1] == pytest.approx(2.0 / 2.5, rel=1e-3)
    assert len(widths) == 2  # neither the wrong nor the absent one has a bar
    assert "flash-attn" not in drawn


def test_roofline_points_lie_where_they_should():
    axis = svg._Axis(1, 100, 0, 200)
    assert [axis.at(v) for v in (1, 10, 100)] == pytest.approx([0, 100, 200])
    assert axis.ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert svg.roofline(full_result()["rows"], {}, {}) == ""  # no roof, no plot


def test_colours_of_providers_differ():
    names = ["vitfast triton", "vitfast native", BASELINE, "SDPA flash", "SDPA cuDNN", "flash-attn 3", "xformers"]
    styles = svg.style_of(names)
    assert len(set(styles.values())) == len(names)
    assert styles["vitfast native"][0] == svg.COLOURS[0]


def test_terminal_table_says_what_matters():
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in result_file.table(full_result()):
        console.print(part)
    text = console.export_text()
    assert "noisy" in text and "incorrect: max error 1 exceeds 0" in text
    assert "did not run: flash-attn <3>: not installed" in text


def test_report_command(tmp_path):
    path = saved(tmp_path / "r.json", full_result())
    assert bench("report", path, "-o", tmp_path / "page.html", "--csv", tmp_path / "r.csv").exit_code == 0
    assert (tmp_path / "page.html").read_text() == page.page([full_result()])
    shown = bench("report", path)
    assert shown.exit_code == 0
    assert "| attention | vitfast triton | 2 | 1.98–2.02 | 500 | 1.00 |" in shown.stdout
    assert "not installed" not in shown.stdout


@pytest.mark.parametrize("to_page", [False, True])
def test_what_cannot_be_shown_says_so(to_page, tmp_path):
    content = full_result() | {"kind": "pipeline", "rows": [{"case": "thumbnails", "workers": 2}]}
    path = saved(tmp_path / "r.json", content)
    done = bench("report", path, *(("-o", tmp_path / "page.html") if to_page else ()))
    assert done.exit_code == 2 and "'pipeline'" in done.stderr and not (tmp_path / "page.html").exists()


def test_results_of_no_commit_and_of_a_changed_one_are_shown_as_such():
    unknown, changed = result([row(tflops=1.0)], commit=None), result([row(tflops=1.0)], dirty=True)
    assert "commit unknown" in report.markdown(unknown) and "commit unknown" in page.page([unknown])
    assert "commit 000000000 with changes" in report.markdown(changed)


def test_png(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = bench("report", saved(tmp_path / "r.json", full_result()), "--png", tmp_path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "kernels-attention.png").read_bytes()[:4] == b"\x89PNG"


# --- whole models ---


def test_model_comparison_gives_complete_rows(timm):
    providers = ("vitfast", "timm eager", "TensorRT", "timm CUDA graph")
    rows = model.compare("test_vit", 2, CpuDevice(), torch.float32, providers=providers, rounds=3)
    assert [r["provider"] for r in rows] == list(providers)
    for one in rows[:2]:
        assert one["correct"], one
        assert one["p20_ms"] <= one["median_ms"] <= one["p80_ms"]
        assert one["images_per_s"] > 0 and one["build_s"] >= 0 and one["first_call_ms"] > 0
        assert one["cosine"] == pytest.approx(1, abs=1e-6) and one["max_error"] < 1e-4
    assert rows[1]["ratio"] == 1
    assert {"qkv", "attention"} <= rows[0]["plan"].keys() and rows[0]["plan_s"] > 0 and "plan" not in rows[1]
    assert [r.get("error") for r in rows[2:]] == ["runs on a GPU only", "CUDA graphs need a GPU"]


def test_a_model_without_a_classifier_gives_its_embedding(timm, monkeypatch):
    """As timm's vit_huge_patch14_224 is."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, num_classes=0, **options))
    rows = model.compare("test_vit", 1, CpuDevice(), torch.float32, providers=("vitfast",), rounds=2)
    assert all(one["correct"] for one in rows), rows


def test_wrong_model_gets_no_time(timm, monkeypatch):
    monkeypatch.setitem(model_providers.PROVIDERS, "vitfast", lambda oracle, images: lambda x: oracle(x) + 0.1)
    monkeypatch.setitem(model_providers.PROVIDERS, "nan", lambda oracle, images: lambda x: oracle(x) * float("nan"))
    rows = model.compare("test_vit", 2, CpuDevice(), torch.float32, providers=("vitfast", "nan"), rounds=2)
    for one in rows[:2]:
        assert one["error"].startswith("incorrect: error") and "median_ms" not in one
    assert rows[2]["correct"]


def test_eight_bits_are_judged_by_the_cosine_and_marked(timm, monkeypatch):
    def noisy(share):
        def build(oracle, images):
            noise = testing.make(2, 1000, seed=5)
            return lambda x: (y := oracle(x)) + share * noise * y.square().mean().sqrt()

        return build

    for name, share in (("rough", 0.1), ("broken", 0.5)):
        monkeypatch.setitem(model_providers.PROVIDERS, name, noisy(share))
        monkeypatch.setitem(model_providers.EIGHT_BIT, name, "int8")
    rows = model.compare(
        "test_vit", 2, CpuDevice(), torch.float32, providers=("rough", "broken", "vitfast fp8"), rounds=2
    )
    rough, broken, ours, _ = rows
    assert rough["correct"] and rough["cosine"] == pytest.approx(0.995, abs=1e-3) and rough["median_ms"] > 0
    assert broken["error"].startswith("incorrect: cosine 0.8") and "median_ms" not in broken
    assert (rough["dtype"], rough["eight_bit"], ours["dtype"]) == ("int8", True, "float8_e4m3fn")
    assert "emulation" in ours["error"]


def test_a_model_that_turns_wrong_gets_no_time(timm, monkeypatch):
    calls = []

    def tiring(oracle, images):
        return lambda x: (calls.append(1), oracle(x) + (len(calls) > 4))[1]

    monkeypatch.setitem(model_providers.PROVIDERS, "vitfast", tiring)
    rows = model.compare("test_vit", 2, CpuDevice(), torch.float32, providers=("vitfast",), rounds=5)
    assert rows[0]["error"].startswith("incorrect: error") and "median_ms" not in rows[0]


def test_model_command(timm, tmp_path):
    done = bench(
        "model", "-m", "test_vit", "--batch", 2, "--provider", "vitfast", "--device", "cpu", "--rounds", 2,
        "--no-roofs", "--json", tmp_path / "r.json", "--html", tmp_path / "r.html",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {one["provider"] for one in rows} == {"vitfast", "timm eager"} and all(one["correct"] for one in rows)
    assert not any("provisional" in one for one in rows)  # times in turn have taken the place of those alone
    assert "test_vit batch 2 float32" in (tmp_path / "r.html").read_text()


def test_a_provider_that_comes_too_late_says_so(timm):
    rows = model.compare("test_vit", 2, CpuDevice(), torch.float32, providers=("vitfast",), rounds=9, seconds=0)
    assert rows[0]["error"] == "no time left to prepare it"
    assert rows[1]["correct"] and rows[1]["rounds"] == 3


def test_transformers_provider_has_timms_weights(timm):
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=7).eval()
    images = testing.make(2, 3, 32, 32).cpu()
    with torch.no_grad():
        logits = theirs(images)
        torch.testing.assert_close(model_providers.transformers(theirs, images)(images), logits)
        for provider in (model_providers.eager_accelerated, model_providers.transformers_accelerated):
            run = provider(theirs, images)
            assert accelerated(run)
            torch.testing.assert_close(run(images), logits, atol=1e-4, rtol=1e-4)


def test_flops_of_known_models_are_in_the_rows():
    assert model._work("vit_base_patch16_224", 2)["flops"] == pytest.approx(2 * 35.13e9, rel=2e-3)
    assert model._work("resnet50", 2) == {}
