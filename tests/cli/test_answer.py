"""Answers where nobody can take them: ASCII terminals, closed pipes, full disks, names that a terminal would obey."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.folder_runs import Runs
from helpers.grids import thinned
from helpers.photos import save
from rich.table import Table

from vitfast.cli.answer import Unfailing, _rendered, escaped, write
from vitfast.pipeline.parquet import read_embeddings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs():
    with Runs() as runs:
        yield runs


@pytest.fixture
def photos(tmp_path):
    for number, name in enumerate(
        ("a.png", "café.png", "\x1b]0;title\a\x1b[31mred.png", "two\nlines.png", ":cat:.png")
    ):
        save(tmp_path / "photos" / name, number)
    (tmp_path / "photos" / "bad\x1b[2J.png").write_text("no image")
    save(tmp_path / "photos" / "z.png")
    os.rename(save(tmp_path / "photos" / "y.png"), os.fsencode(tmp_path / "photos") + b"/\xff.png")
    return tmp_path / "photos"


@pytest.mark.full
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
@pytest.mark.parametrize("command", ["embed", "classify"])
def test_names_are_printed_whatever_the_terminal_knows(command, encoding, runs, photos, tmp_path):
    out = ["-o", tmp_path / "out"] if command == "embed" else []
    (photos / "left\x1b[1m.out").write_text("")
    code = runs.run(command, photos, "-m", "m", *out, log=tmp_path / "log", encoding=encoding)
    assert code == 1
    stdout, stderr = ((tmp_path / name).read_bytes().decode(encoding) for name in ("log.out", "log.err"))
    assert "Traceback" not in stderr
    assert not {c for c in stdout + stderr if ord(c) < 32 and c != "\n"}
    assert "bad\\x1b[2J.png: " in stdout
    assert "left\\x1b[1m.out" in stdout + stderr
    if command == "classify":
        assert len([line for line in stdout.splitlines() if line.startswith("/")]) == 8
        for name in (":cat:.png", "two\\nlines.png", "\\x1b]0;title\\x07\\x1b[31mred.png", "\\xff.png"):
            assert f"{photos}/{name}\n" in stdout
        assert ("caf\\xe9.png" if encoding == "ascii" else "café.png") in stdout
    else:
        assert read_embeddings(tmp_path / "out").num_rows == 8


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_full_disk_behind_stdout_is_said_and_the_rows_are_kept(as_json, runs, photos, tmp_path):
    arguments = ["embed", photos, "-m", "m", "-o", tmp_path / "out", *as_json]
    assert runs.run(*arguments, log=tmp_path / "log", stdout="/dev/full") == 1
    assert (tmp_path / "log.err").read_text() == "vitfast: the answer cannot be written: No space left on device\n"
    assert read_embeddings(tmp_path / "out").num_rows == 8


def test_a_closed_pipe_is_not_an_error(runs, photos, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    pid = runs.start(
        "embed",
        photos,
        "-m",
        "m",
        "-o",
        tmp_path / "out",
        log=tmp_path / "log",
        stdout=str(tmp_path / "pipe"),
        pause=0.2,
    )
    while not (tmp_path / "log.err").exists():  # which is opened after the pipe
        time.sleep(0.01)
    os.close(reader)
    assert runs.wait(pid) == 1  # one picture is bad
    assert (tmp_path / "log.err").read_text() == ""
    assert read_embeddings(tmp_path / "out").num_rows == 8


SHELL = [
    "{v} --help > /dev/full",
    "{v} --version > /dev/full",
    "{v} embed > /dev/full 2>&1",
    "{v} --help | true",
    "{v} embed nowhere -m m -o o 2> /dev/full",
    "{v} embed nowhere -m m -o o >&- 2>&-",
    "{v} --version 0<&- >&- 2>&-",
]


@pytest.mark.parametrize("line", thinned(SHELL, 4))
def test_help_and_errors_without_an_output(line, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = line.format(v=f"{sys.executable} -m vitfast")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode in (0, 1, 2)


def test_escaped():
    assert escaped("a\x1b[1m\x00\x7f\x9b\n\u2028\u202e\t\ud800é😀ab") == (
        "a\\x1b[1m\\x00\\x7f\\x9b\\n\\u2028\\u202e\\t\\ud800é😀ab"
    )
    assert escaped("a\n\tb\r", "\n\t") == "a\n\tb\\r"


def test_text_is_printed_as_it_is_and_objects_by_rich():
    table = Table("name")
    table.add_row("[bold]x")
    text = _rendered([":cat: [red] x\x1b", table])
    assert text.startswith(":cat: [red] x\\x1b\n")
    assert "name" in text
    assert _rendered("one") == "one\n"


class Broken(io.StringIO):
    def write(self, _):
        raise OSError(28, "No space left on device")


def test_what_libraries_print_cannot_stop_a_run():
    for stream in (Broken(), None):
        print("a library that talks", file=Unfailing(stream), flush=True)
    assert write(Broken(), "x").errno == 28
    assert write(None, "x") is None
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert write(latin, "é😀") is None
    assert latin.buffer.getvalue() == b"\xe9\\U0001f600"


def test_json_is_ascii_and_exact(runs, photos, tmp_path):
    runs.run("classify", photos, "-m", "m", "--json", log=tmp_path / "log", encoding="ascii")
    names = [Path(row["path"]).name for row in json.loads((tmp_path / "log.out").read_text())]
    assert "café.png" in names
    assert "two\nlines.png" in names
    assert "\\xff.png" in names
