"""The `vitfast` command: exit codes, one JSON document on stdout, clear messages, quick help."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.photos import FakeEngine, make_photos, save, truncate
from PIL import Image
from typer.testing import CliRunner

import vitfast
from vitfast.cli.app import app
from vitfast.pipeline.parquet import read_embeddings

DEFAULTS = {"model": None, "preprocess": None}
"""What `load` is asked for where the options for bare files are not given."""


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture
def engine(monkeypatch):
    """Stands for the model: `load` gives it, and notes what it was asked for."""
    fake = FakeEngine(labels=["red", "green", "blue"])
    fake.loaded = []

    def load(source, **options):
        fake.loaded.append((source, options))
        print("a library that talks")
        return fake

    monkeypatch.setattr("vitfast.engine.load.load", load)
    return fake


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="vitfast")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def answer(result):
    """The one JSON document on stdout."""
    return json.loads(result.stdout)


# --- embed ---


def test_embed(photos, tmp_path, engine):
    out = tmp_path / "out"
    result = run("embed", photos, "-m", "hub/model", "-o", out, "--batch-size", 3, "--dtype", "bf16", "--device", "cpu")
    assert result.exit_code == 1  # three are bad
    asked = {"device": "cpu", "dtype": "bf16", "allow_pickle": False, "weights_key": None} | DEFAULTS
    assert engine.loaded == [("hub/model", asked)]
    assert max(engine.batches) == 3
    assert "10 done, 3 failed, 0 skipped" in result.stdout
    assert "img/s" in result.stdout
    assert f"failed: {photos / 'b00.jpg'}: not an image in a known format" in result.stdout
    assert pq.read_table(out).num_rows == 13


def test_a_bare_file_by_name_and_its_preprocessing(photos, engine):
    options = [
        "--arch",
        "vit_base_patch16_224",
        "--mean",
        "0.5",
        "--std",
        "0.1,0.2,0.3",
        "--size",
        "9",
        "--crop",
        "8x16",
    ]
    run("classify", photos / "p0.png", "-m", "last.pth", "--allow-pickle", *options)
    (_, asked), *_ = engine.loaded
    assert (asked["model"], asked["allow_pickle"]) == ("vit_base_patch16_224", True)
    assert asked["preprocess"] == {"mean": [0.5], "std": [0.1, 0.2, 0.3], "size": 9, "crop": (8, 16)}
    for option, value in (("--mean", "bright"), ("--size", "8xx8"), ("--crop", "")):
        result = run("classify", photos / "p0.png", "-m", "last.pth", option, value)
        assert result.exit_code == 2
        assert "expected" in result.stderr


def test_embed_json_and_resume(photos, tmp_path, engine):
    arguments = ["embed", photos, "-m", "hub/model", "-o", tmp_path / "out", "--json"]
    first = answer(run(*arguments))
    assert (first["done"], len(first["failed"]), first["skipped"], first["interrupted"]) == (10, 3, 0, False)
    assert first["model"] == "hub/model"
    assert {Path(failed["path"]).name for failed in first["failed"]} == {"b00.jpg", "b99.jpg", "p45.jpg"}
    assert all(failed["reason"] for failed in first["failed"])
    assert first["images_per_second"] > 0
    for name in ("b00.jpg", "b99.jpg", "p45.jpg"):
        save(photos / name)
    second = run(*arguments)
    assert second.exit_code == 0
    assert (answer(second)["done"], answer(second)["failed"], answer(second)["skipped"]) == (3, [], 10)


def test_embed_with_nothing_left_still_knows_a_changed_model(photos, tmp_path, engine):
    """The same path may hold other weights by now, and "done before" would then be wrong."""
    arguments = ["embed", photos / "p0.png", "-m", "hub/model", "-o", tmp_path / "out"]
    assert run(*arguments).exit_code == 0
    again = run(*arguments)
    assert again.exit_code == 0
    assert "0 done, 0 failed, 1 skipped" in again.stdout
    engine.fingerprint = "retrained"
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "'weights of a fake', not 'retrained'" in refused.stderr
    assert run(*arguments, "--overwrite").exit_code == 0
    assert read_embeddings(tmp_path / "out").num_rows == 1


def test_changed_pictures_are_said_and_refreshed(photos, tmp_path, engine):
    arguments = ["embed", *photos.glob("*.png"), "-m", "m", "-o", tmp_path / "out"]
    run(*arguments)
    save(photos / "p3.png", 99)
    skipped = run(*arguments)
    assert f"skipped (--refresh embeds them): 1 file: {photos / 'p3.png'}" in skipped.stdout
    assert answer(run(*arguments, "--json"))["skipped_changed"] == [str(photos / "p3.png")]
    assert "1 done, 0 failed, 9 skipped" in run(*arguments, "--refresh").stdout
    os.utime(photos / "p4.png", ns=(1, 1))
    assert "0 done, 0 failed, 10 skipped" in run(*arguments, "--refresh", "--checksum").stdout
    assert "1 done, 0 failed, 9 skipped" in run(*arguments, "--refresh").stdout
    assert run(*arguments, "--checksum").exit_code == 2


def test_what_is_left_out_or_unusual_is_said(photos, tmp_path, engine):
    (photos / "list.txt").write_text("")
    Image.new("RGB", (8, 8)).save(photos / "q.tga")
    for command, out in (("embed", ["-o", tmp_path / "out"]), ("classify", [])):
        result = run(command, photos, "-m", "m", *out)
        assert f"left out: no known ending of an image: 1 file: {photos / 'list.txt'}" in result.output
        assert f"note: taken for TGA by its ending: 1 file: {photos / 'q.tga'}" in result.output
    found = answer(run("embed", photos, "-m", "m", "-o", tmp_path / "two", "--json"))
    assert found["left_out"] == {
        "count": 1,
        "files": [{"path": str(photos / "list.txt"), "reason": "no known ending of an image"}],
    }
    assert found["notes"] == [{"path": str(photos / "q.tga"), "note": "taken for TGA by its ending"}]


def test_limits_are_options(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    Image.new("RGB", (90, 90)).save(tmp_path / "bomb.png")
    Image.new("RGB", (90, 90)).save(tmp_path / "photo.jpg")
    result = run("classify", tmp_path, "-m", "m")
    assert "bomb.png: failed: too many pixels" in result.stdout
    assert "read at 1/2 of its 90x90 pixels" in result.stderr
    assert run("classify", tmp_path, "-m", "m", "--max-pixels", 9000).exit_code == 0
    Image.new("RGB", (900, 900)).save(tmp_path / "photo.jpg")
    assert "limit is 1 MiB" in run("classify", tmp_path, "-m", "m", "--max-pixels", 10**6, "--decode-memory", 1).stdout


def test_an_unreadable_folder_fails_the_run(photos, tmp_path, engine, monkeypatch):
    (photos / "closed").mkdir()
    original = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", closed)
    for name in ("b00.jpg", "b99.jpg", "p45.jpg"):
        save(photos / name)
    result = run("embed", photos, "-m", "m", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert f"failed: {photos / 'closed'}: cannot be read: Permission denied" in result.stdout
    assert "13 done" in result.stdout


def test_many_failures_are_not_all_printed(tmp_path, engine):
    (tmp_path / "photos").mkdir()
    for i in range(30):
        (tmp_path / "photos" / f"{i}.jpg").write_text("no")
    result = run("embed", tmp_path / "photos", "-m", "m", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stdout.count("failed:") == 20
    assert "10 more" in result.stdout


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("empty", "out", "no images in folder"),
        ("missing", "out", "no such file or folder"),
        ("*.none", "out", "no files match"),
        ("p.png", "p.png", "cannot be written"),
        ("p.png", "p.png/below", "cannot be written"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_said_before_any_model_is_loaded(source, out, message, as_json, tmp_path, engine):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "p.png")
    result = run("embed", tmp_path / source, "-m", "m", "-o", tmp_path / out, *(["--json"] if as_json else []))
    assert result.exit_code == 2
    assert engine.loaded == []
    assert message in result.stderr
    assert str(tmp_path) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    if as_json:
        assert message in answer(result)["error"]
    else:
        assert result.stdout == ""


def test_a_model_that_fails(photos, tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise ValueError("no such model: 'm'")

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    for load, code, message in ((wrong, 2, "vitfast: no such model"), (broken, 1, "vitfast: RuntimeError: out of")):
        monkeypatch.setattr("vitfast.engine.load.load", load)
        result = run("embed", photos, "-m", "m", "-o", tmp_path / "out", "--json")
        assert result.exit_code == code
        assert result.stderr.startswith(message)
        assert "error" in answer(result)
        assert not (tmp_path / "out").exists()  # a model that is refused leaves no empty folder
    debug = CliRunner().invoke(app, ["--debug", "embed", str(photos), "-m", "m", "-o", str(tmp_path / "out")])
    assert "Traceback" in debug.stderr
    assert debug.exit_code == 1


def test_interrupted(photos, tmp_path, engine, monkeypatch):
    class Interrupted(FakeEngine):
        def __call__(self, images, *, preprocessed):
            if self.batches:
                raise KeyboardInterrupt
            return super().__call__(images, preprocessed=preprocessed)

    fake = Interrupted()
    monkeypatch.setattr("vitfast.engine.load.load", lambda *_, **__: fake)
    arguments = ["embed", photos, "-m", "m", "-o", tmp_path / "out", "--batch-size", 2, "--json"]
    result = run(*arguments)
    assert result.exit_code == 130
    assert answer(result)["interrupted"]
    monkeypatch.setattr("vitfast.engine.load.load", lambda *_, **__: engine)
    result = answer(run(*arguments))
    assert result["done"] + result["skipped"] == 10
    assert pq.read_table(tmp_path / "out").num_rows == 13


# --- classify ---


def test_classify(photos, engine):
    result = run("classify", photos / "p0.png", "-m", "m", "--topk", 2)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == str(photos / "p0.png")
    assert len(lines) == 3
    assert lines[1].split()[1] in ("red", "green", "blue")
    assert lines[1].split()[0].endswith("%")


def test_classify_json_with_bad_images(photos, engine):
    result = run("classify", photos, "-m", "m", "--json")
    assert result.exit_code == 1
    rows = answer(result)
    assert len(rows) == 13
    assert {row["status"] == "ok" for row in rows if row["classes"]} == {True}
    assert [len(row["classes"]) for row in rows if row["status"] == "ok"] == [3] * 10


def test_classify_without_a_head(photos, engine):
    engine.classes = 0
    result = run("classify", photos, "-m", "m")
    assert result.exit_code == 2
    assert "no classification head" in result.stderr


# --- doctor, inspect ---


@pytest.mark.parametrize(("command", "file"), [("doctor", "doctor"), ("inspect", "compiled")])
def test_reports(command, file, monkeypatch):
    module = importlib.import_module(f"vitfast.diagnostics.{file}")
    asked = {}

    def report(**options):
        asked.update(options)
        print("a library that talks")
        return [{"kernel": "linear"}]

    monkeypatch.setattr(module, {"doctor": "report", "inspect": "inspect"}[command], report)
    monkeypatch.setattr(module, "render", lambda found: f"rendered {len(found)}")
    assert answer(run(command, "--json")) == [{"kernel": "linear"}]
    assert run(command).stdout == "rendered 1\n"
    if command == "inspect":
        assert asked == {"kernels": None}
        run("inspect", "--arch", "sm_80", "--arch", "sm_90", "--kernel", "linear")
        assert asked == {"archs": ["sm_80", "sm_90"], "kernels": ["linear"]}


def test_models_lists_what_loads_and_what_does_not_and_why():
    rows = answer(run("models", "--json"))
    assert {"library": "transformers", "class": "SiglipVisionModel", "refused": ""} in rows
    assert {row["class"] for row in rows if row["library"] == "timm"} >= {"VisionTransformer", "Eva", "Hiera"}
    assert "Hiera" in run("models", "hiera").stdout and "hierarchical" in run("models", "hiera").stdout
    assert run("models", "nothing").exit_code == 2


def test_doctor_runs_here():
    assert answer(run("doctor", "--json"))
    assert "torch" in run("doctor").stdout


# --- the command itself ---


def env():
    root = str(Path(vitfast.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env(), timeout=120)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["embed", "--help"], ["classify", "-h"], ["inspect", "-h"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom vitfast.cli.app import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'triton', 'numpy', 'PIL', 'pyarrow'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_python_dash_m():
    started = time.perf_counter()
    done = python("-m", "vitfast", "--version")
    assert done.stdout == f"vitfast {vitfast.__version__}\n"
    assert time.perf_counter() - started < 10
    assert "Usage: vitfast " in python("-m", "vitfast", "--help").stdout


@pytest.mark.parametrize("command", ["embed", "classify", "doctor", "inspect", "models"])
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"vitfast {command}" in result.stdout.split("Example:")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed"],
        ["embed", "a.png", "-m", "m"],
        ["embed", "a.png", "-m", "m", "-o", "o", "--dtype", "int4"],
        ["embed", "a.png", "-m", "m", "-o", "o", "--batch-size", "0"],
        ["classify", "a.png", "-m", "m", "--topk", "0"],
        ["unknown"],
    ],
)
def test_usage_errors(arguments, engine):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage" in result.stderr


def test_completion_is_on():
    assert "--install-completion" in run("--help").stdout


def test_a_bomb_and_a_truncated_file_give_one_line_each(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    Image.new("RGB", (90, 90)).save(tmp_path / "bomb.png")
    truncate(save(tmp_path / "cut.jpg"))
    result = run("classify", tmp_path, "-m", "m")
    assert result.exit_code == 1
    assert "too many pixels: 90x90, the limit is 5000" in result.stdout
    assert len(result.stdout.splitlines()) == 2
    assert "Warning" not in result.output


DTYPES = {"float32": "fp32", "bfloat16": "bf16", "fp32": "fp32", "int8": "int8"}


@pytest.mark.parametrize(("given", "short"), DTYPES.items())
def test_dtypes_go_by_both_names(given, short, engine, tmp_path, photos):
    run("embed", photos, "-m", "m", "-o", tmp_path / "out", "--dtype", given, "--allow-pickle")
    asked = {"device": None, "dtype": short, "allow_pickle": True, "weights_key": None} | DEFAULTS
    assert engine.loaded == [("m", asked)]


def test_a_near_miss_is_named():
    result = run("embed", "a.png", "-m", "m", "-o", "o", "--dtype", "flaot32")
    assert result.exit_code == 2
    assert "did you mean" in " ".join(result.stderr.split())
    result = run("inspect", "--native", "--arch", "sm_90")
    assert result.exit_code == 2 and "without --arch, --kernel" in result.stderr
    result = run("inspect", "-m", "vit_base_patch16_244")
    assert "did you mean 'vit_base_patch16_224'" in result.stderr


def test_errors_name_options_that_exist(tmp_path, photos):
    weights = tmp_path / "model.bin"
    weights.write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    for command in (["classify", "", "-m"], ["doctor", "--plan"], ["verify"]):
        command = [str(photos / "p0.png") if part == "" else part for part in command]
        result = run(*command, weights)
        assert "--allow-pickle" in result.stderr, result.stderr
        assert "allow_pickle" not in result.stderr
