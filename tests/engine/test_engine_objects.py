"""Engines as Python objects, outputs that are the caller's own whatever its mode, sizes off the grid, scores."""

import copy
import dataclasses
import importlib
import pickle

import pytest
import torch
from helpers import peers
from helpers.engines import SMALL, engine
from helpers.peers import DINO, TIMM, VIT, timm_model, transformers_model

import vitfast
from vitfast import testing
from vitfast.engine import planner
from vitfast.engine.dtypes import resolve_dtype
from vitfast.engine.engine import Engine
from vitfast.engine.fingerprint import fingerprint
from vitfast.engine.sites import site_case
from vitfast.models import checkpoints
from vitfast.models.plan import SITES
from vitfast.ops import reference, registry
from vitfast.pipeline.embed import top_classes


@pytest.fixture(scope="module")
def small():
    return engine(backend="torch")


@pytest.fixture
def images():
    return testing.make(3, 3, *SMALL.image_size)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": "int8", "skip_quantize": ("fc2",)}, {"dtype": "bf16", "backend": "torch"}]
)
def test_copies_and_pickles_give_the_same_bits(copied, options, images):
    made = engine(**options)
    other = copied(made)
    assert other is not made
    for name in ("config", "preprocess", "labels", "problem_type", "precision", "dtype", "device", "calibration"):
        assert getattr(other, name) == getattr(made, name), name
    for got, want in zip(other(images).tensors(), made(images).tensors(), strict=True):
        assert torch.equal(got, want)


def test_a_deep_copy_shares_no_weights(images):
    checkpoint = vitfast.Checkpoint(SMALL, testing.random_weights(SMALL))
    made = Engine(checkpoint, device=testing.device(), backend="torch")
    other = copy.deepcopy(made)
    want = made(images).embedding
    for tensor in checkpoint.weights.values():
        tensor.zero_()
    assert torch.equal(other(images).embedding, want)
    assert torch.equal(copy.deepcopy(other)(images).embedding, want)


@pytest.mark.parametrize("part", ["head", "blocks.1.mlp.fc2", "patch_embed.backbone.conv"])
def test_a_fingerprint_counts_every_weight(part):
    model = timm_model("vit_tiny_r_s16_p8_224", depth=2, num_classes=7)
    first, again = (fingerprint(checkpoints.load(model)) for _ in range(2))
    with torch.no_grad():
        model.get_submodule(part).weight.mul_(1.01)
    assert first == again != fingerprint(checkpoints.load(model))


def test_a_fingerprint_counts_the_architecture_and_not_the_name():
    checkpoint = vitfast.Checkpoint(SMALL, testing.random_weights(SMALL))

    def with_config(**changes):
        return fingerprint(dataclasses.replace(checkpoint, config=dataclasses.replace(SMALL, **changes)))

    assert with_config(name="another") == fingerprint(checkpoint)
    assert with_config(norm_eps=0.5) != fingerprint(checkpoint) != with_config(activation="silu")


def test_a_pickle_of_a_model_that_was_changed_since(images):
    """The engine is a snapshot, and so is what becomes of it."""
    model = timm_model(**TIMM)
    pixels = testing.make(2, 3, 32, 32)
    made = Engine(checkpoints.load(model), device=testing.device(), backend="torch")
    want = made(pixels).logits
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(made(pixels).logits, want)
    assert torch.equal(pickle.loads(pickle.dumps(made))(pixels).logits, want)


def outputs(made, images):
    """Of every way to run an engine."""
    return [*made(images).tensors(), *next(iter(made.stream([images], tokens=True))).tensors()]


