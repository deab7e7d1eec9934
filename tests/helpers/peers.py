"""The libraries that vitfast's results are compared with, and small models of theirs.

Each is imported here, or the test is skipped with the reason.
"""

import importlib.util
from types import ModuleType

import pytest
import torch
from torch import nn

from vitfast.models import libraries
from vitfast.ops import accuracy


def _peer(name: str) -> ModuleType:
    """The library; only its absence is a skip, an import that fails is a failure."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: nothing to compare with")
    if importlib.util.find_spec("torchvision") is not None:
        libraries.import_library("torchvision")  # transformers and timm import it; it may need repair first
    return libraries.import_library(name)


def import_torchvision() -> ModuleType:
    """torchvision, or skip."""
    return _peer("torchvision")


def import_timm() -> ModuleType:
    """timm, or skip."""
    return _peer("timm")


def import_transformers() -> ModuleType:
    """transformers, or skip."""
    return _peer("transformers")


def import_open_clip() -> ModuleType:
    """open_clip, or skip."""
    return _peer("open_clip")


# Settings of small models, with an eps large enough that another would show.
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 0.02,
}
VIT = SMALL | {"intermediate_size": 96}
DINO = SMALL | {"mlp_ratio": 2, "image_size": 42, "patch_size": 14}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}
TIMM = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 7}


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter away from its initial value, biases, tokens and LayerScale included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def transformers_model(name: str, config: dict) -> nn.Module:
    """A model of transformers by its class's name, from settings or a config, with random weights."""
    library = import_transformers()
    kind = getattr(library, name)
    settings = kind.config_class(**config) if isinstance(config, dict) else config
    torch.manual_seed(0)
    return randomised(kind(settings))


def timm_model(name: str = "vit_tiny_patch16_224", **kwargs) -> nn.Module:
    """A model of timm with random weights."""
    timm = import_timm()
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **kwargs))


def torchvision_model(**kwargs) -> nn.Module:
    """A small VisionTransformer of torchvision with random weights."""
    torchvision = import_torchvision()
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}
    return randomised(torchvision.models.VisionTransformer(**(sizes | {"num_classes": 7} | kwargs)))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that two fp32 results are equal but for rounding, by the rule for whole forwards."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= accuracy.PEER_TOLERANCE * expected.abs().max()
