"""Plans on disk: what is kept, and that no state of the folder or the file keeps a model from loading."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from helpers.engines import SMALL, engine

from vitfast import testing
from vitfast.engine import plan_cache, planner
from vitfast.ops import registry

ASKED = {"config": SMALL, "device": testing.device(), "dtype": torch.float32}


PLANS_DIR = plan_cache.plans_dir  # before the session's own replaces it


@pytest.fixture(autouse=True)
def _real_place(monkeypatch):
    monkeypatch.setattr(plan_cache, "plans_dir", PLANS_DIR)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


@pytest.fixture
def measurements(monkeypatch):
    """What plans have been asked for; the measurement itself is played."""
    made = []

    def measured(asked):
        made.append(asked)
        chosen = {site.name: registry.backend(site.op, "torch") for site in asked.sites() if not site.optional}
        return chosen, {"qkv": {"ms": {"torch": 1.0, "native": 2}, "refused": {"triton": "it is slow"}}}

    monkeypatch.setattr(planner, "_measured", measured)
    return made


def test_choices_survive_on_disk(folder):
    key, saved = {"device": "a", "torch": "2"}, ({"qkv": "torch"}, {"qkv": {"ms": {"torch": 1.0}, "refused": {}}})
    assert plan_cache.load_plan(key) is None
    plan_cache.save_plan(key, *saved)
    assert plan_cache.load_plan(key) == saved
    assert [path.name for path in folder.iterdir()] == [plan_cache.plan_path(key).name]


def test_a_second_load_measures_nothing(folder, measurements):
    first = planner.build(**ASKED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = planner.build(**ASKED)
    assert len(measurements) == 1
    assert (again.backends, again.measured) == (first.backends, first.measured)


def test_a_plan_made_elsewhere_is_refused_with_the_reason_and_measured_again(folder, measurements):
    planner.build(**ASKED)
    (path,) = folder.iterdir()
    plan = json.loads(path.read_text())
    plan["key"]["device"] = "another chip"
    path.write_text(json.dumps(plan))
    with pytest.warns(UserWarning, match=r"measured again: it was made for device 'another chip', here '"):
        planner.build(**ASKED)
    assert len(measurements) == 2
    assert json.loads(path.read_text())["key"]["device"] != "another chip"


def changed(path, **parts):
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def choices(path, **changes):
    names = json.loads(path.read_text())["choices"] | changes
    changed(path, choices={site: name for site, name in names.items() if name is not None})


DAMAGE = {
    "empty": lambda path: path.write_text(""),
    "cut short": lambda path: path.write_text(path.read_text()[:100]),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00\x80"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[1, 2]"),
    "null": lambda path: path.write_text("null"),
    "no key": lambda path: path.write_text('{"choices": {}, "measured": {}}'),
    "choices are text": lambda path: changed(path, choices="torch"),
    "no choices": lambda path: changed(path, choices={}),
    "a backend is a number": lambda path: choices(path, qkv=3),
    "a backend is a list": lambda path: choices(path, qkv=["torch"]),
    "an unknown backend": lambda path: choices(path, qkv="cudnn"),
    "an unknown site": lambda path: choices(path, hidden_fc1="torch"),
    "a site is missing": lambda path: choices(path, qkv=None),
    "a backend that cannot": lambda path: choices(path, qkv="triton", mlp="native"),
    "a fused half on torch": lambda path: choices(path, mlp="torch"),
    "measured is a list": lambda path: changed(path, measured=[]),
    "a measurement is text": lambda path: changed(path, measured={"qkv": "fast"}),
    "a time is text": lambda path: changed(path, measured={"qkv": {"ms": {"torch": "1"}, "refused": {}}}),
    "a reason is a number": lambda path: changed(path, measured={"qkv": {"ms": {}, "refused": {"native": 1}}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_costs_a_measurement_and_a_warning_that_names_it(damage, folder, measurements):
    planner.build(**ASKED)
    (path,) = folder.iterdir()
    good = json.loads(path.read_text())["choices"].keys()
    DAMAGE[damage](path)
    with pytest.warns(UserWarning, match="is measured again: ") as told:
        planner.build(**ASKED)
    assert len(measurements) == 2 and str(path) in str(told[0].message)
    assert json.loads(path.read_text())["choices"].keys() == good, "it has not been mended"


def test_a_folder_in_the_plans_place(folder, measurements):
    planner.build(**ASKED)
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot be") as told:
        planner.build(**ASKED)
    messages = [str(warning.message) for warning in told]
    assert "cannot be read (IsADirectoryError" in messages[0] and "cannot be kept in" in messages[1]
    assert all(str(path) in message for message in messages) and len(measurements) == 2
    assert list(folder.iterdir()) == [path], "a temporary file is left"


@pytest.mark.parametrize("place", ["/proc/no-place-to-write", "a file", "/dev/null/x"])
def test_a_place_that_cannot_be_written(place, tmp_path, measurements, monkeypatch):
    if place == "a file":
        place = tmp_path / "file"
        place.write_text("")
    monkeypatch.setenv("VITFAST_CACHE", str(place))
    with pytest.warns(UserWarning, match=f"the plan cannot be kept in {place}/plans/"):
        made = engine(dtype="fp32")
    assert made(testing.make(1, 3, 32, 48)).logits.isfinite().all()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written(tmp_path, measurements, monkeypatch):
    monkeypatch.delenv("VITFAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    tmp_path.chmod(0o500)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="cannot be kept in"):
        planner.build(**ASKED)


def test_a_gpus_table_and_the_extension_make_another_key(tmp_path, monkeypatch):
    """Once a table gives our kernels other configs, what was measured with the old ones says nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(registry, "tuning_table", lambda gpu: tmp_path / f"{gpu}.json")

    def key():
        return plan_cache.plan_key(SMALL, torch.device("cuda"), torch.bfloat16, 64)

    keys = [key()]
    for text in ("{}", '{"configs": {}}'):
        (tmp_path / "NVIDIA H100 80GB HBM3.json").write_text(text)
        keys.append(key())
    entry = registry.Backend("native", "linear", None, devices=("cuda",))
    monkeypatch.setattr(registry, "backend", lambda op, name: entry)
    keys.append(key())
    assert key() == keys[-1] and len({json.dumps(one) for one in keys}) == 4


