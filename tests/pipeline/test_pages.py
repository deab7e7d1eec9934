"""Contact sheets and maps: pages that need nothing else, with the right pictures, and names that cannot do harm."""

import base64
import io
import json
import re
import tarfile

import numpy as np
import pytest
from helpers.folders import folder_of
from helpers.photos import FakeEngine, save
from PIL import Image
from typer.testing import CliRunner

from vitfast.cli.app import app
from vitfast.images.files import path_text
from vitfast.pipeline.by_key import container_of, thumbnails
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.pages import principal_axes
from vitfast.pipeline.parquet import EmbeddingFolder, write_parquet
from vitfast.pipeline.search import Index
from vitfast.pipeline.sources import find_sources

HARMFUL = "<script>alert(1)</script>&\"'.png"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Pictures in a folder, of one colour each, some in a tar, and their embeddings."""
    root = tmp_path_factory.mktemp("pages")
    (root / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (300, 200), (40 * i, 100, 200 - 30 * i)).save(root / "photos" / f"{i}.png")
    save(root / "photos" / HARMFUL.replace("/", "_"), 5)
    save(root / "inside" / "a::b.png", 6)
    with tarfile.open(root / "more.tar", "w") as archive:
        archive.add(root / "inside", "inside")
    engine, folder = FakeEngine(), EmbeddingFolder(root / "out", "m")
    items = folder.todo(find_sources([root / "photos", root / "more.tar"]))
    write_parquet(embed_images(engine, items), folder, engine)
    return root


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


def pictures_in(page):
    """The pictures that a page holds, decoded, in its order."""
    return [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r"data:image/jpeg;base64,([\w+/=]+)", page)
    ]


def check_alone(page):
    """A page that asks for nothing from elsewhere, in which no name has become markup."""
    assert page.startswith("<!doctype html>")
    assert not re.findall(r"(?:src|href)=(?![\"']?data:)|url\(|@import|https?://", page)
    assert "<script>alert" not in page


def test_contact_sheet(embedded, tmp_path):
    query = embedded / "photos" / "2.png"
    answer = json.loads(run("similar", query, embedded / "out", "--html", tmp_path / "a.html", "--json").stdout)
    page = (tmp_path / "a.html").read_text()
    check_alone(page)
    order = [str(query), *(m["path"] for m in answer["matches"])]
    titles = [path.replace("&", "&amp;") for path in re.findall(r'<figure class="[^"]*" title="([^"]*)"', page)]
    assert len(titles) == len(order) == 8
    shown = pictures_in(page)
    assert len(shown) == 8
    for key, picture in zip(order, shown, strict=True):
        if key.endswith(tuple(f"{i}.png" for i in range(6))):
            assert picture.size == (160, 107)
            colour = np.asarray(Image.open(key))[0, 0].astype(int)
            assert np.abs(np.asarray(picture).astype(int) - colour).max() < 8, key


def test_a_picture_that_is_gone_is_shown_by_name(tmp_path):
    out = folder_of(np.eye(3), tmp_path / "out")
    run("similar", "/0000.png", out, "--html", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("cannot be read") == 2
    assert "0001.png" in page


def test_map(embedded, tmp_path):
    answer = json.loads(run("map", embedded / "out", "--html", tmp_path / "m.html", "--json").stdout)
    assert (answer["images"], answer["of"], answer["pictures"]) == (8, 8, 8)
    page = (tmp_path / "m.html").read_text()
    check_alone(page)
    data = json.loads(re.search(r"id=data>(.*?)</script>", page)[1])
    index = Index(embedded / "out")
    assert data["names"] == [key.rpartition("::")[2].rpartition("/")[2] or key for key in index.paths]
    points, shares = principal_axes(index.vectors)
    x, y = np.array(data["x"]), 1 - np.array(data["y"])
    scale = np.ptp(points, axis=0).max()
    np.testing.assert_allclose((x - x[0], y - y[0]), ((points - points[0]) / scale).T, atol=1e-4)
    assert len(pictures_in(page)) == 8
    assert 0.5 < sum(shares) <= 1 + 1e-6


def test_map_is_coloured_by_a_column_and_has_a_limit(tmp_path):
    labels = ["cat", "dog", "cat", None, "</script><script>alert(1)"] * 4
    out = folder_of(np.random.default_rng(0).standard_normal((20, 5)), tmp_path / "out", columns={"label": labels})
    run("map", out, "--html", tmp_path / "m.html", "--color", "label", "--most", 15, "--pictures", 0)
    page = (tmp_path / "m.html").read_text()
    check_alone(page)
    data = json.loads(re.search(r"id=data>(.*?)</script>", page)[1])
    assert len(data["names"]) == 15
    assert data["groups"][0] == "cat" and set(data["groups"]) == {"cat", "dog", "none", labels[4]}
    of = {f"{row:04d}.png": labels[row] or "none" for row in range(20)}
    assert all(data["groups"][g] == of[name] for g, name in zip(data["group"], data["names"], strict=True))
    result = CliRunner().invoke(app, ["map", str(out), "--html", str(tmp_path / "n.html"), "--color", "colour"])
    assert result.exit_code == 2 and "has the columns path, embedding" in result.output


def test_axes_are_those_of_largest_variance():
    random = np.random.default_rng(0)
    plane = random.standard_normal((400, 2)) * (5, 2)
    turn = np.linalg.qr(random.standard_normal((6, 6)))[0]
    vectors = (np.concatenate([plane, 0.01 * random.standard_normal((400, 4))], 1) @ turn + 3).astype(np.float32)
    points, shares = principal_axes(vectors, block=64)
    assert shares[0] > 0.7 and sum(shares) > 0.999
    for axis in range(2):
        assert abs(np.corrcoef(points[:, axis], plane[:, axis])[0, 1]) > 0.99
    flat, _ = principal_axes(np.ones((3, 1), np.float32))
    assert flat.shape == (3, 2) and not flat.any()


def test_keys_lead_back_to_images(tmp_path, embedded):
    assert container_of("/x/a::b.png") is None
    assert container_of("/x/s.tar::in::a.png") == "/x/s.tar"
    assert container_of("/x/d::e/s.zip::a.png") == "/x/d::e/s.zip"
    odd = tmp_path / "b\udcff\\x41.png"
    Image.new("RGB", (4, 4)).save(save(tmp_path / "c.png").rename(odd), "PNG")
    key = path_text(odd)
    assert list(thumbnails([key, str(tmp_path / "gone.png"), f"{tmp_path}/gone.tar::a.png"])) == [key]
    inside = f"{embedded}/more.tar::inside/a::b.png"
    assert list(thumbnails([inside])) == [inside]
