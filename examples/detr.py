"""Object detection with DETR, its attention replaced by vitfast's: are the boxes the same?

Run from the repository root: `python examples/detr.py`. By default a small model with random weights
looks at two padded images of noise, which needs no network; `--model facebook/detr-resnet-50` (or a
directory) with `--images a.jpg b.jpg` takes a real one. Needs transformers.

DETR uses attention in three ways: the encoder's, in which padding is masked; the decoder's among its
queries; and the decoder's from queries to the encoder's tokens. Exits with status 1 if an output differs
beyond vitfast's tolerance of whole models.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from PIL import Image
from rich import print as show

import vitfast
from vitfast import testing
from vitfast.diagnostics.verify import render
from vitfast.models import libraries

SIZES = {"d_model": 32, "num_queries": 8, "num_labels": 5, "encoder_layers": 1, "decoder_layers": 1}
SIZES |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def small_model(transformers: Any) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A DETR with random weights, and two images of noise, of which the second is narrower and padded."""
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(**BACKBONE)
    config = transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **SIZES)
    model = transformers.DetrForObjectDetection(config).eval()
    with torch.no_grad():  # away from the initial values, at which all boxes are the same
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    mask = (torch.arange(96) < torch.tensor([[96], [60]])).long()[:, None].repeat(1, 64, 1)
    inputs = {"pixel_values": testing.make(2, 3, 64, 96), "pixel_mask": mask.to(testing.device())}
    return model.to(testing.device()), inputs


def real_model(transformers: Any, name: str, images: Sequence[Path]) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model from a directory or the hub, and the images as its processor makes them."""
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    model = transformers.AutoModelForObjectDetection.from_pretrained(name).eval().to(testing.device())
    inputs = processor(images=[Image.open(path).convert("RGB") for path in images], return_tensors="pt")
    return model, {key: inputs[key].to(testing.device()) for key in ("pixel_values", "pixel_mask")}


def detections(model: torch.nn.Module, inputs: dict[str, torch.Tensor], most: int = 3) -> list[str]:
    """The likeliest objects of each image: class, probability and box (centre, size; parts of the image)."""
    with torch.no_grad():
        output = model(**inputs)
    lines = []
    for image, (logits, boxes) in enumerate(zip(output.logits, output.pred_boxes, strict=True)):
        best = logits.softmax(-1)[:, :-1].max(-1)  # the last class is "no object"
        for query in best.values.argsort(descending=True)[:most].tolist():
            label = model.config.id2label[int(best.indices[query])]
            box = ", ".join(f"{side:.3f}" for side in boxes[query].tolist())
            lines.append(f"image {image}: {label:<12} {best.values[query]:.3f}  at ({box})")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare outputs and detections with and without the swap; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory or hub id; a small random model without it")
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="image files for --model")
    parser.add_argument("--backend", default="triton", help="triton (the kernels), torch, or auto (default: triton)")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.images):
        parser.error("--model and --images go together")
    with contextlib.suppress(ImportError):  # not installed, then transformers does without
        libraries.import_library("torchvision")
    transformers = libraries.import_library("transformers")
    if options.model:
        model, inputs = real_model(transformers, options.model, options.images)
    else:
        model, inputs = small_model(transformers)
    with vitfast.attention_backend(options.backend):
        report = vitfast.verify_swap(model, vitfast.replace_attention, inputs, layers=False)
        with vitfast.replace_attention(model) as swap:
            found = detections(model, inputs)
    show(render(report))
    print(f"{swap}; with it:")
    print("\n".join(found))
    print("without it:")
    print("\n".join(detections(model, inputs)))
    return int(not report)


if __name__ == "__main__":
    sys.exit(main())
