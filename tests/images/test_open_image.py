"""vitfast.images.open_image: what it reads, as Pillow and transformers do, and what it says of files it cannot."""

import io
import os
import socket
import struct
from pathlib import Path

import numpy as np
import PIL.ImageFile
import pytest
from helpers.peers import import_transformers
from helpers.photos import noise
from helpers.scripts import python
from PIL import ExifTags, Image

from vitfast.images.decode import ImageError, ImageFile, open_image, regular_file
from vitfast.images.formats import jxl_size, why_left_out


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


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_open_image_converts_as_pillow(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(noise(20, 30)).convert(mode).save(path)
    pixels = open_image(path)
    assert pixels.shape == (20, 30, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.array(Image.open(path).convert("RGB")))


SIXTEEN = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.pgm"])
def test_sixteen_bits_are_scaled_to_eight(name, tmp_path):
    Image.fromarray(SIXTEEN).save(tmp_path / name)
    with regular_file(tmp_path / name) as file, ImageFile(file, tmp_path / name) as image:
        pixels = np.array(image.decode()).astype(int)
        assert "scaled to 8 bits (the model's own processor would clip it at 255)" in image.note
    assert abs(pixels - (SIXTEEN >> 8)[..., None]).max() <= 1


def tiff(values, *, order="<", **tags):
    """A TIFF of one strip of grey; `tags` by number, with a leading underscore."""
    height, width = values.shape
    entries = {
        256: width,
        257: height,
        258: values.itemsize * 8,
        259: 1,
        262: 1,
        277: 1,
        278: height,
        279: values.nbytes,
    }
    entries |= {339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind]} | {int(k[1:]): v for k, v in tags.items()}
    body = 8 + 2 + 12 * (len(entries) + 1) + 4
    rows = []
    for tag, value in sorted({**entries, 273: body}.items()):
        kind, code = (11, "f4") if isinstance(value, float) else (4, "u4")
        rows.append(np.array([tag, kind], order + "u2").tobytes() + np.array([1], order + "u4").tobytes())
        rows[-1] += np.array([value], order + code).tobytes()
    start = (b"II*\0" if order == "<" else b"MM\0*") + np.array([8], order + "u4").tobytes()
    return start + np.array([len(rows)], order + "u2").tobytes() + b"".join(rows) + bytes(4) + values.tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_says_what_its_numbers_mean(order, tmp_path):
    path = tmp_path / "a.tif"
    want = (SIXTEEN >> 8).astype(int)

    def red(values, **tags):
        path.write_bytes(tiff(values, order=order, **tags))
        return open_image(path)[..., 0].astype(int)

    assert np.array_equal(red(SIXTEEN.astype(order + "u2")), want)
    assert abs(red((SIXTEEN / 65535).astype(order + "f4"), _340=0.0, _341=1.0) - want).max() <= 1
    assert abs(red((SIXTEEN / 65535 * 300 - 100).astype(order + "f4"), _340=-100.0, _341=200.0) - want).max() <= 1
    if order == "<":  # Pillow reads this photometric interpretation in one byte order
        assert np.array_equal(red(SIXTEEN.astype("<u2"), _262=0), 255 - want)
        first, second = (SIXTEEN >> 4)[:, ::2], (SIXTEEN >> 4)[:, 1::2]  # 12 bits each, two in three bytes
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype("u1")
        assert np.array_equal(red(packed.reshape(20, 45), _256=30, _258=12), want)


def test_numbers_without_a_known_range_are_refused(tmp_path):
    grey = (SIXTEEN / 65535).astype("<f4")
    holes = grey.copy()
    holes[3, 4] = np.nan
    files = {
        "float": tiff(grey),
        "32-bit": tiff(SIXTEEN.astype("<i4")),
        "signed": tiff((SIXTEEN >> 1).astype("<i2")),
        "not a number": tiff(holes, _340=0.0, _341=1.0),
        "empty range": tiff(grey, _340=1.0, _341=1.0),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.tif").write_bytes(data)
        with pytest.raises(ImageError, match="without a known range"):
            open_image(tmp_path / f"{name}.tif")


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


def exif_of(*entries, tail=b""):
    """EXIF data of orientation 6 and other entries, each as (tag, type, count, four bytes)."""
    rows = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), *entries]
    listed = b"".join(struct.pack("<HHI", *row[:3]) + row[3] for row in rows)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(rows)) + listed + bytes(4) + tail


