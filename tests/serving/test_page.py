"""The page in a real browser: what a person sees and does with the mouse or with the keyboard alone."""

import dataclasses
import io
import re

import numpy as np
import pytest
import torch
from helpers.browser import browser
from helpers.engines import SMALL, engine
from helpers.serving import png, running
from helpers.text_models import save, save_tokenizer
from PIL import Image

import vitfast
from vitfast.images.preprocess import resize_and_crop

CONFIG = dataclasses.replace(SMALL, image_size=(64, 64), patch_size=(8, 8), name="dense")
CONTENTS = {f"{name}.png": png(seed, 96, 128) for seed, name in enumerate(("cat", "dog", "owl"))}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save(folder, "CLIPModel", eos=57)
    save_tokenizer(folder)
    return {"dense": engine(CONFIG), "clip": vitfast.load(folder, device="cpu")}


@pytest.fixture
def visit(request):
    """Opens the page of a server; whatever goes wrong in it is an error, and so is a request to anybody else."""
    opened, wrong = [], []

    def heard(kind, text):
        own = "Multiple readback operations"  # a test looks at canvases more often than the page does
        if kind in ("error", "warning") and own not in text:
            wrong.append(text)

    def visit(url):
        page = browser().new_page(viewport={"width": 1000, "height": 1400})
        opened.append(page)
        page.on("console", lambda message: heard(message.type, message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        local = (f"{url}/", "blob:", "data:")
        page.on("request", lambda sent: wrong.append(sent.url) if not sent.url.startswith(local) else None)
        page.set_default_timeout(120_000)
        page.goto(f"{url}/")
        return page

    yield visit, wrong
    for page in opened:
        page.close()


def choose(page, *names):
    files = [{"name": name, "mimeType": "image/png", "buffer": CONTENTS[name]} for name in names]
    page.get_by_label("Pictures: choose").set_input_files(files)


def wait(page, place, pattern):
    page.wait_for_function(
        "([place, pattern]) => new RegExp(pattern).test(document.getElementById(place).textContent)",
        arg=[place, pattern],
        timeout=120_000,
    )
    return page.locator(f"#{place}").text_content()


def pixels(engine, name):
    with Image.open(io.BytesIO(CONTENTS[name])) as image:
        return torch.from_numpy(resize_and_crop(np.array(image.convert("RGB")), engine.preprocess)[None])


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_pictures_are_compared(engines, visit, tmp_path):
    visit, wrong = visit
    rows = {
        name: engines["dense"](pixels(engines["dense"], name), preprocessed=True).embedding[0].numpy()
        for name in CONTENTS
    }
    with running(engines) as (url, _):
        page = visit(url)
        choose(page, "cat.png")
        wait(page, "status", "One more picture")
        choose(page, "cat.png", "dog.png")
        wait(page, "status", "2 pictures compared")
        shown = page.get_by_text(re.compile("^Similarity")).text_content()
        assert float(shown.split()[1]) == pytest.approx(cosine(rows["cat.png"], rows["dog.png"]), abs=6e-4)
        choose(page, *CONTENTS)
        wait(page, "status", "3 pictures compared")
        first = page.get_by_role("heading", name="Most like cat.png")
        assert first.is_visible()
        captions = page.locator("#results ol").first.locator("figcaption").all_text_contents()
        order = sorted(("dog.png", "owl.png"), key=lambda name: -cosine(rows["cat.png"], rows[name]))
        assert [caption.split()[-1] for caption in captions] == ["cat.png", *order]
        for image in page.locator("#results img").all():
            assert image.get_attribute("alt") in CONTENTS
            assert image.evaluate("image => image.complete && image.naturalWidth") == 128
        page.screenshot(path=tmp_path / "pictures.png", full_page=True)
    assert wrong == []


def test_sentences(engines, visit, tmp_path):
    visit, wrong = visit
    clip = engines["clip"]
    with running(engines) as (url, _):
        page = visit(url)
        choose(page, "cat.png")
        assert not page.get_by_label("Sentences").is_visible()
        page.get_by_label("Model").select_option("clip")
        page.get_by_label("Sentences").fill("a cat.\nthe owl")
        page.keyboard.press("Tab")
        wait(page, "status", "1 picture compared with 2 sentences")
        texts = clip.text(["a cat.", "the owl"]).numpy()
        image = clip(pixels(clip, "cat.png"), preprocessed=True).embedding[0].numpy()
        captions = page.locator("#results figcaption").all_text_contents()
        assert [float(c.split()[0]) for c in captions] == pytest.approx([cosine(image, t) for t in texts], abs=6e-4)
        assert page.get_by_role("heading", name="Pictures for “the owl”").is_visible()
        page.screenshot(path=tmp_path / "sentences.png", full_page=True)
    assert wrong == []


def features(engine, name):
    output = engine(pixels(engine, name), preprocessed=True, layers=[-1], reshape=True)
    return output.layers[0][0].flatten(1).T.double().numpy()


def principal(features):
    """As the page says: signs by the largest entry, stretched from 0 to 255."""
    centred = features - features.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    directions *= np.sign(directions[range(3), np.abs(directions).argmax(1)])[:, None]
    values = centred @ directions.T
    return 255 * (values - values.min(0)) / np.ptp(values, axis=0)


def light(canvas):
    """The brightness of the middle of each of 8 by 8 patches."""
    data = canvas.evaluate("c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)")
    return np.reshape(data, (8, 56, 8, 56, 4))[:, 20:36, :, 20:36, :3].mean((1, 3, 4)).ravel()


def test_patches(engines, visit, tmp_path):
    visit, wrong = visit
    a, b = (features(engines["dense"], name) for name in ("cat.png", "dog.png"))
    unit = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in (a, b)]
    with running(engines) as (url, _):
        page = visit(url)
        assert not page.locator("#patches").is_visible()
        choose(page, "cat.png", "dog.png")
        wait(page, "status", "2 pictures compared")
        page.locator("summary").press("Enter")  # the keyboard is enough
        wait(page, "patches-status", "8 by 8 patches in each picture")
        first, second = page.locator("canvas.patch").all()
        before = light(second)
        box = first.bounding_box()
        first.click(position={"x": box["width"] * 5.5 / 8, "y": box["height"] * 2.5 / 8})

        def says(name, patch, other, scores):
            best = int(scores.argmax())
            place = lambda which: f"row {which // 8 + 1}, column {which % 8 + 1}"  # noqa: E731
            return f"{name} picture, {place(patch)}: most like {place(best)} of the {other}, {scores[best]:.3f}."

        assert wait(page, "patches-status", "First picture") == says("First", 21, "second", unit[1] @ unit[0][21])
        scores = unit[1] @ unit[0][21]
        dark = 0.85 * (1 - (scores - scores.min()) / np.ptp(scores))
        assert np.allclose(light(second) / before, 1 - dark, atol=0.03)
        second.focus()
        for key, patch in (("ArrowUp", 36), ("ArrowRight", 37), ("ArrowDown", 45), ("ArrowLeft", 44)):
            page.keyboard.press(key)
            said = wait(page, "patches-status", f"Second picture, row {patch // 8 + 1}, column {patch % 8 + 1}")
            assert said == says("Second", patch, "first", unit[0] @ unit[1][patch])
        drawn = [
            canvas.evaluate("c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)")
            for canvas in page.locator("canvas.pca").all()
        ]
        colours = np.reshape(drawn, (128, 4))[:, :3]
        assert np.abs(colours - principal(np.concatenate([a, b]))).max() < 8
        page.screenshot(path=tmp_path / "patches.png", full_page=True)
        page.get_by_label("Second picture").first.select_option("0")
        wait(page, "patches-status", "8 by 8 patches")
        first.focus()
        page.keyboard.press("ArrowUp")
        assert wait(page, "patches-status", "First picture, row 5, column 5: most like row 5, column 5").endswith(
            "1.000."
        )
    assert wrong == []


def test_a_key_and_a_refusal(engines, visit):
    visit, wrong = visit
    with running(engines, api_keys=["secret"]) as (url, _):
        page = visit(url)
        wait(page, "status", "asks for an API key")
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Tab")
        page.wait_for_function("() => document.getElementById('model').options.length === 2")
        page.get_by_label("Pictures: choose").set_input_files(
            [{"name": n, "mimeType": "image/png", "buffer": b"none"} for n in ("x.png", "y.png")]
        )
        wait(page, "status", "Not compared: image 0: not an image")
    assert [message for message in wrong if "status of 40" not in message] == []  # the browser notes each refusal


def test_the_keyboard_reaches_everything_and_all_has_a_name(engines, visit):
    visit, wrong = visit
    with running(engines) as (url, _):
        page = visit(url)
        page.wait_for_function("() => document.getElementById('model').options.length === 2")
        page.get_by_label("Model").select_option("clip")
        choose(page, "cat.png", "dog.png")
        wait(page, "status", "2 pictures compared")
        page.locator("summary").click()
        wait(page, "patches-status", "4 by 4 patches")
        page.evaluate("document.activeElement.blur(); document.body.focus()")
        wanted = ["model", "files", "texts", "summary", "patches-0", "canvas", "patches-1", "canvas"]
        reached = []
        for _ in range(2 * len(wanted)):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName.toLowerCase()"))
        reached = reached[reached.index("model") :]
        assert [name for name in reached if name in wanted][: len(wanted)] == wanted
        tree = page.locator("body").aria_snapshot()
        assert not re.search(r"(textbox|combobox|application|img|button)( \[.*\])?:?$", tree, re.MULTILINE), tree
        contrast = page.evaluate("getComputedStyle(document.documentElement).colorScheme")
        assert contrast == "light dark"
    assert wrong == []
