"""The engine against transformers' own models on pretrained weights and real photos, in fp32."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import peers, weights
from torch import Tensor

import vitfast
from vitfast import testing
from vitfast.models.checkpoints import load as load_checkpoint
from vitfast.ops import Spec, registry

LIMIT = 1e-4
"""Largest error over largest value. Twelve layers of fp32 sums in another order leave about 1e-5."""


@dataclass(frozen=True)
class Case:
    """transformers' model, its processor and what both make of the photos."""

    path: Path
    pixels: Tensor
    """Normalised by transformers' own processor, float32 [B, 3, H, W]."""
    tokens: Tensor
    """After the final norm, [B, N, C]."""
    embedding: Tensor
    stable: Tensor
    """Tokens that noise of fp32's own size leaves in place, bool [B, N]; see `stable_tokens`."""


def clip_case(photos: list[np.ndarray]) -> Case:
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor

    path = weights.clip_vit_b16()
    model = load(CLIPVisionModelWithProjection, path)
    pixels = process(Processor, path, photos)
    output = model(pixels)

    def tokens_of(pixels: Tensor) -> Tensor:  # transformers norms the CLS token only, the engine every token
        return model.vision_model.post_layernorm(model(pixels).last_hidden_state)

    tokens = model.vision_model.post_layernorm(output.last_hidden_state)
    stable = stable_tokens(tokens_of, model.vision_model.embeddings, pixels, tokens)
    return Case(path, pixels, tokens, output.image_embeds, stable)


def dinov2_case(photos: list[np.ndarray]) -> Case:
    from transformers import Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as Processor

    path = weights.dinov2_vit_s14()
    model = load(Dinov2Model, path)
    pixels = process(Processor, path, photos)
    output = model(pixels)
    tokens = output.last_hidden_state
    stable = stable_tokens(lambda pixels: model(pixels).last_hidden_state, model.embeddings, pixels, tokens)
    return Case(path, pixels, tokens, output.pooler_output, stable)


def stable_tokens(
    tokens_of: Callable[[Tensor], Tensor], embeddings: torch.nn.Module, pixels: Tensor, tokens: Tensor
) -> Tensor:
    """Which tokens keep their value when the embeddings are off by what fp32 rounding puts there.

    Half way up, these models turn a few background patches into tokens of high norm. A patch on the
    brink of that amplifies rounding errors: in CLIP one of astronaut's patches moves by 1e-5 of the
    scale when float64 embeddings get half an fp32 ulp of noise, nearly all others by 1e-7. Against
    float64, transformers itself is off by 5e-5 at its worst token, and where it is worst is chance. The
    noise here is 2e-6 RMS, as fp32 sums over a patch were measured to leave on that patch (1.3e-6 to
    2.2e-6). Two draws, since one may miss the sensitive direction. It takes 15 of CLIP's 788 tokens out
    and none of DINOv2's.
    """
    generator = torch.Generator().manual_seed(0)

    def add_noise(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + 2.0**-18 * noise)

    hook = embeddings.register_forward_hook(add_noise)
    moved = torch.stack([(tokens_of(pixels) - tokens).abs().amax(-1) for _ in range(2)]).amax(0)
    hook.remove()
    stable = moved <= LIMIT / 4 * tokens.abs().max()
    assert stable.float().mean() >= 0.95, f"{(~stable).sum()} of {stable.numel()} tokens are unstable"
    return stable


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
    peers.import_transformers()
    with torch.inference_mode():
        return request.param(photos)


def check(output: vitfast.Output, case: Case, rows: slice = slice(None), *, every_token: bool = False) -> None:
    """Check what the engine made of some of the case's images against transformers.

    `every_token`: hold the unstable ones to the limit, too.
    """
    tokens = relative_error(output.tokens, case.tokens[rows])
    embedding = relative_error(output.embedding, case.embedding[rows])
    stable = case.stable[rows] | every_token
    assert embedding.max() <= LIMIT, f"embedding: {embedding.max():.1e}"
    assert tokens[stable].max() <= LIMIT, f"tokens: {tokens[stable].max():.1e}"
    assert tokens.max() <= 10 * LIMIT, f"unstable tokens: {tokens.max():.1e}"


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Largest error of each vector [..., C] over the largest expected value; [...]."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    return (actual - expected).abs().amax(-1) / expected.abs().max()


@pytest.fixture(scope="module", params=[pytest.param("auto", marks=pytest.mark.full), "native"])
def engine(case, request) -> vitfast.Engine:
    entry = registry.backend("linear", "native")
    if request.param == "native" and (reasons := entry.why_not(Spec("linear", testing.device().type, torch.float32))):
        pytest.skip("; ".join(reasons))
    return vitfast.load(case.path, device=testing.device(), dtype="fp32", backend=request.param)


def strict(engine: vitfast.Engine) -> bool:
    """Whether nothing but the C++ extension computes here: its short sums leave no token behind."""
    return engine.backend == "native"


def test_normalised_images_give_the_models_own_outputs(case, engine):
    output = engine(case.pixels)
    assert output.logits is None
    check(output, case, every_token=strict(engine))


@pytest.mark.full
def test_plain_torch_gives_every_token_of_the_model(case):
    """Without packed weights the engine runs the ops that transformers runs, unstable tokens or not."""
    output = vitfast.load(case.path, device=testing.device(), dtype="fp32", backend="torch")(case.pixels)
    assert relative_error(output.tokens, case.tokens).max() <= LIMIT
    assert relative_error(output.embedding, case.embedding).max() <= LIMIT


@pytest.mark.full  # minutes in Triton's interpreter
def test_triton_gives_the_models_own_outputs(case):
    forced = vitfast.load(case.path, device=testing.device(), dtype="fp32", backend="triton")
    check(forced(case.pixels[:1]), case, slice(1))


def test_photos_of_any_size_give_the_models_own_outputs(case, engine, photos):
    assert len({photo.shape for photo in photos}) == len(photos)
    for i, photo in enumerate(photos):
        check(engine(torch.from_numpy(photo)[None]), case, slice(i, i + 1), every_token=strict(engine))
    if strict(engine) and importlib.import_module("vitfast._C").build_info()["simd"] in ("avx512_vnni", "avx512_bf16"):
        assert engine.runner.weights.embed_uint8.weight.dtype == torch.int8  # trained weights are not refused


@pytest.mark.full
def test_a_wrong_activation_is_noticed(case):
    checkpoint = load_checkpoint(case.path)
    wrong = "gelu" if checkpoint.config.activation == "quick_gelu" else "quick_gelu"
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, activation=wrong))
    output = vitfast.Engine(checkpoint, device=testing.device(), dtype="fp32")(case.pixels[:1])
    assert relative_error(output.tokens, case.tokens[:1]).min() > LIMIT  # every token is off
    assert relative_error(output.embedding, case.embedding[:1]).min() > 10 * LIMIT
