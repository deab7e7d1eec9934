"""vitfast.images.open_image: what it reads, as Pillow and transformers do, and what it says of files it cannot."""

import io

import numpy as np
import pytest
from helpers.peers import import_transformers
from helpers.photos import noise
from PIL import Image

from vitfast.images.decode import ImageError, open_image


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(noise(20, 30)).save(path)
    return path


def test_open_image_reads_rgb(photo, tmp_path):
    assert np.array_equal(open_image(photo), noise(20, 30))
    assert np.array_equal(open_image(str(photo)), noise(20, 30))
    misnamed = tmp_path / "photo.jpg"
    misnamed.write_bytes(photo.read_bytes())
    assert np.array_equal(open_image(misnamed), noise(20, 30))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_open_image_converts_as_pillow(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = Image.fromarray(noise(20, 30))
    sixteen_bit = Image.fromarray(noise(20, 30)[..., 0].astype(np.uint16) * 200)
    image = sixteen_bit if mode == "I;16" else image.convert(mode)
    image.save(path)
    pixels = open_image(path)
    assert pixels.shape == (20, 30, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.array(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_transformers_loads(orientation, tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(20, 30)).save(path, exif=exif)
    import_transformers()
    from transformers.image_utils import load_image

    assert np.array_equal(open_image(path), np.array(load_image(str(path))))
    assert np.array_equal(open_image(path, exif_orientation=False), np.array(Image.open(path).convert("RGB")))
    if orientation >= 5:
        assert open_image(path).shape == (30, 20, 3)


def truncated_jpeg():
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()[: buffer.tell() // 2]


def damaged_png():
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[60:80] = bytes(20)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"just some text\n" * 20, "not an image in a known format", id="text"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image", id="eps is not run"),
        pytest.param(truncated_jpeg(), "truncated", id="truncated jpeg"),
        pytest.param(damaged_png(), "cannot be decoded", id="damaged png"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(40), "decoded|known format", id="png header only"),
        pytest.param(b"P6 0 5 255\n", "decoded|known format|no pixels", id="no width"),
    ],
)
def test_open_image_says_what_is_wrong(data, reason, tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(path)
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert caught.value.reason
    assert "\n" not in caught.value.reason


def test_open_image_without_a_file(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("limit", [599, 250])  # Pillow warns up to twice its limit, and refuses beyond
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(photo, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match="too many pixels"):
        open_image(photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert open_image(photo).shape == (20, 30, 3)
