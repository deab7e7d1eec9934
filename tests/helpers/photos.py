"""Photographs made up, in memory and on disk, good and bad, and an engine whose embedding of one is known."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from vitfast.images.decode import open_image
from vitfast.images.preprocess import Preprocess, resize_and_crop

PREPROCESS = Preprocess((8, 8), 9)


@dataclass
class FakeEngine:
    """Embeds an image as (mean colour, its first pixel's red); logits are the mean colour."""

    preprocess: Preprocess | None = PREPROCESS
    labels: list[str] | None = None
    problem_type: str | None = None
    classes: int = 3
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batches: list[int] = field(default_factory=list)
    fingerprint: str = "weights of a fake"
    precision: str = "float32"
    plan: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(skip_quantize=frozenset()))

    @property
    def config(self):
        return SimpleNamespace(embedding_dim=4, width=99, num_classes=self.classes)

    def __call__(self, images, *, preprocessed):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (*self.preprocess.size, 3)
        self.batches.append(len(images))
        colour = images.float().mean((1, 2))
        embedding = torch.cat([colour, images[:, 0, 0, :1]], 1)
        return SimpleNamespace(embedding=embedding, logits=colour if self.classes else None, tokens=None)

    def text(self, texts):
        raise ValueError("a fake has no text tower")

    def stream(self, batches, *, preprocessed):
        for images in batches:
            yield self(torch.from_numpy(np.stack(images)), preprocessed=preprocessed)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pixels, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def expected(path: Path) -> np.ndarray:
    """What FakeEngine embeds a photograph as."""
    image = resize_and_crop(open_image(path), PREPROCESS)
    return np.append(image.reshape(-1, 3).mean(0, dtype=np.float64), image[0, 0, 0]).astype(np.float32)


def save(path: Path, seed: int = 0) -> Path:
    """A photograph of noise at `path`, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(12, 16, seed)).save(path)
    return path


def truncate(path: Path) -> Path:
    """Cut a file to its first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def make_photos(folder: Path) -> Path:
    """Ten good images, p0.png to p9.png, and three bad ones: b00.jpg, b99.jpg, p45.jpg."""
    for i in range(10):
        save(folder / f"p{i}.png", i)
    (folder / "b00.jpg").write_text("not an image")
    truncate(save(folder / "b99.jpg"))
    (folder / "p45.jpg").write_bytes(b"")
    return folder
