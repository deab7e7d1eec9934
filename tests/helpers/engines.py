"""Small engines of every family, with random weights."""

import dataclasses

import vitfast
from vitfast import testing
from vitfast.engine.engine import Engine
from vitfast.images.preprocess import Preprocess

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
PREPROCESS = Preprocess(size=(32, 48), resize=(32, 48), interpolation="bicubic", center_crop=False, mean=MEAN, std=STD)
SMALL = vitfast.ViTConfig((32, 48), (16, 16), width=64, depth=2, heads=2, mlp_dim=128, num_classes=10, name="small")
FAMILIES = {
    "vit": {},
    "clip": {"activation": "quick_gelu", "pre_norm": True, "projection_dim": 24, "norm_eps": 1e-5, "num_classes": 0},
    "dinov2 with registers": {"layer_scale": True, "prefix_tokens": 5, "activation": "swiglu", "dynamic_size": True},
    "deit": {"prefix_tokens": 2, "distilled": True, "pool": "cls_dist"},
    "average pool": {"pool": "avg", "pool_norm": True, "final_norm": False, "activation": "gelu_tanh"},
    "no class token": {"class_token": False, "prefix_tokens": 0, "pool": "avg_all"},
    "dinov2 classifier": {"head_concat_mean": True},
    "odd head dim": {"head_dim": 20, "activation": "silu"},
}
"""Family -> what its config changes of SMALL."""


def engine(config=SMALL, preprocess=PREPROCESS, **kwargs):
    """An engine of random weights, its preprocessing for images of the config's size; `kwargs` as `Engine` takes."""
    if preprocess and config.image_size != preprocess.size:
        preprocess = dataclasses.replace(preprocess, size=config.image_size, resize=config.image_size)
    checkpoint = vitfast.Checkpoint(config, testing.random_weights(config), preprocess)
    return Engine(checkpoint, device=testing.device(), **kwargs)
