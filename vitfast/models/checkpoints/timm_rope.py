"""Position of timm's models that attention sees: rotary embeddings and biases by relative position."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import ViTConfig

_CAT, _DINO, _MIXED, _MULTI = (
    "RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMixed", "RotaryEmbeddingMRope",
)  # fmt: skip
KINDS = (_CAT, _DINO, _MIXED, _MULTI)
_GRIDS = {"index": "index", "pixel": "span", "centered": "centered"}


def facts(rope: Any, where: str) -> dict[str, Any]:
    """The fields of ViTConfig about rotary embedding.

    Raises:
        CheckpointError: for a rotary embedding of another kind.
    """
    kind = type(rope).__name__
    require(kind in KINDS and type(rope).__module__.startswith("timm."), f"the rotary embedding {kind}", where)
    grid = {_CAT: getattr(rope, "grid_type", "index"), _DINO: "centered"}.get(kind, "index")
    normalize = getattr(rope, "normalize_coords", "separate")
    require(grid != "centered" or normalize == "separate", f"coordinates normalised by the {normalize} side", where)
    reference = getattr(rope, "ref_feat_shape", None)
    return {
        "rope": _GRIDS[grid],
        "rope_interleaved": not getattr(rope, "rotate_half", kind == _MULTI),
        "rope_learned": kind == _MIXED,
        "rope_offset": float(getattr(rope, "grid_offset", 0.0)) if grid != "pixel" else 0.0,
        "rope_reference": tuple(reference) if reference is not None else (0, 0),
    }


def read(source: Source, config: ViTConfig, rope: Any, where: str) -> None:
    """Take the frequencies of rows and columns."""
    half, kind = config.head_dim // 2, type(rope).__name__
    down, right = (1, 0) if getattr(rope, "grid_indexing", "ij") == "xy" else (0, 1)
    if kind == _MIXED:
        given = (2, config.depth, config.heads, half)

        def learned(freqs: Tensor) -> Tensor:
            return freqs[[down, right]].permute(1, 2, 0, 3)

        source.derive("rope", (config.depth, config.heads, 2, half), learned, {"rope.freqs": given})
        return
    if kind == _MULTI:
        require(rope.inv_freq.numel() == half, f"rotary frequencies for {2 * rope.inv_freq.numel()} channels", where)
        turns, axis = rope.inv_freq, rope.axis
        table = torch.stack([turns * (axis == 1), turns * (axis == 2)])
    else:
        bands = 2 * math.pi / rope.periods if kind == _DINO else rope.bands
        require(2 * bands.numel() == half, f"rotary frequencies for {4 * bands.numel()} channels", where)
        first, second = torch.cat([bands, bands * 0]), torch.cat([bands * 0, bands])
        table = torch.stack([second, first] if down else [first, second])  # "xy" has the columns' bands first
    source.derive("rope", (1, 1, 2, half), lambda: table.detach().float()[None, None], {})


def read_relative(source: Source, config: ViTConfig, module: Any) -> None:
    """Take the tables of biases by relative position; those that an MLP makes are computed here."""
    shared = getattr(module, "rel_pos_bias", None), getattr(module, "shared_rel_pos", None)
    where = ("rel_pos_bias", "shared_rel_pos")
    if config.relative_position == "shared":
        name, part = next((n, p) for n, p in zip(where, shared, strict=True) if p is not None)
        parts = [(f"{name}.", part)]
    else:
        attentions = [(f"blocks.{i}.attn.", block.attn) for i, block in enumerate(module.blocks)]
        parts = [
            (path, a) if hasattr(a, "relative_position_bias_table") else (f"{path}rel_pos.", a.rel_pos)
            for path, a in attentions
        ]
    steps = config.weight_shapes()["relative_position"][0][-1]
    names: dict[str, tuple[int, ...]] = {}
    for path, part in parts:
        if type(part).__name__ == "RelPosMlp":
            names |= {f"{path}{name}": tuple(t.shape) for name, t in part.named_parameters()}
        else:
            names |= {f"{path}relative_position_bias_table": (steps, config.heads)}

    def tables(*given: Tensor) -> Tensor:
        have = dict(zip(names, given, strict=True))
        made = [
            _made(part, config) if type(part).__name__ == "RelPosMlp" else have[f"{path}relative_position_bias_table"].T
            for path, part in parts
        ]
        return torch.stack(made)

    source.derive("relative_position", (len(parts), config.heads, steps), tables, names)


def _made(part: Any, config: ViTConfig) -> Tensor:
    """The table [H, T] that an MLP makes of log-spaced distances; the class token has no bias."""
    with torch.no_grad():
        table = part.bias_act(part.mlp(part.rel_coords_log).flatten(0, 1).float())
    table = table * (part.bias_gain or 1)
    return torch.nn.functional.pad(table.T, (0, 3 * config.class_token))
