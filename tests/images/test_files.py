"""vitfast.images.files: which files are images, what is left out, and paths as text."""

import os
import re
import sys
import types

import pytest
from helpers.photos import save
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitfast.images import formats
from vitfast.images.files import InputError, collect, find_images, path_text


def test_collect_folders_files_and_patterns(tmp_path):
    a, b = save(tmp_path / "x" / "a.png"), save(tmp_path / "x" / "deep" / "b.JPG")
    odd = tmp_path / "odd.bin"
    odd.write_bytes(a.read_bytes())
    save(tmp_path / "x" / ".hidden" / "c.png")
    save(tmp_path / "x" / "._a.png")
    (tmp_path / "x" / "notes.txt").write_text("no image")
    assert collect([str(tmp_path / "x")]) == [a, b]
    assert collect([tmp_path / "x", str(a), str(tmp_path / "x" / "." / "a.png")]) == [a, b]
    assert collect([str(odd)]) == [odd]
    assert collect([str(tmp_path / "**" / "*.JPG")]) == [b]
    assert collect([str(tmp_path / "x" / "*")]) == [a, tmp_path / "x" / "notes.txt"]


def test_collect_gives_absolute_paths_and_knows_brackets(tmp_path, monkeypatch):
    strange = save(tmp_path / "a[1].png")
    monkeypatch.chdir(tmp_path)
    assert collect(["a[1].png"]) == [strange]


@pytest.mark.parametrize("source", ["empty", "missing", "empty/*.png", "missing.png"])
def test_collect_names_what_it_cannot_find(source, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("")
    with pytest.raises(InputError, match="no ") as caught:
        collect([str(tmp_path / source)])
    assert str(tmp_path / source) in str(caught.value)


def test_what_is_left_out_is_named_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "readable", lambda: ("JPEG", "PNG", "TGA"))
    folder = tmp_path / "x"
    taken = [save(folder / "a.png"), save(folder / "deep" / "b.tga")]
    for name in ("IMG_1.HEIC", "c.jxl", "d.webp", "notes.txt", "none", "._a.png"):
        (folder / name).write_bytes(b"")
    (folder / "linked").symlink_to(tmp_path)
    found = find_images([folder])
    assert found.images == taken
    reasons = {os.path.relpath(path, folder): reason for path, reason in found.left_out.items()}
    assert reasons == {
        "IMG_1.HEIC": "HEIF cannot be read here: install pillow-heif",
        "c.jxl": "JXL cannot be read here: install pillow-jxl-plugin",
        "d.webp": "WEBP cannot be read here: this Pillow was built without it",
        "notes.txt": "no known ending of an image",
        "none": "no known ending of an image",
        "._a.png": "its name begins with a dot",
        "linked": "a link to a folder",
    }
    os.mkdir(tmp_path / "y")
    os.rename(folder / "IMG_1.HEIC", tmp_path / "y" / "IMG_1.HEIC")
    with pytest.raises(InputError, match=r"no images .*IMG_1\.HEIC.*install pillow-heif"):
        find_images([tmp_path / "y"])


def test_a_plugin_that_is_installed_is_taken(monkeypatch):
    """A stand-in for pillow_heif, which reads nothing before it is told to."""
    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: monkeypatch.setitem(Image.OPEN, "HEIF", (None, None))
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    assert "HEIF" in formats.readable.__wrapped__()


def test_a_folder_that_cannot_be_read_stops_nothing_below_a_source(tmp_path, monkeypatch):
    a = save(tmp_path / "x" / "a.png")
    save(tmp_path / "x" / "closed" / "b.png")
    original = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", closed)
    found = find_images([tmp_path / "x"])
    assert found.images == [a]
    assert found.unreadable == {str(tmp_path / "x" / "closed"): "Permission denied"}
    with pytest.raises(InputError, match=r"closed.*Permission denied"):
        collect([tmp_path / "x"])
    with pytest.raises(InputError, match=r"closed.*Permission denied"):
        find_images([tmp_path / "x" / "closed"])


def test_a_link_to_nothing_is_an_image_that_fails(tmp_path):
    (tmp_path / "a.png").symlink_to("nowhere")
    assert collect([tmp_path]) == collect([tmp_path / "a.png"]) == [tmp_path / "a.png"]


def unescaped(text):
    return re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), text.encode())


@given(st.lists(st.sampled_from([b"\\", b"x", b"f", b"5", b"c", b"\xff", b"\xc3", b"\xa9", b"a", b"\n", b"\x1b"])))
def test_path_text_gives_every_path_its_own_text(pieces):
    """Undoing the escapes gives the path again, so no two paths share a text."""
    path = b"/" + b"".join(pieces)
    assert unescaped(path_text(os.fsdecode(path))) == path


def test_path_text_leaves_usual_names_alone():
    assert path_text("/a b/caf\u00e9\\d.png") == "/a b/caf\u00e9\\d.png"
    assert path_text(os.fsdecode(b"/\xff.png")) == "/\\xff.png" != path_text("/\\xff.png") == "/\\x5cxff.png"