MODES = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast(testing.device().type, torch.bfloat16),
    "autocast to fp16": lambda: torch.autocast(testing.device().type, torch.float16),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_caller_change_nothing(mode, images):
    want = outputs(engine(backend="torch"), images)
    with MODES[mode]():
        made = engine(backend="torch")
        for got, expected in zip(outputs(made, images), want, strict=True):
            assert torch.equal(got, expected)
            assert not got.is_inference() and not got.requires_grad
    for got, expected in zip(outputs(made, images), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_probe_on_the_outputs_can_be_trained(backend, images):
    made = engine(backend=backend)
    for output in outputs(made, images):
        features = output.float().to(testing.device())
        probe = torch.nn.Linear(features.shape[-1], 2, device=features.device)
        probe(features).sum().backward()
        assert probe.weight.grad.abs().max() > 0
        output.div_(2)


def test_images_that_want_gradients(small, images):
    """Inference has none, and says nothing about it."""
    assert not small(images.requires_grad_()).embedding.requires_grad


def test_streams_that_change_their_mode(small, images):
    """A generator may be taken up in another mode than it was begun in."""
    stream = small.stream([images, images])
    with torch.inference_mode():
        first = next(stream)
    assert torch.equal(first.embedding, next(stream).embedding)


# sizes off the patch grid

OFF_GRID = {
    "ViTModel": (VIT, (35, 41), {"interpolate_pos_encoding": True}),
    "Dinov2Model": (DINO, (45, 57), {}),
    "Dinov2WithRegistersModel": (DINO | {"num_register_tokens": 3}, (55, 30), {}),
    "CLIPVisionModel": (VIT, (47, 33), {"interpolate_pos_encoding": True}),
}


@pytest.mark.parametrize("name", OFF_GRID)
def test_transformers_crops(name):
    config, size, options = OFF_GRID[name]
    model = transformers_model(name, config)
    pixels = testing.make(2, 3, *size)
    made = Engine(checkpoints.load(model), device=testing.device(), dtype="fp32", backend="torch")
    with torch.no_grad():
        want = model(pixels.cpu(), **options)
    tokens = made(pixels).tokens
    if name == "CLIPVisionModel":
        peers.close(made(pixels).embedding.cpu(), want.pooler_output)
    else:
        peers.close(tokens.cpu(), want.last_hidden_state)


def test_transformers_native_size_off_the_grid():
    """30 pixels in patches of 8 are three, and the processor's size stays 30."""
    model = transformers_model("ViTForImageClassification", VIT | {"image_size": 30, "num_labels": 5})
    pixels = testing.make(2, 3, 30, 30)
    loaded = checkpoints.load(model)
    assert loaded.config.image_size == (24, 24)
    made = Engine(loaded, device=testing.device(), dtype="fp32", backend="torch")
    with torch.no_grad():
        peers.close(made(pixels).logits.cpu(), model(pixels.cpu()).logits)


@pytest.mark.filterwarnings("ignore:.*preprocessing unknown")
def test_timm_pads_where_it_is_told_to():
    model = timm_model(**TIMM, dynamic_img_size=True, dynamic_img_pad=True)
    made = Engine(checkpoints.load(model), device=testing.device(), dtype="fp32", backend="torch")
    for size in ((35, 41), (32, 32), (7, 3)):
        pixels = testing.make(2, 3, *size)
        with torch.no_grad():
            peers.close(made(pixels).logits.cpu(), model(pixels.cpu()))
    raw = torch.randint(0, 256, (2, 35, 41, 3), dtype=torch.uint8, device=testing.device())
    mean, std = (torch.tensor(v, device=raw.device) for v in (made.preprocess.mean, made.preprocess.std))
    normalised = ((raw / 255 - mean) / std).permute(0, 3, 1, 2)
    peers.close(made(raw, preprocessed=True).logits.cpu(), made(normalised).logits.cpu())


@pytest.mark.filterwarnings("ignore:.*preprocessing unknown")
@pytest.mark.parametrize("pads", [False, True])
def test_timms_towers_pad_where_they_are_told_to(pads):
    model, pixels = timm_model("deepseek_vit_412m", **TIMM, dynamic_img_pad=pads), testing.make(2, 3, 35, 41)
    made = Engine(checkpoints.load(model), device=testing.device(), dtype="fp32", backend="torch")
    if not pads:
        with pytest.raises(ValueError, match="35x41 is not a positive multiple of the patch size 8x8"):
            made(pixels)
        return
    with torch.no_grad():
        peers.close(made(pixels).logits.cpu(), model(pixels.cpu()))


def test_others_refuse():
    plain = Engine(checkpoints.load(timm_model(**TIMM)), device=testing.device(), backend="torch")
    with pytest.raises(ValueError, match="35x41 is not a positive multiple of the patch size 8x8"):
        plain(testing.make(1, 3, 35, 41))
    crops = Engine(checkpoints.load(transformers_model("Dinov2Model", DINO)), device=testing.device(), backend="torch")
    with pytest.raises(ValueError, match="image size 13x57 is less than one patch of 14x14"):
        crops(testing.make(1, 3, 13, 57))


# scores of classes


def test_scores_are_those_of_transformers_pipeline():
    """Softmax; sigmoids where each class is a question of its own, or there is one; the value where it regresses."""
    peers.import_transformers()
    pipeline = importlib.import_module("transformers.pipelines.image_classification")
    cases = (("single_label_classification", 5), (None, 5), ("multi_label_classification", 5), (None, 1))
    for problem_type, classes in (*cases, ("regression", 1), ("regression", 3)):
        model = transformers_model(
            "ViTForImageClassification", VIT | {"num_labels": classes, "problem_type": problem_type}
        )
        loaded = checkpoints.load(model)
        assert loaded.problem_type == problem_type
        logits = 3 * testing.make(1, classes).cpu()
        own = pipeline.ImageClassificationPipeline.postprocess
        stand_in = type("Pipeline", (), {"model": model})()
        want = {row["label"]: row["score"] for row in own(stand_in, {"logits": logits})}
        labels = [f"LABEL_{i}" for i in range(classes)]
        rows = top_classes(logits[0].numpy(), classes, labels, loaded.problem_type)
        key = "value" if problem_type == "regression" else "probability"
        assert {row["label"]: row[key] for row in rows} == pytest.approx(want, rel=1e-5)
        assert [row[key] for row in rows] == sorted((row[key] for row in rows), reverse=True)
    assert Engine(loaded, device=testing.device(), backend="torch").problem_type == "regression"


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 15])
def test_a_head_of_few_classes_has_a_right_backend(classes):
    """Torch's is the plain product, which is right by the rule: of few columns, packed ones of oneDNN err more."""
    config = dataclasses.replace(SMALL, num_classes=classes)
    case = site_case(config, SITES["head"], 1, torch.device("cpu"), torch.float32)
    call = case.inputs()
    run = planner.planned_call(registry.backend("linear", "torch"), case.spec, call)
    assert torch.equal(run(), reference.linear(*call.args, **call.kwargs))
    best, record = planner.measure(case, [registry.backend("linear", "torch")], torch.device("cpu"), timed=False)
    assert (best.name, record["refused"]) == ("torch", {})


def test_an_unknown_dtype_is_told_what_its_caller_takes():
    """A benchmark of plain dtypes does not name the 8-bit ones that it refuses."""
    with pytest.raises(ValueError, match=r"dtype must be one of .*bf16, fp8, int8, got 'fp64'"):
        engine(dtype="fp64")
    with pytest.raises(ValueError, match=r"dtype must be one of .*bf16, got 'int8'"):
        resolve_dtype("int8", torch.device("cpu"))
