"""What is done to weights at load: once, in fp32 at least, whatever they are stored in; and to a copy."""

import dataclasses

import pytest
import torch
from helpers.engines import FAMILIES, SMALL, engine
from helpers.peers import TIMM, VIT, timm_model, transformers_model

import vitfast
from vitfast import testing
from vitfast.engine import planner
from vitfast.models import checkpoints
from vitfast.models.checkpoints.source import Source
from vitfast.models.positions import resize_position
from vitfast.models.weights import QUICK_GELU, prepare_weights

CPU = torch.device("cpu")
HALVES = pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)


def stored_weights(config, dtype):
    return {name: tensor.to(dtype) for name, tensor in testing.random_weights(config).items()}


def prepared(config, weights, dtype=torch.float32, **changes):
    plan = planner.build(config, device=CPU, dtype=dtype, backend="torch")
    return prepare_weights(
        config, weights, dataclasses.replace(plan, **changes), device=CPU, dtype=dtype, mean=(0.5,) * 3, std=(0.2,) * 3
    )


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from tensors(getattr(tree, field.name))
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from tensors(branch)


@HALVES
def test_factors_of_quick_gelu_are_rounded_once(stored):
    config = dataclasses.replace(SMALL, activation="quick_gelu")
    weights = stored_weights(config, stored)
    made = prepared(config, weights, quick_gelu_as_silu=True)
    assert made.activation == "silu"
    for i, block in enumerate(made.blocks):
        wanted = {
            "fc1.weight": (block.fc1.weight, QUICK_GELU),
            "fc1.bias": (block.fc1.bias, QUICK_GELU),
            "fc2.weight": (block.fc2.weight, 1 / QUICK_GELU),
            "fc2.bias": (block.fc2.bias, 1.0),
        }
        for name, (got, factor) in wanted.items():
            exact = weights[f"blocks.{i}.{name}"].double() * factor
            assert torch.equal(got, exact.float()), name


@HALVES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_folded_norms_are_rounded_once(stored, dtype):
    weights = stored_weights(SMALL, stored)
    for i, block in enumerate(prepared(SMALL, weights, dtype, fold_norm=True).blocks):
        for dense, site, norm in ((block.qkv, "qkv", "norm1"), (block.fc1, "fc1", "norm2")):
            part = {name.removeprefix(f"blocks.{i}."): w.double() for name, w in weights.items()}
            exact = part[f"{site}.weight"] * part[f"{norm}.weight"]
            assert torch.equal(dense.weight, exact.to(dtype))
            shift = part[f"{site}.weight"] @ part[f"{norm}.bias"] + part[f"{site}.bias"]
            assert torch.equal(dense.bias, shift.to(dtype))


@HALVES
def test_patch_embedding_is_normalised_before_it_is_rounded(stored):
    weights = stored_weights(SMALL, stored)
    got = prepared(SMALL, weights).embed_uint8.weight
    exact = weights["patch_embed.weight"].double() / (0.2 * 255)
    torch.testing.assert_close(got.double(), exact.permute(0, 2, 3, 1).reshape(got.shape), rtol=2**-24, atol=0)


@HALVES
@pytest.mark.parametrize("covered", [1, 2])
def test_prefix_tokens_and_their_positions_are_added_unrounded(stored, covered):
    config = dataclasses.replace(SMALL, prefix_tokens=2)
    state = {
        "cls": testing.make(1, 1, 64).cpu().to(stored),
        "register": testing.make(1, 64, seed=1).cpu().to(stored),
        "position": testing.make(1, covered + 6, 64, seed=2, scale=3.0).cpu().to(stored),
    }
    source = Source(state, "a model")
    source.tokens(config, ["cls", "register"], "position", covered)
    got = source._parts["prefix"].make()
    tokens = torch.cat([state["cls"][0], state["register"]]).double()
    tokens[:covered] += state["position"][0, :covered].double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), tokens, rtol=2**-24, atol=0)
    rounded = (tokens.float().to(stored)).double()
    assert not torch.equal(rounded, got.double()), "rounding does not show on these numbers"


@HALVES
@pytest.mark.parametrize("family", ["clip", "siglip", "timm"])
def test_a_half_checkpoint_in_fp32_is_as_near_as_its_library(stored, family):
    torch.manual_seed(0)
    model = {
        "clip": lambda: transformers_model("CLIPVisionModelWithProjection", VIT | {"projection_dim": 24}),
        "siglip": lambda: transformers_model("SiglipVisionModel", VIT),  # whose query is a product of weights
        "timm": lambda: timm_model(**TIMM),
    }[family]()
    model.to(stored)
    images = testing.make(2, 3, *checkpoints.load(model).config.image_size).cpu()
    made = vitfast.load(model, device="cpu", dtype="fp32", backend="torch")(images)
    with torch.no_grad():
        exact = model.double()(images.double())
    want = {"clip": "image_embeds", "siglip": "pooler_output"}.get(family)
    want = getattr(exact, want) if want else exact
    got = made.logits if family == "timm" else made.embedding
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@HALVES
def test_a_position_embedding_is_resized_before_it_is_rounded(stored):
    config = dataclasses.replace(SMALL, dynamic_size=True)
    exact = testing.random_weights(config)
    checkpoint = vitfast.Checkpoint(config, exact)
    made = vitfast.Engine(checkpoint, device="cpu", dtype=stored, backend="torch")
    images = testing.make(1, 3, 64, 32).cpu()
    want = resize_position(exact["position"], (2, 3), (4, 2), antialias=True).to(stored)
    twice = resize_position(exact["position"].to(stored), (2, 3), (4, 2), antialias=True)
    assert not torch.equal(want, twice)
    assert torch.equal(made.runner.position(made.runner.size(images)).embedding, want)


@pytest.mark.parametrize("changes", [{}, {"fold_norm": True}], ids=["plain", "folded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_weights_share_no_memory_with_the_checkpoint(family, changes):
    config = dataclasses.replace(SMALL, **FAMILIES[family])
    weights = testing.random_weights(config)
    made = prepared(config, weights, **changes)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in tensors(made)}


@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {"dtype": "bf16"}, {"dtype": "fp8"}], ids=str)
def test_an_engine_is_a_snapshot(options):
    model = timm_model(**TIMM)
    if options["dtype"] == "bf16":
        model.bfloat16()
    size = checkpoints.load(model).config.image_size
    made, images = vitfast.load(model, device="cpu", **options), testing.make(2, 3, *size).cpu()
    before = made(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
    after = made(images)
    assert torch.equal(after.tokens, before.tokens) and torch.equal(after.logits, before.logits)


def test_quantised_weights_come_from_what_is_stored():
    made = engine(dtype="fp8", backend="torch").runner.weights.blocks[0].fc1
    exact = testing.random_weights(SMALL)["blocks.0.fc1.weight"].to(made.scale.device)
    assert torch.equal(exact.abs().amax(dim=1) / 448, made.scale)
