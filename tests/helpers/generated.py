"""Image files of every kind that folders of photographs hold, made up: sizes, formats, modes and EXIF, one in a hundred
of them bad; the same for the same seed."""

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

BAD_EVERY = 100


def picture(random: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth colours and some noise, as a photograph has."""
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = random.integers(-12, 13, (height, width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def encoded(random: np.random.Generator, number: int) -> tuple[bytes, str]:
    """The content of the image of that number, and its file's ending."""
    height, width = (int(side) for side in random.integers(16, 240, 2))
    if number % 37 == 0:
        height, width = int(random.integers(2, 12)), int(random.integers(600, 900))
    image, file = picture(random, height, width), io.BytesIO()
    kind = number % 20
    if kind == 0:
        image.convert("CMYK").save(file, "JPEG", quality=90)
    elif kind == 1:
        image.convert("L").save(file, "JPEG")
    elif kind == 2:
        image.save(file, "JPEG", progressive=True)
    elif kind in (3, 4):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = int(random.integers(1, 9))
        image.save(file, "JPEG", exif=exif)
    elif kind == 5:
        Image.fromarray((np.asarray(image.convert("L"), np.uint16) << 8) + 77).save(file, "PNG")
        return file.getvalue(), "png"
    elif kind == 6:
        image.quantize(64).save(file, "GIF", save_all=True, append_images=[image.rotate(90).quantize(16)])
        return file.getvalue(), "gif"
    elif kind == 7:
        image.save(file, "WEBP", quality=70)
        return file.getvalue(), "webp"
    elif kind == 8:
        image.putalpha(image.convert("L"))
        image.save(file, "PNG")
        return file.getvalue(), "png"
    else:
        image.save(file, "JPEG", quality=int(random.integers(60, 95)))
    return file.getvalue(), "jpg"


def spoiled(content: bytes, number: int) -> bytes:
    """The content made bad: cut, empty, text, or without its beginning."""
    half = len(content) // 2
    return (content[:half], b"", b"no image at all", content[half:])[number // BAD_EVERY % 4]


def write_images(folder: Path, count: int, seed: int = 0) -> set[str]:
    """So many files in folders of a thousand; the paths of the bad ones, one in BAD_EVERY."""
    bad = set()
    for number in range(count):
        random = np.random.default_rng([seed, number])
        content, ending = encoded(random, number)
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % BAD_EVERY == BAD_EVERY // 2 + number // BAD_EVERY % 20:
            content = spoiled(content, number)
            bad.add(str(path))
        path.write_bytes(content)
    return bad