def described(tmp_path, **lines):
    path = tmp_path / "cpuinfo"
    path.write_text("".join(f"{key.replace('_', ' ')}\t: {value}\n" for key, value in lines.items()) * 2)
    return plan_cache.cpu_name(path)


def test_cpus_of_one_name_have_plans_of_their_own(tmp_path):
    """As AMD's of two generations in a virtual machine, or all of Arm's, which have numbers only."""
    zen4 = described(tmp_path, cpu_family=25, model=17, model_name="AMD EPYC", stepping=1)
    zen5 = described(tmp_path, cpu_family=26, model=2, model_name="AMD EPYC", stepping=1)
    assert zen4 == "AMD EPYC, cpu family 25, model 17, stepping 1"
    assert zen5 == "AMD EPYC, cpu family 26, model 2, stepping 1"
    arms = [
        described(tmp_path, CPU_implementer="0x41", CPU_variant="0x1", CPU_part=part) for part in ("0xd40", "0xd4f")
    ]
    assert arms[0].endswith(", CPU implementer 0x41, CPU part 0xd40, CPU variant 0x1") and arms[0] != arms[1]
    assert plan_cache.cpu_name(tmp_path / "none")
    key = plan_cache.plan_key(SMALL, torch.device("cpu"), torch.float32, 1)
    assert key["device"] == f"{plan_cache.cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def test_a_user_without_a_home(monkeypatch, measurements):
    monkeypatch.delenv("VITFAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.warns(UserWarning, match=r"plans are not kept: Could not determine home directory\."):
        planner.build(**ASKED)
    assert len(measurements) == 1


def test_a_disk_that_is_full_leaves_no_part_behind(folder, measurements, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        planner.build(**ASKED)
    assert not list(folder.iterdir())


def test_a_backend_that_is_gone_is_chosen_no_more(folder, measurements, monkeypatch):
    planner.build(**ASKED)
    (path,) = folder.iterdir()
    choices(path, qkv="native")
    real = registry.backend
    gone = registry.Backend("native", "linear", None, missing="the C++ extension is not built: gone")
    monkeypatch.setattr(registry, "backend", lambda op, name: gone if name == "native" else real(op, name))
    monkeypatch.setattr(plan_cache, "plan_key", lambda *args: json.loads(path.read_text())["key"])
    with pytest.warns(UserWarning, match="not built: gone"):
        again = planner.build(**ASKED)
    assert set(again.backends.values()) == {"torch"} and len(measurements) == 2
