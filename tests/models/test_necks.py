"""Necks: what makes other tokens of the patches', and what becomes of it in every way that an engine is run."""

import pytest
import torch
from helpers import peers

import vitfast
from vitfast.models.checkpoints import CheckpointError
from vitfast.testing import make

QWEN = {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5, "pos_embed_grid_size": 4,
        "patch_size": 8, "img_size": 32, "out_features": 12}  # fmt: skip


@pytest.fixture(scope="module")
def qwen():
    model = peers.timm_model("qwen3_vit_88m_merge", **QWEN)
    return model, vitfast.load(model, device="cpu", dtype="fp32", backend="torch")


def test_a_neck_in_every_way(qwen, tmp_path):
    model, engine = qwen
    images = make(3, 3, 32, 48).cpu()
    with torch.no_grad():
        joined, logits = model.forward_features(images), model(images)
    made = engine(images)
    peers.close(made.neck, joined)
    peers.close(made.logits, logits)
    assert made.tokens.shape == (3, 24, 32) and made.embedding.shape == (3, 12) and made.neck.shape == (3, 6, 12)
    (streamed,) = engine.stream([images], tokens=True)
    assert torch.equal(streamed.neck, made.neck) and streamed[:2].neck.shape == (2, 6, 12)
    mixed = engine([make(3, 32, 48).cpu(), images[0]])
    assert mixed.neck is None and torch.allclose(mixed.logits[1], made.logits[0], atol=1e-5)
    assert engine(images[:0]).neck.shape == (0, 6, 12)
    with pytest.raises(CheckpointError, match=r"runs as it is \(Qwen3VitPatchMerger\) cannot be saved"):
        engine.save(tmp_path)


def test_a_grid_that_a_neck_does_not_take(qwen):
    with pytest.raises(ValueError, match="image size 40x32: its 5x4 patches are no multiple of the 2x2"):
        qwen[1](make(1, 3, 40, 32).cpu())


def test_products_that_are_clipped_are_refused():
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "head_dim": 16, "intermediate_size": 32}
    model = peers.timm_model("gemma4_vit_167m", **small, position_embedding_size=64, num_classes=3)
    engine = vitfast.load(model, device="cpu", dtype="fp32", backend="torch")
    images = make(1, 3, 64, 32).cpu()
    with torch.no_grad():
        peers.close(engine(images).logits, model(images))
    with pytest.raises(ValueError, match=r"a grid of \(65, 1\) patches, and positions for \(64, 64\)"):
        engine(make(1, 3, 65 * 16, 16).cpu())
    model.encoder.blocks[0].mlp.up_proj.output_max.fill_(3.0)
    with pytest.raises(CheckpointError, match=r"blocks.0.mlp.up_proj: products that are clipped"):
        vitfast.load(model)
