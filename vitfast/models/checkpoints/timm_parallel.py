"""timm's blocks whose halves, or whose branches, lie side by side (ViT-22B; "Three things everyone should know")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.models.checkpoints.source import Source, require
from vitfast.models.checkpoints.timm_blocks import (
    Facts,
    absent,
    activation,
    attention_facts,
    differential_facts,
    is_a,
    mlp_facts,
    one_norm,
    read_differential,
    read_norm,
)
from vitfast.models.config import ViTConfig


def scaling_facts(block: Any, where: str) -> Facts:
    """What a ParallelScalingBlock does, or one with differential attention."""
    norms = {"in_norm": block.in_norm, "q_norm": block.q_norm, "k_norm": block.k_norm}
    norm, eps = one_norm({path: part for path, part in norms.items() if not absent(part)}, where)
    require(absent(block.q_norm) == absent(block.k_norm), "a norm of q or k only", where)
    require(block.scale == block.head_dim**-0.5, f"scale={block.scale}", where)
    differential = is_a(block, "DiffParallelScalingBlock")
    if differential:
        differential_facts(block, not absent(block.q_norm), where)
    return Facts(
        heads=block.num_heads, head_dim=block.head_dim * (1 + differential), mlp_dim=block.in_split[0],
        activation=activation(block.mlp_act, f"{where}.mlp_act"), layer_scale=not absent(block.ls), block="parallel",
        norm=norm, norm_eps=eps, qk_norm="" if absent(block.q_norm) else norm, gated_attention=False,
        attention_norm=False, mlp_norm=False, double_norm=False, relative_position="", interleaved=None,
        differential=differential, attention_scale=block.scale if differential else 0.0,
    )  # fmt: skip


def things_facts(block: Any, where: str) -> Facts:
    """Branches side by side: one attention of all their heads, and one MLP of all their hidden channels."""
    branches = list(zip(block.attns, block.ffns, strict=True))
    norms = {f"attns.{j}.norm": first.norm for j, (first, _) in enumerate(branches)}
    norms |= {f"ffns.{j}.norm": second.norm for j, (_, second) in enumerate(branches)}
    norm, eps = one_norm(norms, where)
    found = set()
    for j, (first, second) in enumerate(branches):
        there = f"{where}.attns.{j}.attn"
        attention = attention_facts(first.attn, there, norm)
        special = attention["qk_norm"] or attention["gated_attention"] or attention["attention_norm"]
        require(not special, "a norm or gate in parallel attention", there)
        gated, name = mlp_facts(second.mlp, f"{where}.ffns.{j}.mlp")
        require(not gated and absent(second.mlp.norm), "a gated MLP, or a norm inside it, in parallel", where)
        found.add((first.attn.num_heads, attention["head_dim"], second.mlp.fc2.in_features, name))
    require(len(found) == 1, "parallel branches that differ", where)
    heads, head_dim, hidden, name = found.pop()
    return Facts(
        heads=heads * len(branches), head_dim=head_dim, mlp_dim=hidden * len(branches), activation=name,
        layer_scale=False, block="pre", norm=norm, norm_eps=eps, qk_norm="", gated_attention=False,
        attention_norm=False, mlp_norm=False, double_norm=False, relative_position="", interleaved=None,
    )  # fmt: skip


def read_scaling(source: Source, config: ViTConfig, ours: str, block: Any) -> None:
    """One product makes hidden channels, q, k and v; one, or two, end both halves."""
    theirs, hidden, width, inner = ours, config.mlp_dim, config.width, config.heads * config.head_dim
    for name in ("norm1", "norm2"):
        read_norm(source, f"{ours}{name}", f"{theirs}in_norm.", block.in_norm)
    made = {f"{theirs}in_proj.weight": (hidden + 3 * inner, width)}
    source.derive(f"{ours}fc1.weight", (hidden, width), lambda t: t[:hidden], made)
    source.derive(f"{ours}qkv.weight", (3 * inner, width), lambda t: t[hidden:], made)
    if block.mlp_bias is not None:
        source.copy(f"{ours}fc1.bias", f"{theirs}mlp_bias")
    if block.in_proj.bias is not None:
        biases = {f"{theirs}in_proj.bias": (hidden + 3 * inner,)}
        source.derive(f"{ours}fc1.bias", (hidden,), lambda t: t[:hidden], biases)
        source.derive(f"{ours}qkv.bias", (3 * inner,), lambda t: t[hidden:], biases)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        read_norm(source, f"{ours}{name}", f"{theirs}{name}.", getattr(block, name))
    if config.differential:
        read_differential(source, config, ours, theirs, block)
    if block.out_proj is not None:
        both = {f"{theirs}out_proj.weight": (width, inner + hidden)}
        source.derive(f"{ours}proj.weight", (width, inner), lambda t: t[:, :inner], both)
        source.derive(f"{ours}fc2.weight", (width, hidden), lambda t: t[:, inner:], both)
        if block.out_proj.bias is not None:
            source.copy(f"{ours}proj.bias", f"{theirs}out_proj.bias")
    else:
        source.dense(f"{ours}proj", f"{theirs}attn_out_proj.", bias=block.attn_out_proj.bias is not None)
        source.dense(f"{ours}fc2", f"{theirs}mlp_out_proj.", bias=block.mlp_out_proj.bias is not None)
    for half in (1, 2) if config.layer_scale else ():
        source.copy(f"{ours}layer_scale{half}", f"{theirs}ls.gamma")


def read_things(source: Source, config: ViTConfig, ours: str, block: Any) -> None:
    """Branches become one: norms and LayerScale move into the products, which are stacked."""
    count, width = len(block.attns), config.width
    heads, hidden = (config.heads // count, config.head_dim), config.mlp_dim // count
    inner = heads[0] * heads[1]
    for name in ("norm1", "norm2"):
        source.derive(f"{ours}{name}.weight", (width,), lambda: torch.ones(width), {})
    first = [(f"{ours}attns.{j}.norm.", f"{ours}attns.{j}.attn.qkv.", part.norm, part.attn.qkv) for j, part in
             enumerate(block.attns)]  # fmt: skip
    _stack_first(source, f"{ours}qkv", first, 3 * inner, width, lambda rows: rows.unflatten(0, (3, *heads)), 1)
    first = [(f"{ours}ffns.{j}.norm.", f"{ours}ffns.{j}.mlp.fc1.", part.norm, part.mlp.fc1) for j, part in
             enumerate(block.ffns)]  # fmt: skip
    _stack_first(source, f"{ours}fc1", first, hidden, width, lambda rows: rows, 0)
    for target, branches, path, columns in (
        ("proj", block.attns, "attns.{}.attn.proj.", inner), ("fc2", block.ffns, "ffns.{}.mlp.fc2.", hidden),
    ):  # fmt: skip
        names = [f"{ours}{path.format(j)}" for j in range(count)]
        scaled = [None if absent(part.ls) else f"{ours}{path.partition('.')[0]}.{j}.ls.gamma" for j, part in
                  enumerate(branches)]  # fmt: skip
        _stack_second(source, f"{ours}{target}", names, scaled, columns, width)


def _stack_first(source: Source, ours: str, parts: Any, rows: int, width: int, view: Any, axis: int) -> None:
    """Products after a norm, W x̂γ + Wβ + b, stacked along rows in the order that `view` sees along `axis`."""
    names: dict[str, tuple[int, ...]] = {}
    for norm, dense, norm_part, dense_part in parts:
        names |= {f"{dense}weight": (rows, width), f"{norm}weight": (width,)}
        names |= {f"{norm}bias": (width,)} if norm_part.bias is not None else {}
        names |= {f"{dense}bias": (rows,)} if dense_part.bias is not None else {}
    keys = list(names)

    def weight(*given: Tensor) -> Tensor:
        have = dict(zip(keys, given, strict=True))
        made = [view(have[f"{dense}weight"] * have[f"{norm}weight"]) for norm, dense, *_ in parts]
        return torch.cat(made, dim=axis).reshape(-1, width)

    def bias(*given: Tensor) -> Tensor:
        have = dict(zip(keys, given, strict=True))
        made = []
        for norm, dense, *_ in parts:
            total = have.get(f"{dense}bias", given[0].new_zeros(rows))
            if f"{norm}bias" in have:
                total = total + have[f"{dense}weight"] @ have[f"{norm}bias"]
            made.append(view(total))
        return torch.cat(made, dim=axis).reshape(-1)

    source.derive(f"{ours}.weight", (len(parts) * rows, width), weight, names)
    source.derive(f"{ours}.bias", (len(parts) * rows,), bias, names)


def _stack_second(
    source: Source, ours: str, names: Sequence[str], scales: Sequence[str | None], columns: int, width: int
) -> None:
    """Products that are summed, each times its LayerScale: stacked along columns."""
    wanted: dict[str, tuple[int, ...]] = {f"{name}weight": (width, columns) for name in names}
    wanted |= {f"{name}bias": (width,) for name in names if f"{name}bias" in source}
    wanted |= {name: (width,) for name in scales if name}
    keys = list(wanted)

    def weight(*given: Tensor) -> Tensor:
        have = dict(zip(keys, given, strict=True))
        pairs = zip(names, scales, strict=True)
        return torch.cat([have[f"{n}weight"] * (have[s][:, None] if s else 1) for n, s in pairs], dim=1)

    def bias(*given: Tensor) -> Tensor:
        have = dict(zip(keys, given, strict=True))
        zero, pairs = given[0].new_zeros(width), zip(names, scales, strict=True)
        return torch.stack([have.get(f"{n}bias", zero) * (have[s] if s else 1) for n, s in pairs]).sum(0)

    source.derive(f"{ours}.weight", (width, len(names) * columns), weight, wanted)
    source.derive(f"{ours}.bias", (width,), bias, wanted)
