"""Images written pixel by pixel by Image GPT, its attention replaced by vitfast's: the same pixels?

Run from the repository root: `python examples/image_gpt.py`. By default a small model with random
weights paints 3 images of 4 × 4 pixels in 16 colours, which needs no network; `--model
openai/imagegpt-small --side 32` (or a directory) takes a real one. Needs transformers.

Generation is greedy and keeps a cache: causal attention over the given pixels first, then one query
against all keys so far. Exits with status 1 if a pixel differs, or a logit beyond vitfast's tolerance.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import vitfast
from vitfast import testing
from vitfast.models import libraries
from vitfast.ops import accuracy

SIZES = {"vocab_size": 17, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
DIGITS = "0123456789abcdef"


def small_model(transformers: Any) -> torch.nn.Module:
    """An Image GPT with random weights, each of them far enough from zero that images are no single colour."""
    torch.manual_seed(0)
    model = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def paint(model: torch.nn.Module, count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [count, side * side] and the logits that chose them; each image begins with a colour of its own."""
    start = model.config.vocab_size - 1  # the token before the first pixel
    first = torch.arange(count) * (start // count)
    prompt = torch.stack([torch.full_like(first, start), first], 1).to(model.device)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=side * side - 1, do_sample=False,
        pad_token_id=start, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, 1:], torch.stack(out.logits, 1)


def print_images(pixels: torch.Tensor, side: int) -> None:
    """The images beside each other, one character per pixel."""
    for row in range(side):
        print("   ".join("".join(DIGITS[p % 16] for p in image[row]) for image in pixels.view(-1, side, side).tolist()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Paint without the swap and with it; 1 if the two differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory or hub id; a small random model without it")
    parser.add_argument("--count", type=int, default=3, help="images (default: 3)")
    parser.add_argument("--side", type=int, default=4, help="pixels along each side (default: 4)")
    parser.add_argument("--backend", default="triton", help="triton (the kernels), torch, or auto (default: triton)")
    options = parser.parse_args(arguments)
    with contextlib.suppress(ImportError):  # not installed, then transformers does without
        libraries.import_library("torchvision")
    transformers = libraries.import_library("transformers")
    if options.model:
        model = transformers.ImageGPTForCausalImageModeling.from_pretrained(options.model)
    else:
        model = small_model(transformers)
    model = model.eval().to(testing.device())
    if (most := model.config.n_positions) < options.side**2:
        parser.error(f"--side {options.side} needs {options.side**2} positions, the model has {most}")
    pixels, logits = paint(model, options.count, options.side)
    with vitfast.replace_attention(model) as swap, vitfast.attention_backend(options.backend):
        same_pixels, same_logits = paint(model, options.count, options.side)
    print_images(same_pixels, options.side)
    error = ((same_logits - logits).abs().max() / logits.abs().max()).item()
    differing = int((same_pixels != pixels).sum())
    allowed = accuracy.MODEL_TOLERANCES[logits.dtype].error
    print(f"{swap}: {differing} of {pixels.numel()} pixels differ; largest difference of logits {error:.1e} of the")
    print(f"largest logit, allowed {allowed:.1e}")
    return int(bool(differing) or not error <= allowed)


if __name__ == "__main__":
    sys.exit(main())
