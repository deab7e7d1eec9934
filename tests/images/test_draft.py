"""Draft mode: JPEGs decoded at a part of their size, within a bound, and only where they are asked to be."""

import dataclasses
import io
import json

import numpy as np
import pytest
from helpers.photos import PREPROCESS, FakeEngine, noise
from PIL import ExifTags, Image
from typer.testing import CliRunner

from vitfast.cli.app import app
from vitfast.images.decode import ImageFile
from vitfast.images.inputs import read_pictures
from vitfast.images.preprocess import Preprocess, resize_and_crop
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.parquet import EmbeddingFolder, read_embeddings, write_parquet

DRAFT = dataclasses.replace(PREPROCESS, draft=True)  # to a shortest side of 9


def file_of(pixels, kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file


def opened(file, preprocess):
    """Size as it will be decoded, and the picture; the whole picture's size is known all the same."""
    whole = Image.open(file)
    with ImageFile(file, "a picture") as image:
        image.prepare_for(preprocess)
        size, picture = (image.height, image.width), image.decode()
        turned = whole.getexif().get(ExifTags.Base.Orientation) == 6
        assert image.size == (whole.size if turned else whole.size[::-1])
        return size, picture


@pytest.mark.parametrize("quality", [80, 95])
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field"])
def test_pixels_of_photographs_are_within_the_bound(name, quality):
    data = pytest.importorskip("skimage.data", reason="photos come with scikit-image")
    photo = getattr(data, name)()[..., :3]
    photo = photo[: photo.shape[0] // 8 * 8, : photo.shape[1] // 8 * 8]
    file, drafted = file_of(photo, quality=quality), 0
    for side in (12, 32, 64):
        preprocess = Preprocess((side, side), side)
        whole, part = (opened(file, dataclasses.replace(preprocess, draft=draft)) for draft in (False, True))
        assert whole[0] == photo.shape[:2] and whole[1].size == photo.shape[1::-1]
        drafted += part[0] < whole[0]
        difference = np.subtract(*(resize_and_crop(one[1], preprocess).astype(int) for one in (whole, part)))
        assert np.abs(difference).max() <= 8 and np.sqrt(np.square(difference).mean()) < 1
    assert drafted >= 2


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((216, 216), (27, 27)),
        ((216, 1600), (27, 200)),
        ((208, 216), (52, 54)),  # an eighth would be less than three times 9
        ((216, 220), (54, 55)),  # and here no whole number of pixels
        ((217, 216), (217, 216)),
        ((54, 54), (27, 27)),
        ((52, 54), (52, 54)),
    ],
)
def test_the_least_size_that_is_enough(size, decoded):
    file = file_of(noise(*size))
    assert opened(file, DRAFT)[0] == decoded
    assert opened(file, PREPROCESS)[0] == size
    for kind in ("PNG", "WEBP"):
        assert opened(file_of(noise(*size), kind), DRAFT)[0] == size


def test_sides_that_are_turned():
    """To 16 rows and 4 columns: a picture that lies on its side needs as many columns."""
    preprocess = Preprocess((16, 4), (16, 4), draft=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for size, decoded in (((96, 96), (48, 48)), ((96, 48), (96, 48)), ((48, 96), (48, 96))):
        read, picture = opened(file_of(noise(*size), exif=exif), preprocess)
        assert read == decoded and (picture.width, picture.height) == decoded


def test_it_takes_less_memory_and_leaves_what_the_limit_reduced():
    with ImageFile(file_of(noise(216, 216)), "a picture") as image:
        before = image.bytes
        image.prepare_for(DRAFT)
        assert image.bytes == before // 64
    with ImageFile(file_of(noise(216, 216)), "a picture", max_pixels=20_000) as image:
        image.prepare_for(DRAFT)
        assert (image.height, image.width) == (108, 108) and "read at 1/2" in image.note


def test_engines_and_folders_know_of_it(tmp_path, monkeypatch):
    photo = tmp_path / "a.jpg"
    photo.write_bytes(file_of(noise(216, 320), quality=95).getvalue())
    whole, part = (read_pictures([str(photo)], preprocess) for preprocess in (PREPROCESS, DRAFT))
    assert (whole != part).any() and (whole.int() - part.int()).abs().max() < 60  # noise is no photograph
    for preprocess, pixels in ((PREPROCESS, whole), (DRAFT, part)):
        engine = FakeEngine(preprocess)
        (result,) = embed_images(engine, [photo])
        assert result.size == (216, 320)
        np.testing.assert_allclose(result.embedding[:3], pixels[0].float().mean((0, 1)), rtol=1e-5)
        assert Identity.of(engine).preprocess.get("draft", False) == preprocess.draft
        out = tmp_path / f"draft {preprocess.draft}"
        write_parquet([result], EmbeddingFolder(out, "m"), engine)

    def load(*_, preprocess=None, **__):
        return FakeEngine(dataclasses.replace(PREPROCESS, **(preprocess or {})))

    monkeypatch.setattr("vitfast.engine.load.load", load)
    other = tmp_path / "b.jpg"
    other.write_bytes(file_of(noise(216, 320), quality=94).getvalue())

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    for draft, options in ((True, ("--draft",)), (False, ())):
        out = tmp_path / f"draft {draft}"
        refused = run("embed", other, "-m", "m", "-o", out, *(() if draft else ("--draft",)))
        assert refused.exit_code == 2 and "draft" in refused.output, refused.output
        assert run("embed", other, "-m", "m", "-o", out, *options).exit_code == 0
        assert len(read_embeddings(out)) == 2
        outside = tmp_path / "c.jpg"
        outside.write_bytes(photo.read_bytes())
        best = json.loads(run("similar", outside, out, "-k", 1, "--json").stdout)["matches"][0]
        assert best["path"] == str(photo) and best["similarity"] == pytest.approx(1, abs=1e-6)


def test_it_is_on_or_off():
    with pytest.raises(ValueError, match="draft must be True or False, got 1"):
        Preprocess((8, 8), 9, draft=1)
