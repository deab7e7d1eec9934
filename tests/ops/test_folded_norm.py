"""What folding a LayerNorm into the next product costs: no more than the model's dtype costs by itself.

Folded, a row's mean is subtracted after the product: it must not matter that the mean is large, nor that a few
channels are. The kernel is held to that op by op. Whole models are computed with its arithmetic in plain torch,
which real weights need in seconds, not in an interpreter's hours.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import weights

import vitfast
from vitfast import ops, testing
from vitfast.images.preprocess import preprocess_batch
from vitfast.models.checkpoints import load as load_checkpoint
from vitfast.models.weights import prepare_weights
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import guarded, make

FP16, BF16 = torch.float16, torch.bfloat16
LIMIT = 1.5
"""Deviation of the folded forward, by that which the unfused one has from fp32."""

PLANTED = {
    "as it is": lambda channels, sigma: 0.0 * channels,
    "row mean": lambda channels, sigma: torch.full_like(channels, 100 * sigma),
    "massive channels": lambda channels, sigma: 1000 * sigma * (channels % 97 == 5),
}
"""What is added to each channel of the residual stream, in units of its standard deviation `sigma`."""


# -- one product ---------------------------------------------------------------------------------


def product(planted, dtype, *, sums_of_rounded=True):
    """A folded product by the kernels, in float64, and unfused in torch's ops."""
    x = make(37, 192, seed=1) + PLANTED[planted](torch.arange(192, device=testing.device()), 1.0)
    x = guarded(x.to(dtype))
    weight, bias = make(48, 192, seed=2, scale=192**-0.5), make(48, seed=3)
    gamma, beta = 1 + 0.2 * make(192, seed=4), 0.2 * make(192, seed=5)
    folded, total, shift = ops.fold_norm(weight, bias, gamma, beta, dtype=dtype)
    if not sums_of_rounded:
        total = (weight * gamma).sum(1)
    stats = ops.row_stats(x, backend="triton")
    actual = ops.linear(x, folded, shift, row_stats=stats, weight_sum=total, eps=1e-6, backend="triton")

    def unfused(x, *others):
        gamma, beta, weight, bias = (t.to(x.dtype) for t in others)
        return F.linear(F.layer_norm(x, (192,), gamma, beta, 1e-6), weight, bias)

    return actual, *(unfused(t, gamma, beta, weight, bias) for t in (x.double(), x))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("planted", PLANTED)
def test_kernel(planted, dtype):
    assert_close(*product(planted, dtype))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_sums_of_other_weights_are_noticed(dtype):
    with pytest.raises(AssertionError, match="error"):
        assert_close(*product("row mean", dtype, sums_of_rounded=False))


# -- whole models --------------------------------------------------------------------------------


def as_the_kernel(x, weight, bias=None, *, residual=None, stats=False, **kwargs):
    """`linear` as the Triton kernel computes it: sums and epilogue in fp32, one rounding when it stores."""
    wide = {name: t.float() if isinstance(t, torch.Tensor) else t for name, t in kwargs.items()}
    residual = None if residual is None else residual.float()
    bias = None if bias is None else bias.float()
    y = reference.linear(x.float(), weight.float(), bias, residual=residual, **wide).to(x.dtype)
    return (y, reference.row_stats(y)) if stats else y


def forward(checkpoint, images, dtype, *, fold=False, **calls):
    """One forward in plain torch; in half precision the products are those of the kernel."""
    if dtype != torch.float32:
        calls |= {"row_stats": reference.row_stats} | dict.fromkeys(("qkv", "proj", "fc1", "fc2"), as_the_kernel)
    engine = vitfast.Engine(checkpoint, device=testing.device(), dtype=dtype, backend="torch")
    engine.runner.plan = dataclasses.replace(engine.plan, **calls, fold_norm=fold)
    preprocess = checkpoint.preprocess
    engine.runner.weights = prepare_weights(
        checkpoint.config, checkpoint.weights, engine.plan, device=engine.device, dtype=dtype,
        mean=preprocess and preprocess.mean, std=preprocess and preprocess.std,
    )  # fmt: skip
    return engine(images)


def plant(checkpoint, images, planted):
    """The same model with a constant added to the residual stream after its first block."""
    config, spread = checkpoint.config, []

    def spy(x, *args):
        spread.append(x.std(-1).mean().item())
        return reference.layer_norm(x, *args)

    forward(checkpoint, images, torch.float32, layer_norm=spy)
    sigma = spread[2 + config.pre_norm]  # as the second block's first norm sees it
    added = PLANTED[planted](torch.arange(config.width), sigma)
    name, scale = "blocks.0.fc2.bias", checkpoint.weights.get("blocks.0.layer_scale2", torch.ones(config.width))
    bias = checkpoint.weights[name].float() + added / scale
    return dataclasses.replace(checkpoint, weights={**checkpoint.weights, name: bias})


def deviation(actual, expected):
    """Relative RMS of the worst vector but for one in twenty: of CLIP's tokens one in fifty amplifies rounding up to
    a thousandfold, and in which forward it does is chance (docs/numerics.md)."""
    actual, expected = actual.double(), expected.double()
    each = (actual - expected).square().mean(-1).sqrt() / expected.square().mean().sqrt()
    return each.flatten().quantile(0.95).item()


def check(checkpoint, images, planted, dtype):
    checkpoint = plant(checkpoint, images, planted)
    exact = forward(checkpoint, images, torch.float32)
    unfused, folded = (forward(checkpoint, images, dtype, fold=fold) for fold in (False, True))
    for name in ("tokens", "embedding"):
        want, usual, got = (getattr(output, name) for output in (exact, unfused, folded))
        both = math.hypot(1, LIMIT)  # two forwards that err independently: their errors' squares add up
        for other, what, limit in ((want, "fp32", LIMIT), (usual, "the unfused forward", both)):
            bound, got_to = limit * deviation(usual, want), deviation(got, other)
            assert got_to <= bound, f"{name}: {got_to:.2e} from {what}, not {bound:.2e}"


DINO = vitfast.ViTConfig(
    (56, 56), (14, 14), width=192, depth=6, heads=3, mlp_dim=768, layer_scale=True, norm_eps=1e-6, num_classes=0
)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("planted", PLANTED)
def test_model(planted, dtype):
    """With DINOv2's architecture and random weights."""
    check(vitfast.Checkpoint(DINO, testing.random_weights(DINO)), make(2, 3, 56, 56), planted, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("path", [weights.clip_vit_b16, weights.dinov2_vit_s14], ids=["clip", "dinov2"])
def test_real_weights(path, planted, dtype):
    checkpoint = load_checkpoint(path())
    pixels = [preprocess_batch(torch.from_numpy(photo)[None], checkpoint.preprocess) for photo in weights.photos()]
    check(checkpoint, torch.cat(pixels).to(testing.device()), planted, dtype)
