"""Bare weight files, with an architecture by name: timm's, torchvision's, the dinov2 repository's, or CLIP's.

timm and torchvision build the module that the name stands for, and fill it as they do themselves: a bare file says
nothing of its architecture but the shapes of its tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitfast.models import libraries
from vitfast.models.checkpoints import open_clip, state_dicts, timm, torchvision
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError
from vitfast.ops.names import did_you_mean

TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")

DINOV2 = {
    f"dinov2_vit{letter}14{suffix}": f"vit_{size}_patch14_{tag}dinov2"
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
    for suffix, tag in (("", ""), ("_reg", "reg4_"))
}
"""The dinov2 repository's names -> timm's of the same architecture."""

_HEADS = ("head.weight", "heads.head.weight", "heads.weight")


def checkpoint(name: str, state: Mapping[str, Tensor], where: str) -> Checkpoint:
    """The model of this name with the weights in a state dict.

    Args:
        name: "vit_base_patch16_224" (timm, with or without a tag), "vit_b_16" (torchvision), "dinov2_vits14_reg", or
            "ViT-B/32" (OpenAI CLIP) and "ViT-B-32-quickgelu" (open_clip). where: the file, for messages.

    Raises:
        CheckpointError: if nobody has the name, its library cannot be imported, or the weights do not fit.
    """
    if open_clip.names(name):
        return open_clip.from_name(state, name, where)
    if name in TORCHVISION:
        return _torchvision(name, state, where)
    if name in DINOV2:
        made = _timm(DINOV2[name], state, where)
        # The repository resamples position embeddings by its own two rules.
        registers = name.endswith("_reg")
        rule: dict[str, Any] = {"position_antialias": registers, "position_offset": 0.0 if registers else 0.1}
        return replace(made, config=replace(made.config, name=name, **rule))
    return _timm(name, state, where)


def _torchvision(name: str, state: Mapping[str, Tensor], where: str) -> Checkpoint:
    try:
        library = libraries.import_library("torchvision")
    except ImportError as error:
        raise CheckpointError(f"loading {where} as {name!r} needs torchvision: {error}") from error
    state = state_dicts.strip_prefix(state, ["conv_proj.weight"], where)
    options: dict[str, Any] = {"num_classes": _classes(state)}
    patch = state["conv_proj.weight"].shape[-1] if "conv_proj.weight" in state else 0
    if side := _side(state.get("encoder.pos_embedding"), 1):
        options["image_size"] = side * patch
    return _filled(library.models.get_model, name, state, where, torchvision, weights=None, **options)


def _timm(name: str, state: Mapping[str, Tensor], where: str) -> Checkpoint:
    try:
        library = libraries.import_library("timm")
    except ImportError as error:
        raise CheckpointError(f"loading {where} as {name!r}, a timm model name, needs timm: {error}") from error
    if not library.is_model(name.partition(".")[0]):
        known = (*library.list_models(), *TORCHVISION, *DINOV2)
        raise CheckpointError(f"no architecture is called {name!r}{did_you_mean(name, known)}")
    state = state_dicts.strip_prefix(state, ["patch_embed.proj.weight"], where)
    options: dict[str, Any] = {"num_classes": _classes(state)}
    with torch.device("meta"):
        empty = library.create_model(name, pretrained=False)
    position, prefix = state.get("pos_embed"), getattr(empty, "num_prefix_tokens", 1)
    covered = 0 if getattr(empty, "no_embed_class", False) else 1 if "register_tokens" in state else prefix
    wanted = getattr(empty, "pos_embed", None)
    side = _side(position, covered)
    if side and wanted is not None and math.isqrt(wanted.shape[1]) != side:
        options["img_size"] = side * empty.patch_embed.patch_size[0]  # else timm resamples to its own size
    # No classifier: timm would leave out a head of another size, and go on with a random one.
    overlay: dict[str, Any] = {"source": "", "state_dict": dict(state), "custom_load": False, "classifier": None}
    try:
        module = library.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    except Exception as error:  # timm asserts, and raises RuntimeError, TypeError and what its readers raise
        raise CheckpointError(f"{where} does not fit {name!r}: {type(error).__name__}: {error}") from error
    return timm.from_module(module)


def _filled(build: Any, name: str, state: Mapping[str, Tensor], where: str, family: Any, **options: Any) -> Checkpoint:
    try:
        with torch.device("meta"):
            module = build(name, **options)
        module.load_state_dict(state, assign=True)
    except Exception as error:  # a library's asserts, and torch's own error with the names that do not fit
        raise CheckpointError(f"{where} does not fit {name!r}: {type(error).__name__}: {error}") from error
    made = family.from_module(module.eval())
    return replace(made, config=replace(made.config, name=name))


def _classes(state: Mapping[str, Tensor]) -> int:
    return next((len(state[head]) for head in _HEADS if head in state), 0)


def _side(position: Tensor | None, covered: int) -> int:
    """The side of the square grid that a position embedding [1, covered + L, C] is of; 0 if there is none."""
    if position is None or position.ndim != 3 or position.shape[1] <= covered:
        return 0
    side = math.isqrt(position.shape[1] - covered)
    return side if side * side == position.shape[1] - covered else 0


def hint(state_names: Mapping[str, Any]) -> str:
    """What a name could be for a state dict, for the message that one is needed."""
    if any(re.fullmatch(r"(.*\.)?visual\.(conv1|proj).*", name) for name in state_names):
        return 'a CLIP: model="ViT-B/32" for OpenAI\'s, model="ViT-B-32" for one of open_clip'
    if any(name.endswith("conv_proj.weight") for name in state_names):
        return 'torchvision\'s: model="vit_b_16"'
    if "mask_token" in state_names and "patch_embed.proj.weight" in state_names:
        return 'the dinov2 repository\'s: model="dinov2_vits14"'
    return 'its architecture by name: model="vit_base_patch16_224"'
