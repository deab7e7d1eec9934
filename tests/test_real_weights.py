"""The engine against transformers' own models on pretrained weights and real photos, in fp32."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import weights
from torch import Tensor

import vitfast
from vitfast import testing
from vitfast.checkpoints import load as load_checkpoint


@dataclass(frozen=True)
class Case:
    """transformers' model, its processor and what both make of the photos."""

    path: Path
    pixels: Tensor
    """Normalised by transformers' own processor, float32 [B, 3, H, W]."""
    tokens: Tensor
    """After the final norm, [B, N, C]."""
    embedding: Tensor


def clip_case(photos: list[np.ndarray]) -> Case:
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor

    path = weights.clip_vit_b16()
    model = load(CLIPVisionModelWithProjection, path)
    pixels = process(Processor, path, photos)
    output = model(pixels)
    # transformers norms the CLS token only; the engine gives all tokens after that norm
    tokens = model.vision_model.post_layernorm(output.last_hidden_state)
    return Case(path, pixels, tokens, output.image_embeds)


def dinov2_case(photos: list[np.ndarray]) -> Case:
    from transformers import Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as Processor

    path = weights.dinov2_vit_s14()
    model = load(Dinov2Model, path)
    pixels = process(Processor, path, photos)
    output = model(pixels)
    return Case(path, pixels, output.last_hidden_state, output.pooler_output)


def load(kind: Any, path: Path) -> torch.nn.Module:
    """transformers' model, in fp32 on the test device; no weight may be missing or left over."""
    model, report = kind.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    problems = {name: found for name, found in report.items() if found}
    assert not problems, f"{path.name} does not fit {kind.__name__}: {problems}"
    return model.eval().to(testing.device())


def process(processor: Any, path: Path, photos: list[np.ndarray]) -> Tensor:
    return processor.from_pretrained(path)(photos, return_tensors="pt")["pixel_values"].to(testing.device())


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return weights.photos()


@pytest.fixture(scope="module", params=[clip_case, dinov2_case], ids=["clip", "dinov2"])
def case(request, photos) -> Case:
    pytest.importorskip("transformers", reason="the oracle is transformers' own model")
    weights.repair_torchvision()
    with torch.inference_mode():
        return request.param(photos)


LIMIT = 1e-4
"""Largest error over largest value. Twelve layers of fp32 sums in another order leave about 1e-5."""


def error_of(output: vitfast.Output, case: Case, rows: slice = slice(None)) -> dict[str, float]:
    """Largest error over largest value of what the engine made of some of the case's images."""
    errors = {}
    for name in ("tokens", "embedding"):
        actual, expected = getattr(output, name), getattr(case, name)[rows]
        assert actual.shape == expected.shape, name
        assert torch.isfinite(actual).all(), name
        errors[name] = ((actual - expected).abs().max() / expected.abs().max()).item()
    return errors


@pytest.fixture(scope="module")
def engine(case) -> vitfast.Engine:
    return vitfast.load(case.path, device=testing.device(), dtype="fp32")


def test_normalised_images_give_the_models_own_outputs(case, engine):
    output = engine(case.pixels)
    assert output.logits is None
    errors = error_of(output, case)
    assert max(errors.values()) <= LIMIT, errors


gpu_or_full = [] if torch.cuda.is_available() else pytest.mark.full  # minutes in Triton's interpreter


@pytest.mark.parametrize("backend", [pytest.param(name, marks=gpu_or_full) for name in ("torch", "triton")])
def test_each_backend_gives_the_models_own_outputs(case, backend):
    first = slice(1)
    errors = error_of(
        vitfast.load(case.path, device=testing.device(), dtype="fp32", backend=backend)(case.pixels[first]), case, first
    )
    assert max(errors.values()) <= LIMIT, errors


def test_photos_of_any_size_give_the_models_own_outputs(case, engine, photos):
    for i, photo in enumerate(photos):
        errors = error_of(engine(torch.from_numpy(photo)[None]), case, slice(i, i + 1))
        assert max(errors.values()) <= LIMIT, (photo.shape, errors)


def test_a_wrong_architecture_is_noticed(case):
    checkpoint = load_checkpoint(case.path)
    wrong = "gelu" if checkpoint.config.activation == "quick_gelu" else "quick_gelu"
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, activation=wrong))
    first = slice(1)
    errors = error_of(
        vitfast.Engine(checkpoint, device=testing.device(), dtype="fp32")(case.pixels[first]), case, first
    )
    assert min(errors.values()) > 10 * LIMIT, errors


def test_an_image_does_not_depend_on_its_batch(case, engine):
    together, alone = engine(case.pixels).embedding[:1], engine(case.pixels[:1]).embedding
    assert (together - alone).abs().max() <= LIMIT * together.abs().max()
