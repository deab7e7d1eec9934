"""The pipeline against its parts: images a second decoded, through the model, and through both with files written.

    python -m vitfast.benchmarks.pipeline --out pipeline.json

Two cases, made up here: photographs of 12 megapixels through next to no model, and small pictures through a ViT-S. In
turns, round after round: decoding alone, the model alone on pixels that are there, and all of `vitfast embed`. The
pipeline's share is its rate over that of the slower of the two, which on a CPU it can only reach where the other takes
next to nothing: both want all cores. Beside it, what the run says of itself, and its memory as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitfast.benchmarks import result_file
from vitfast.benchmarks.device import open_device
from vitfast.benchmarks.environment import environment
from vitfast.engine.engine import Engine
from vitfast.engine.load import load
from vitfast.pipeline.embed import Decoder, embed_images
from vitfast.pipeline.memory import Memory
from vitfast.pipeline.parquet import EmbeddingFolder, write_parquet
from vitfast.pipeline.sources.item import file_item
from vitfast.pipeline.stages import Stages, usable_cores

SAMPLES = 20
"""How often in a run its memory is looked at."""


@dataclass(frozen=True)
class Case:
    """Pictures of a size, and a model: timm's VisionTransformer with these arguments; `binds` is the slower stage."""

    name: str
    binds: str
    height: int
    width: int
    images: int
    model: dict[str, Any]


NO_MODEL = {"patch_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 1}
VIT_S = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
CASES = (
    Case("photographs, next to no model", "decode", 3000, 4000, 96, NO_MODEL),
    Case("thumbnails, ViT-S/16", "model", 256, 256, 256, VIT_S),
)


def make_pictures(folder: Path, case: Case, distinct: int = 12) -> list[Path]:
    """JPEGs of smooth colours with noise; after the first few, links to them."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(case.images)]
    for number, path in enumerate(paths):
        if number >= distinct:
            os.link(paths[number % distinct], path)
            continue
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((case.width, case.height), Image.Resampling.BICUBIC), np.int16)
        noise = random.integers(-9, 10, (case.height, case.width, 1), dtype=np.int16)
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(path, quality=88)
    return paths


def make_engine(case: Case, device: str | None) -> Engine:
    """An engine with random weights."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    preprocess = {"size": 224, "crop": 224, "mean": 0.5, "std": 0.5}
    return load(VisionTransformer(img_size=224, **case.model), device=device, preprocess=preprocess)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class MemoryWatch:
    """Called with each result, it notes the memory of the process at every so many of them."""

    def __init__(self, every: int) -> None:
        self.sizes: list[int] = []
        self._every, self._seen = every, 0

    def __call__(self, _: Any) -> None:
        """Count a result."""
        self._seen += 1
        if self._seen % self._every == 0:
            self.sizes.append(resident())


def measure(case: Case, device: str | None, workers: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """One case: rates in images a second, and the memory of the last run."""
    with tempfile.TemporaryDirectory() as name:
        paths, engine = make_pictures(Path(name, "photos"), case), make_engine(case, device)
        assert engine.preprocess is not None
        decoder = Decoder(engine.preprocess, Memory(None), True, None)
        rates: dict[str, list[float]] = {"decode": [], "model": [], "pipeline": []}
        stages, watch = Stages(), MemoryWatch(1)
        decode_all(decoder, paths[:workers], workers)
        pixels = [one.image for one in decode_all(decoder, paths, workers)]
        for _ in run_model(engine, pixels[: 2 * batch_size], batch_size):  # plans, and captures graphs
            continue
        for number in range(rounds):
            started = time.perf_counter()
            decode_all(decoder, paths, workers)
            rates["decode"].append(len(paths) / (time.perf_counter() - started))

            started = time.perf_counter()
            for _ in run_model(engine, pixels, batch_size):
                continue
            rates["model"].append(len(paths) / (time.perf_counter() - started))

            stages, watch = Stages(), MemoryWatch(max(len(paths) // SAMPLES, 1))
            started = time.perf_counter()
            results = embed_images(engine, paths, batch_size=batch_size, workers=workers, stages=stages)
            folder = EmbeddingFolder(Path(name, f"out{number}"), "benchmark")
            summary = write_parquet(results, folder, engine, stages=stages, on_result=watch)
            rates["pipeline"].append(len(paths) / (time.perf_counter() - started))
            assert summary.done == len(paths), summary.failed
    middle = {stage: statistics.median(found) for stage, found in rates.items()}
    return {
        "case": case.name,
        "images": case.images,
        "pixels": [case.height, case.width],
        "model": case.model,
        "workers": workers,
        "batch_size": batch_size,
        "images_per_second": {stage: round(rate, 2) for stage, rate in middle.items()},
        "all_rounds": {stage: [round(rate, 2) for rate in found] for stage, found in rates.items()},
        "share_of_the_slower": round(middle["pipeline"] / min(middle["decode"], middle["model"]), 3),
        "binds": case.binds,
        "says": stages.advice(),
        "right_stage": stages.bound == case.binds,
        "resident_mib": [round(size / 2**20, 1) for size in watch.sizes],
    }


def decode_all(decoder: Decoder, paths: Sequence[Path], workers: int) -> list[Any]:
    """All pictures, decoded by as many threads as the pipeline has."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(decoder, map(file_item, paths)))


def run_model(engine: Engine, pixels: Sequence[Any], batch_size: int) -> Iterator[Any]:
    """The model alone, batch after batch."""
    batches = (pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size))
    return engine.stream(batches, preprocessed=True)


def main() -> None:
    """Measure, print, and write a result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file; printed alone if none is named")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="decoding threads")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="of each case, in place of its own number")
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        chosen = case if arguments.images is None else Case(**{**vars(case), "images": arguments.images})
        rows.append(measure(chosen, arguments.device, arguments.workers, arguments.batch_size, arguments.rounds))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if arguments.out is not None:
        name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        entry = environment(open_device(torch.device(name)))
        content = {"schema": result_file.SCHEMA, "kind": "pipeline", "environment": entry, "rows": rows}
        result_file.write(arguments.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
