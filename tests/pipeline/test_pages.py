"""Contact sheets and maps: pages that need nothing else, with the right pictures, and names that cannot do harm."""

import base64
import html
import io
import json
import re
import tarfile

import numpy as np
import pytest
from helpers.browser import visited
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
from vitfast.pipeline.timeline import Timeline

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


def test_groups_of_images_alike(embedded, tmp_path):
    command = ("duplicates", embedded / "out", "--above", "0.9", "--html", tmp_path / "d.html", "--json")
    answer = json.loads(run(*command).stdout)
    page = (tmp_path / "d.html").read_text()
    check_alone(page)
    titles = re.findall(r'<figure class="[^"]*" title="([^"]*)"', page)
    assert [html.unescape(title) for title in titles] == [m["path"] for g in answer["groups"] for m in g]
    assert page.count("<h2>") == len(answer["groups"]) >= 1
    assert len(pictures_in(page)) == len(titles)


def test_many_groups_are_not_all_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("vitfast.pipeline.pages.GROUPS_SHOWN", 2)
    monkeypatch.setattr("vitfast.pipeline.pages.OF_A_GROUP", 3)
    out = folder_of(np.repeat(np.eye(3), 4, 0), tmp_path / "out")
    run("duplicates", out, "--html", tmp_path / "d.html")
    page = (tmp_path / "d.html").read_text()
    assert "3 groups, 2 shown" in page
    assert page.count("<h2>4 images, 3 shown</h2>") == 2 and page.count("<figure") == 6


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


SIZES = pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (390, "dark")])


@SIZES
@pytest.mark.parametrize("kind", ["similar", "duplicates"])
def test_sheets_in_a_browser(kind, width, scheme, embedded, tmp_path):
    """Every picture is there and seen, side by side where there is room."""
    what = (embedded / "photos" / "2.png", embedded / "out") if kind == "similar" else (embedded / "out",)
    run(kind, *what, *(["--above", "0.9"] if kind == "duplicates" else []), "--html", tmp_path / "a.html")
    with visited(tmp_path / "a.html", width, scheme=scheme) as page:
        boxes = page.evaluate(
            "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
        )
        assert len(boxes) == page.locator("figure").count() >= 2
        assert all(complete and natural > 0 and shown > 0 for complete, natural, shown in boxes)
        tops = page.evaluate("[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().top)")
        assert tops.count(tops[0]) == min(5 if width == 1000 else 2, len(tops))


PIXEL = "([x, y]) => [...document.querySelector('canvas').getContext('2d').getImageData(x, y, 1, 1).data]"


@SIZES
def test_a_map_in_a_browser(width, scheme, tmp_path):
    """Points stand where they should; the mouse names one, moves the map and makes it larger."""
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5]]) * (2, 1)
    out = folder_of(np.c_[corners - corners.mean(0), np.ones(5)], tmp_path / "out", columns={"label": [*"aabbb"]})
    run("map", out, "--html", tmp_path / "m.html", "--color", "label")
    with visited(tmp_path / "m.html", width, scheme=scheme) as page:
        data = json.loads(page.locator("#data").text_content())
        box = page.locator("canvas").bounding_box()
        scale = min(box["width"], box["height"]) - 80
        left, top = (box["width"] - scale) / 2, (box["height"] - scale) / 2
        page.wait_for_function(f"({PIXEL})([{left + data['x'][0] * scale}, {top + data['y'][0] * scale}])[3] > 0")
        for number in range(5):
            at = [left + data["x"][number] * scale, top + data["y"][number] * scale]
            colour = data["colours"][data["group"][number]]
            assert page.evaluate(PIXEL, at)[:3] == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            page.mouse.move(box["x"] + at[0] + 3, box["y"] + at[1])
            tip = page.locator("#tip")
            assert tip.text_content() == f"{data['names'][number]} ({data['groups'][data['group'][number]]})"
            shown = tip.bounding_box()
            assert shown["x"] >= box["x"] and shown["x"] + shown["width"] <= box["x"] + box["width"]
            assert shown["y"] >= box["y"] and shown["y"] + shown["height"] <= box["y"] + box["height"]
        x, y = at
        page.mouse.down()
        page.mouse.move(box["x"] + x + 43, box["y"] + y + 20)
        page.mouse.up()
        page.wait_for_function(f"({PIXEL})([{x}, {y}])[3] == 0 && ({PIXEL})([{x + 40}, {y + 20}])[3] > 0")
        page.mouse.move(box["x"] + x + 40, box["y"] + y + 20)
        page.mouse.wheel(0, -400)
        page.wait_for_function(f"scale > {2 * scale} && ({PIXEL})([{x + 40}, {y + 20}])[3] > 0")


@SIZES
def test_a_timeline_in_a_browser(width, scheme, tmp_path):
    timeline = Timeline()
    for number in range(40):
        timeline.add("decode", number, number + 0.6)
        timeline.add("model", number + 0.5, number + 1)
    (tmp_path / "p.html").write_text(timeline.page({"decode": 2}, "40 images, 1.0 img/s; model-bound: model 50% busy"))
    with visited(tmp_path / "p.html", width, scheme=scheme) as page:
        assert page.locator("svg polygon").count() == 5
        heights = page.evaluate("[...document.querySelectorAll('polygon')].map(p => p.getBBox().height)")
        assert heights[3] == pytest.approx(70, abs=0.2) and 0 < heights[1] < heights[3] and heights[0] == 0
        sizes = page.evaluate("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
        assert min(sizes) >= 8  # large enough to be read


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
