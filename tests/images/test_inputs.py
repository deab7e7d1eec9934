"""Pictures as users have them: Pillow images, arrays, paths, URLs."""

import http.server
import threading

import numpy as np
import pytest
import torch
from helpers import engines
from helpers.photos import noise
from PIL import Image

from vitfast.images import inputs
from vitfast.images.decode import ImageError
from vitfast.images.inputs import read_pictures
from vitfast.images.preprocess import Preprocess, resize_and_crop

PREPROCESS = Preprocess((16, 16), 20)


@pytest.fixture
def pictures(tmp_path):
    """The same three pictures of different sizes, as files and as Pillow images."""
    images = [Image.fromarray(noise(30 + 9 * i, 40 - 5 * i, i)) for i in range(3)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    return images, [tmp_path / f"{i}.png" for i in range(3)]


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_all_kinds_give_the_same(pictures, server):
    images, paths = pictures
    want = torch.from_numpy(np.stack([resize_and_crop(image, PREPROCESS) for image in images]))
    for items in (
        images,
        paths,
        [str(path) for path in paths],
        [np.array(image) for image in images],
        [f"{server}/{path.name}" for path in paths],
        (images[0], paths[1], f"{server}/2.png"),
    ):
        assert torch.equal(read_pictures(items, PREPROCESS), want)
    assert read_pictures([], PREPROCESS).shape == (0, 16, 16, 3)


def test_other_modes_and_exif(tmp_path):
    grey16 = Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))
    grey8 = Image.fromarray((np.asarray(grey16) >> 8).astype(np.uint8))
    assert torch.equal(read_pictures([grey16], PREPROCESS), read_pictures([grey8.convert("RGB")], PREPROCESS))
    image = Image.fromarray(noise(20, 40))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read_pictures([tmp_path / "turned.png"], PREPROCESS)
    assert torch.equal(turned, read_pictures([image.transpose(Image.Transpose.ROTATE_270)], PREPROCESS))
    with Image.open(tmp_path / "turned.png") as opened:  # as transformers' processors take it
        assert torch.equal(read_pictures([opened], PREPROCESS), read_pictures([image], PREPROCESS))


def test_what_cannot_be_read_is_named(pictures, server, tmp_path, monkeypatch):
    _, paths = pictures
    (tmp_path / "broken.png").write_bytes(paths[0].read_bytes()[:200])
    with Image.open(tmp_path / "broken.png") as broken:
        for item, reason in (
            (tmp_path / "none.png", "none.png: no such file"),
            (tmp_path / "broken.png", "broken.png: cannot be decoded"),
            (broken, "broken.png: cannot be decoded"),
            (f"{server}/none.png", "none.png: cannot be fetched: File not found"),
            ("http://127.0.0.1:9/x.png", "x.png: cannot be fetched: .*refused"),
            ("http://[", r"http://\[: cannot be fetched"),
            (Image.new("F", (8, 8)), "floating-point pixels without a known range"),
        ):
            with pytest.raises(ImageError, match=reason):
                read_pictures([paths[0], item], PREPROCESS)
    for item, reason in (
        (np.zeros((4, 4), np.uint8), r"image 1: image must be uint8 \[H, W, 3\]"),
        (3, "image 1: expected a Pillow image, a uint8 array .*, got int"),
        (torch.zeros(3, 4, 4), "image 1: expected a Pillow image"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_pictures([paths[0], item], PREPROCESS)
    monkeypatch.setattr(inputs, "MAX_BYTES", 100)
    with pytest.raises(ImageError, match=r"0.png: more than 100 bytes"):
        read_pictures([f"{server}/0.png"], PREPROCESS)


def test_engines_take_them(pictures):
    images, paths = pictures
    engine = engines.engine(backend="torch")
    pixels = read_pictures(images, engine.preprocess)
    want = engine(pixels, preprocessed=True)
    got = engine([images[0], paths[1], str(paths[2])])
    assert torch.equal(got.embedding, want.embedding)
    assert torch.equal(engine(paths[1]).embedding, engine(pixels[1:2], preprocessed=True).embedding)
    assert engine([]).embedding.shape == (0, 64)
    with pytest.raises(ValueError, match=r"images must be a torch.Tensor, .*or a list of such, got dict"):
        engine({})
    with pytest.raises(ValueError, match="preprocessed=True goes with tensors, got list"):
        engine(paths, preprocessed=True)
    with pytest.raises(ValueError, match=r"does not say how pictures are prepared .*preprocess="):
        engines.engine(preprocess=None, backend="torch")(paths)
