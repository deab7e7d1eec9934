"""Tile shapes of the attention kernel, as data, and the rules that pick them."""

from __future__ import annotations

import torch
import triton

from vitfast.kernels._common import Config

# Chosen by compiling for sm_80, sm_90 and sm_100: the largest tiles without spills (fp32, and
# D = 256 on sm_100: 24 bytes of stack at most) and within the shared memory of sm_86 and sm_89
# (101,376 bytes) unless for sm_90 and up. None has been timed. The number is the widest padded head
# dim. "half": fp16 and bf16. "dense": the same with a bias or mask that differs from query to query,
# whose tile takes registers too. "heads": the same with q and k normed or rotated, with or without what makes
# others dense. "short": few queries.
CONFIGS = [
    Config("half-96-short", {"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    Config("half-96", {"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    Config("half-128-sm90", {"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3, min_capability=(9, 0)),
    Config("half-128", {"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config("half-192", {"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2),
    Config("half-256", {"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    Config("dense-96", {"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config("dense-128", {"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    Config("dense-256", {"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=8, num_stages=2),
    Config("heads-64", {"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config("heads-96-sm90", {"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2, min_capability=(9, 0)),
    Config("heads-96", {"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    Config("heads-128-sm90", {"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2, min_capability=(9, 0)),
    Config("heads-128", {"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    Config("heads-256", {"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8, num_stages=1),
    Config("fp32-128", {"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    Config("fp32-256", {"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8, num_stages=2),
    Config("fp32-heads", {"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8, num_stages=1),
]
_WIDTHS = {"half": (96, 128, 192, 256), "heads": (64, 96, 128, 256), "dense": (96, 128, 256), "fp32": (128, 256)}
_SHORT = 320
"""Up to so many queries (224 px with patches of 14 or more) 64-row tiles: more, smaller programs."""


def head_chunks(head_dim: int) -> tuple[int, int]:
    """Cut D into a power of two and a smaller one (0 for none): 64 -> 64, 0; 72 -> 64, 16; 112 -> 128, 0.

    Products need a chunk of at least 16.
    """
    main = max(16, 1 << head_dim.bit_length() - 1)
    if head_dim <= main:
        return main, 0
    rest = max(16, triton.next_power_of_2(head_dim - main))
    return (main, rest) if rest < main else (2 * main, 0)


def pick_config(
    head_dim: int,
    query_count: int,
    dtype: torch.dtype,
    per_query: bool,
    device_capability: tuple[int, int],
    heads_change: bool = False,
) -> Config:
    """The configuration for one call.

    `per_query`: a bias or mask differs from query to query; `heads_change`: q and k are normed or rotated.
    """
    kind = "fp32" if dtype == torch.float32 else "heads" if heads_change else "dense" if per_query else "half"
    columns = sum(head_chunks(head_dim))
    width = next(w for w in _WIDTHS[kind] if w >= columns)
    name = "fp32-heads" if kind == "fp32" and heads_change and columns > 64 else f"{kind}-{width}"
    if name == "half-96" and query_count <= _SHORT:
        name += "-short"
    return next(c for c in CONFIGS if c.name in (f"{name}-sm90", name) and c.min_capability <= device_capability)


# Chosen in the same way; the number is the widest padded head dim. "dense": with a bias or a mask,
# or with dS written (for "dkdv" any bias or mask, for "dq" one that differs from query to query).
# dq walks over BLOCK_N, dkdv over BLOCK_M. "shared": key heads that serve several query heads, in
# packed sequences or under a band.
BACKWARD_CONFIGS = [
    Config("dq-half-128", {"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2),
    Config("dq-half-256", {"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=8, num_stages=2),
    Config("dq-dense-128", {"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=4, num_stages=2),
    Config("dq-dense-256", {"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=8, num_stages=2),
    Config("dq-fp32-128", {"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8, num_stages=1),
    Config("dq-fp32-256", {"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8, num_stages=1),
    Config("dkdv-half-80", {"BLOCK_N": 64, "BLOCK_M": 32}, num_warps=4, num_stages=2),
    Config("dkdv-half-96-sm90", {"BLOCK_N": 64, "BLOCK_M": 32}, num_warps=4, num_stages=2, min_capability=(9, 0)),
    Config("dkdv-half-96", {"BLOCK_N": 64, "BLOCK_M": 16}, num_warps=4, num_stages=2),
    Config("dkdv-half-128", {"BLOCK_N": 64, "BLOCK_M": 32}, num_warps=4, num_stages=2),
    Config("dkdv-half-256", {"BLOCK_N": 64, "BLOCK_M": 16}, num_warps=8, num_stages=2),
    Config("dkdv-dense-64", {"BLOCK_N": 64, "BLOCK_M": 16}, num_warps=4, num_stages=2),
    Config("dkdv-dense-128", {"BLOCK_N": 64, "BLOCK_M": 16}, num_warps=8, num_stages=2),
    Config("dkdv-shared-128", {"BLOCK_N": 64, "BLOCK_M": 16}, num_warps=8, num_stages=1),
    Config("dkdv-dense-256", {"BLOCK_N": 32, "BLOCK_M": 16}, num_warps=8, num_stages=1),
    Config("dkdv-fp32-128", {"BLOCK_N": 32, "BLOCK_M": 16}, num_warps=8, num_stages=1),
    Config("dkdv-fp32-256", {"BLOCK_N": 16, "BLOCK_M": 16}, num_warps=8, num_stages=1),
]


def pick_backward_config(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    dense: bool,
    device_capability: tuple[int, int],
    irregular: bool = False,
    shared: bool = False,
) -> Config:
    """The configuration of "dq" or "dkdv".

    `dense`: it reads or writes tiles of bias, mask or dS, or caps scores or adds ALiBi. `irregular`: a band or packed
    sequences; `shared`: key heads that serve several query heads. Their further loops leave dkdv fewer registers, so
    that it takes smaller tiles: with `irregular` for more than 80 columns, with `shared` always.
    """
    columns = sum(head_chunks(head_dim))
    dense = dense or (kernel == "dkdv" and (shared or (irregular and columns > 80)))
    kind = "fp32" if dtype == torch.float32 else "dense" if dense else "half"
    if kind == "dense" and kernel == "dkdv" and shared and irregular and 64 < columns <= 128:
        kind = "shared"  # one stage: of the dense tiles two would spill
    fitting = (
        config
        for config in BACKWARD_CONFIGS
        if config.name.startswith(f"{kernel}-{kind}-")
        and int(config.name.split("-")[2]) >= columns
        and config.min_capability <= device_capability
    )
    return next(fitting)
