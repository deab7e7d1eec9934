"""Whole models at their real size, random weights, fp32: the engine against the libraries' own forward."""

import pytest
import torch
from helpers import peers
from helpers.grids import thinned

import vitfast
from vitfast import testing
from vitfast.ops import accuracy

TIMM = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "deit_tiny_distilled_patch16_224")


def timm_model(name):
    return peers.import_timm().create_model(name, pretrained=False)


def torchvision_model():
    return peers.import_torchvision().models.vit_b_16(weights=None)


MODELS = {name: (lambda name=name: timm_model(name)) for name in TIMM} | {"torchvision vit_b_16": torchvision_model}


@pytest.mark.parametrize("backend", thinned(["auto", "torch"]))
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if "vit_b" in name else ()) for name in MODELS]
)
def test_engine_equals_the_library(name, backend):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # torchvision starts with a head of zeros, timm with biases of zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = model.to(testing.device())
    images = testing.make(2, 3, 224, 224)
    with torch.inference_mode():
        want = model(images)
    got = vitfast.load(model, device=testing.device(), dtype="fp32", backend=backend)(images).logits
    error = (got - want).abs().max() / want.abs().max()
    assert error <= accuracy.PEER_TOLERANCE, f"{name}: {error:.1e}"