EXIF = {
    "an impossible rational": (exif_of((0x011A, 10, 1, struct.pack("<I", 38)), tail=struct.pack("<ii", -1, 0)), 6),
    "a resolution as text": (exif_of((0x011A, 2, 4, b"72\0\0")), 6),
    "a negative width": (exif_of((0x0100, 9, 1, struct.pack("<i", -5))), 6),
    "no TIFF in it": (b"Exif\0\0no tiff in here", 1),
    "cut short": (exif_of()[:17], 1),
    "an orientation that is text": (
        exif_of().replace(struct.pack("<HHI", 0x112, 3, 1), struct.pack("<HHI", 0x112, 2, 2)),
        1,
    ),
    "an orientation of 77": (exif_of().replace(struct.pack("<HH", 6, 0), struct.pack("<HH", 77, 0)), 1),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("what", EXIF)
def test_exif_is_read_and_never_rewritten(what, format, tmp_path):
    data, orientation = EXIF[what]
    path = tmp_path / "a.img"
    options = {"lossless": True} if format == "WEBP" else {}
    Image.fromarray(noise(20, 30)).save(path, format, exif=data, **options)
    stored = np.array(Image.open(path).convert("RGB"))
    upright = np.array(Image.fromarray(stored).transpose(Image.Transpose.ROTATE_270)) if orientation == 6 else stored
    assert np.array_equal(open_image(path), upright)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_tiff_orientation(orientation, tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(noise(20, 30)[..., 0], _274=orientation))
    turn = {1: 0, 3: 2, 6: 3}[orientation]
    assert np.array_equal(open_image(tmp_path / "a.tif")[..., 0], np.rot90(noise(20, 30)[..., 0], turn))


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), BaseException("a panic in Rust"), SystemError()]
)
def test_any_exception_of_a_decoder_becomes_a_reason(error, photo, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError, match="cannot be decoded") as caught:
        open_image(photo)
    assert caught.value.__cause__ is error
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_image(photo)


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path has few characters
        server.bind("s.jpg")
    for name, kind in (("x.jpg", "a named pipe"), ("s.jpg", "a socket")):
        with pytest.raises(ImageError, match=f"not a regular file but {kind}"):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match="a device"):
        open_image("/dev/zero")


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
def test_decompression_bomb(photo, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match="too many pixels"):
        open_image(photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert open_image(photo).shape == (20, 30, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)
    assert open_image(photo, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(ImageError, match="20x30, the limit is 599"):
        open_image(photo, max_pixels=599)


@pytest.mark.parametrize(
    ("limit", "scale"), [(600, 1), (599, 2), (150, 2), (149, 4), (40, 4), (39, 8), (12, 8), (11, 0)]
)
def test_a_jpeg_over_the_limit_is_read_at_a_part_of_its_size(limit, scale, tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (30, 20), (200, 100, 50)).save(path, quality=95)
    if not scale:
        with pytest.raises(ImageError, match="too many pixels: 20x30, the limit is 11"):
            open_image(path, max_pixels=limit)
        return
    pixels = open_image(path, max_pixels=limit)
    assert pixels.shape == (-(-20 // scale), -(-30 // scale), 3)
    assert abs(pixels.astype(int) - (200, 100, 50)).max() <= 3
    with regular_file(path) as file, ImageFile(file, path, max_pixels=limit) as image:
        assert (f"read at 1/{scale}" in image.note) == (scale > 1)


def test_a_photo_of_108_megapixels_is_read(tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("L", (12000, 9000), 99).save(path)
    pixels = open_image(path)
    assert pixels.shape == (4500, 6000, 3)
    assert pixels.min() == pixels.max() == 99


@pytest.mark.parametrize(
    "ending", [".bmp", ".dds", ".gif", ".icns", ".ico", ".j2c", ".pcx", ".png", ".qoi", ".rgb", ".tga", ".webp"]
)
def test_endings_that_pillow_reads_are_taken(ending, tmp_path):
    path = tmp_path / f"a{ending}"
    Image.new("RGB", (64, 64), (200, 100, 50)).save(path)
    assert why_left_out(str(path)) is None
    assert open_image(path).shape[2] == 3
    assert abs(open_image(path)[:16, :16].astype(int) - (200, 100, 50)).max() <= 6


def test_an_icon_that_lies_about_what_it_holds(tmp_path):
    path = tmp_path / "a.ico"
    Image.new("RGB", (64, 64)).save(path)
    data = path.read_bytes()
    at = data.index(b"IHDR") + 4
    path.write_bytes(data[:at] + struct.pack(">II", 13000, 13000) + data[at + 8 :])
    with pytest.raises(ImageError, match="holds 169000000 pixels"):
        open_image(path)


def peak_memory(path, turned):
    """Bytes that decoding a file adds to a process, less what was said.

    By the memory's own high-water mark: getrusage's begins with what the process had that started this one.
    """
    return int(
        python(
            "import numpy\n"
            "from vitfast.images.decode import *\n"
            "from vitfast.images.formats import readable; readable()\n"
            "def peak(): return 1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            f"file = open({str(path)!r}, 'rb'); before = peak()\n"
            f"image = ImageFile(file, {str(path)!r}, exif_orientation={turned}); image.decode()\n"
            "print(peak() - before - image.bytes)"
        )
    )


ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[ExifTags.Base.Orientation] = 6


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads memory as Linux tells it")
@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        pytest.param("PNG", "RGB", {"exif": ON_ITS_SIDE}, marks=pytest.mark.full),
        pytest.param("PNG", "L", {"exif": ON_ITS_SIDE}, marks=pytest.mark.full),
        pytest.param("PNG", "P", {}, marks=pytest.mark.full),
        pytest.param("JPEG", "CMYK", {}, marks=pytest.mark.full),
        pytest.param("WEBP", "RGBA", {"lossless": True, "method": 0}, marks=pytest.mark.full),
        pytest.param("JPEG2000", "RGB", {}, marks=pytest.mark.full),
        pytest.param("AVIF", "RGB", {"speed": 10, "subsampling": "4:4:4"}, marks=pytest.mark.full),
        pytest.param("TIFF", "RGB", {"compression": "tiff_lzw"}, marks=pytest.mark.full),
        pytest.param("GIF", "P", {}, marks=pytest.mark.full),
    ],
)
def test_memory_is_estimated_before_decoding(format, mode, options, tmp_path):
    """No format takes more than was said, but for what the libraries allocate once."""
    path = tmp_path / "a.img"
    Image.new(mode, (4000, 3000)).save(path, format, **options)
    assert peak_memory(path, "exif" in options) < 16 << 20


# --- optional plugins ---


@pytest.mark.parametrize(("module", "ending"), [("pillow_heif", ".heic"), ("pillow_jxl", ".jxl")])
def test_formats_of_plugins(module, ending, tmp_path):
    pytest.importorskip(module, reason="the optional plugin is not installed")
    assert why_left_out(f"a{ending}") is None
    for size in ((30, 20), (64, 64), (160, 90), (1, 300)):
        path = tmp_path / f"a{ending}"
        Image.new("RGB", size, (200, 100, 50)).save(path, quality=95)
        assert open_image(path).shape == (size[1], size[0], 3)
        assert abs(open_image(path).astype(int) - (200, 100, 50)).max() <= 6
        with pytest.raises(ImageError, match="too many pixels"):
            open_image(path, max_pixels=size[0] * size[1] - 1)


def test_jxl_size_is_read_from_the_header():
    """Bit by bit, as the standard has it: sides in eights or not, their lengths' bits, a ratio or two sides."""
    eights = 1 | 31 << 1 | 1 << 6  # 32 * 8 rows, as wide as high
    sides = 0 | 0 << 1 | 19 << 3 | 0 << 12 | 0 << 15 | 29 << 17  # 20 rows of 30
    large = 0 | 3 << 1 | (10**6 - 1) << 3 | 7 << 33  # 30 bits for a million rows, twice as wide
    for bits, size in ((eights, (256, 256)), (sides, (30, 20)), (large, (2 * 10**6, 10**6))):
        code = b"\xff\x0a" + bits.to_bytes(14, "little")
        assert jxl_size(io.BytesIO(code)) == size
        box = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "
        assert jxl_size(io.BytesIO(box + b"\0\0\0\0jxlc" + code)) == size
        assert jxl_size(io.BytesIO(box + b"\0\0\0\0jxlp\0\0\0\0" + code)) == size


def test_jxl_size_of_another_file(photo):
    with open(photo, "rb") as file:
        assert jxl_size(file) is None
        assert file.tell() == 0
