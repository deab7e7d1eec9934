"""Images of different sizes in one pass: no padding, and each as if it were alone."""

import dataclasses

import pytest
import torch
from helpers import engines, peers

import vitfast
from vitfast.models import packed
from vitfast.testing import make

SIZES = [(32, 48), (16, 64), (48, 32), (32, 48), (64, 16), (16, 16)]


def images(sizes=SIZES):
    return [make(3, *size, seed=i) for i, size in enumerate(sizes)]


def check(engine, pictures, preprocessed=False):
    """Compare a packed call with one by one."""
    output = engine(pictures, preprocessed=preprocessed)
    assert output.tokens is None
    for i, image in enumerate(pictures):
        alone = engine(image[None], preprocessed=preprocessed)
        peers.close(output.image_tokens[i], alone.tokens[0])
        peers.close(output.embedding[i], alone.embedding[0])
        assert (output.logits is None) == (alone.logits is None)
        if alone.logits is not None:
            peers.close(output.logits[i], alone.logits[0])


@pytest.mark.parametrize("family", engines.FAMILIES)
def test_packed_is_one_by_one(family):
    config = dataclasses.replace(engines.SMALL, **engines.FAMILIES[family] | {"dynamic_size": True})
    check(engines.engine(config, backend="torch"), images())


def test_planned_backends():
    """Whatever was measured to be the fastest, the extension's included."""
    check(engines.engine(dataclasses.replace(engines.SMALL, dynamic_size=True)), images())


def test_on_triton_attention_is_one_launch(monkeypatch):
    engine = engines.engine(dataclasses.replace(engines.SMALL, dynamic_size=True, depth=1), backend="triton")
    calls = []
    original = engine.runner.plan.attention

    def counted(q, k, v, **options):
        calls.append((q.shape[:2], options["cu_queries"].tolist() if "cu_queries" in options else None))
        return original(q, k, v, **options)

    monkeypatch.setattr(engine.runner, "plan", dataclasses.replace(engine.runner.plan, attention=counted))
    engine(images(SIZES[:3]))
    assert calls == [((1, 19), [0, 7, 12, 19])]
    check(engine, images(SIZES[:3]))


def test_tokens_are_counted(monkeypatch):
    """No row is padding: products see as many rows as the images have tokens."""
    config = dataclasses.replace(engines.SMALL, dynamic_size=True)
    engine = engines.engine(config, backend="torch")
    rows = []
    original = engine.runner.plan.qkv

    def counted(x, *args, **kwargs):
        rows.append(x.shape[0] * x.shape[1])
        return original(x, *args, **kwargs)

    monkeypatch.setattr(engine.runner, "plan", dataclasses.replace(engine.runner.plan, qkv=counted))
    engine(images())
    assert rows == [sum(config.tokens(size) for size in SIZES)] * config.depth


@pytest.mark.parametrize("name", ["Dinov2WithRegistersModel", "DINOv3ViTModel"])
def test_positions_are_those_of_each_size(name):
    """Interpolated in the family's way; rotary ones differ by size, so attention runs size by size."""
    settings = (peers.DINO if "Dinov2" in name else peers.VIT) | {"num_register_tokens": 2}
    model = peers.transformers_model(name, settings)
    patch = settings["patch_size"]
    engine = vitfast.load(model, device="cpu")
    pictures = images([(4 * patch, 4 * patch), (3 * patch, 5 * patch), (2 * patch, 6 * patch), (3 * patch, 5 * patch)])
    check(engine, pictures)
    output = engine(pictures)
    with torch.no_grad():
        for i, image in enumerate(pictures):
            peers.close(output.image_tokens[i], model(image[None]).last_hidden_state[0])
    others = {tuple(image.shape[1:]) for image in pictures} - {engine.config.image_size}
    assert set(engine.runner.positions) == others
    kept = list(engine.runner.positions.values())
    engine(pictures)
    assert list(engine.runner.positions.values()) == kept


def test_uint8_and_sizes_off_the_grid():
    config = dataclasses.replace(engines.SMALL, dynamic_size=True, off_grid="crop")
    engine = engines.engine(config, backend="torch")
    pictures = [torch.randint(0, 256, (height, width, 3), dtype=torch.uint8) for height, width in ((32, 50), (40, 16))]
    check(engine, pictures, preprocessed=True)
    check(engine, pictures)  # resized to the model's size first
    mixed = [make(3, 32, 48), make(3, 32, 48, dtype=torch.float64)]
    check(engine, mixed)


def test_a_batch_of_others_changes_nothing():
    engine = engines.engine(dataclasses.replace(engines.SMALL, dynamic_size=True), backend="torch")
    first = images()
    more = engine(first)
    bad = [*first[:-1], torch.full_like(first[-1], float("nan"))]
    spoiled = engine(bad)
    peers.close(spoiled.embedding[:-1], more.embedding[:-1])
    assert spoiled.embedding[-1].isnan().all()


def test_what_cannot_be_packed_is_named(monkeypatch):
    engine = engines.engine(backend="torch")
    with pytest.raises(ValueError, match="image 1: image size 16x64: this model takes 32x48 only"):
        engine(images(SIZES[:2]))
    with pytest.raises(ValueError, match="image 0: float images must be"):
        engine([make(1, 32, 48)])
    plan = dataclasses.replace(engine.runner.plan, attention_block=engine.runner.plan.attention)
    with pytest.raises(ValueError, match="cannot be packed where attention is part of a fused block"):
        packed.forward(engine.config, engine.runner.weights, [], plan)
