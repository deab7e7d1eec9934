"""Blocks of timm's Vision Transformers: what each does is read from its parts; a part that is not known is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import DIFFERENTIAL_EPS, ViTConfig

DROP = ("Dropout", "Identity")
PATH = ("DropPath", "Identity")
LAYER_NORMS = ("LayerNorm", "LayerNormFp32")
RMS_NORMS = ("RmsNorm", "RmsNormFp32", "RMSNorm")
NORM = (*LAYER_NORMS, *RMS_NORMS)
ACTS = ("GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish")
_MLPS = ("Mlp", "GluMlp", "SwiGLU", "GeGluMlp")
_LS = ("LayerScale", "Identity")
_ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention", "RelPosAttention", "DiffAttention")
_BLOCK = {
    **dict.fromkeys(("norm1", "norm2"), NORM),
    **dict.fromkeys(("ls1", "ls2"), _LS),
    **dict.fromkeys(("drop_path1", "drop_path2"), PATH),
    "attn": _ATTENTIONS,
    "mlp": _MLPS,
}
_ATTENTION = {
    **dict.fromkeys(("qkv", "q_proj", "k_proj", "v_proj", "proj", "gate"), ("Linear",)),
    **dict.fromkeys(("q_norm", "k_norm", "norm"), (*NORM, "Identity")),
    **dict.fromkeys(("attn_drop", "proj_drop"), DROP),
    "sub_norm": RMS_NORMS,
    "rel_pos": ("RelPosBias", "RelPosMlp"),
}
_MLP = {
    **dict.fromkeys(("fc1", "fc1_g", "fc1_x", "fc2", "w0", "w1", "w2"), ("Linear",)),
    **dict.fromkeys(("drop1", "drop2"), DROP),
    "act": (*ACTS, "ReLU"),
    "norm": (*NORM, "Identity"),
}
_SCALING = {
    **dict.fromkeys(("in_proj", "out_proj", "attn_out_proj", "mlp_out_proj"), ("Linear",)),
    **dict.fromkeys(("q_norm", "k_norm"), (*NORM, "Identity")),
    **dict.fromkeys(("attn_drop", "mlp_drop"), DROP),
    "in_norm": NORM,
    "mlp_act": ACTS,
    "sub_norm": RMS_NORMS,
    "ls": _LS,
    "drop_path": PATH,
}
_BRANCHES = {"*": ("Sequential",)}
_BRANCH = {"norm": NORM, "attn": ("Attention",), "mlp": _MLPS, "ls": _LS, "drop_path": PATH}
ANATOMY: Mapping[str, Mapping[str, Sequence[str]]] = {
    **dict.fromkeys(
        ("Block", "EvaBlock", "EvaBlockPostNorm", "ResPostBlock", "RelPosBlock", "ResPostRelPosBlock",
         "DeepseekVitBlock"),
        _BLOCK,
    ),
    **dict.fromkeys(("ParallelScalingBlock", "DiffParallelScalingBlock"), _SCALING),
    "ParallelThingsBlock": dict.fromkeys(("attns", "ffns"), ("ModuleList",)),
    **dict.fromkeys(("ParallelThingsBlock.attns", "ParallelThingsBlock.ffns"), _BRANCHES),
    "Sequential": _BRANCH,
    **dict.fromkeys(_ATTENTIONS, _ATTENTION),
    **dict.fromkeys(_MLPS, _MLP),
    "RelPosMlp": {"mlp": ("Mlp",), "bias_act": ("Sigmoid", "Identity")},
}  # fmt: skip
"""What timm's blocks are made of, as far as they can be run here. Finer points are read from the parts."""

_ACTIVATIONS = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "Swish": "silu"}


class Facts(NamedTuple):
    """What must be the same in every block: fields of ViTConfig by their names."""

    heads: int
    head_dim: int
    mlp_dim: int
    activation: str
    layer_scale: bool
    block: str
    norm: str
    norm_eps: float
    qk_norm: str
    gated_attention: bool
    attention_norm: bool
    mlp_norm: bool
    double_norm: bool
    relative_position: str
    interleaved: bool | None
    """Whether rotary embedding would turn neighbouring channels; None where the attention has none."""
    differential: bool = False
    attention_scale: float = 0.0


def is_a(part: nn.Module, *names: str) -> bool:
    """Whether a part is of one of these classes of timm's."""
    return type(part).__name__ in names and type(part).__module__.startswith("timm.")


def absent(part: nn.Module | None) -> bool:
    """Whether there is nothing, or nothing that acts, in a part's place."""
    return part is None or isinstance(part, nn.Identity)


def norm_of(part: Any, where: str) -> tuple[str, float]:
    """The kind of a norm, as ViTConfig.norm has it, and its eps.

    Raises:
        CheckpointError: for a norm of another kind.
    """
    kind = type(part).__name__
    require(kind in NORM, f"{kind} as norm", where)
    require(part.eps is not None, f"{kind} with eps=None", where)
    return ("rms_norm" if kind in RMS_NORMS else "layer_norm"), float(part.eps)


def one_norm(parts: Mapping[str, Any], where: str) -> tuple[str, float]:
    """The kind and eps that all of some norms have.

    Raises:
        CheckpointError: where they differ, or for a norm of another kind.
    """
    every = [norm_of(part, f"{where}.{path}") for path, part in parts.items()]
    kinds, eps = {kind for kind, _ in every}, {eps for _, eps in every}
    require(len(kinds) == 1, f"norms that differ ({', '.join(sorted(kinds))})", where)
    require(len(eps) == 1, f"LayerNorm eps that differ ({sorted(eps)})", where)
    return kinds.pop(), eps.pop()


def activation(part: nn.Module, where: str) -> str:
    """The activation's name in ViTConfig.

    Raises:
        CheckpointError: for another one.
    """
    kind = type(part).__name__
    if kind == "GELU":
        return "gelu_tanh" if getattr(part, "approximate", "none") == "tanh" else "gelu"
    require(kind in _ACTIVATIONS, f"the activation {kind}", where)
    return _ACTIVATIONS[kind]


def facts_of(block: Any, where: str) -> Facts:
    """What a block of one half after the other does.

    Raises:
        CheckpointError: naming the part that is not known.
    """
    kind = type(block).__name__
    known = kind in ANATOMY and (kind.endswith("Block") or kind == "EvaBlockPostNorm")
    require(known and type(block).__module__.startswith("timm."), f"{kind} (a block of this class)", where)
    post = kind in ("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm")
    attention, mlp = block.attn, block.mlp
    norms = {"norm1": block.norm1, "norm2": block.norm2}
    norms |= {path: part for path, part in _inner_norms(attention, mlp).items() if not absent(part)}
    norm, eps = one_norm(norms, where)
    scales = [_scale_name(block, i) is not None for i in (1, 2)]
    require(scales[0] or not scales[1], "LayerScale in the second half of a block only", where)
    gated, name = mlp_facts(mlp, f"{where}.mlp ({type(mlp).__name__})")
    relative = getattr(attention, "rel_pos", None) is not None or _table(attention) is not None
    return Facts(
        **attention_facts(attention, f"{where}.attn ({type(attention).__name__})", norm),
        mlp_dim=_second(mlp).in_features,
        activation={"silu": "swiglu", "gelu": "geglu"}[name] if gated else name,
        layer_scale=scales[0],
        block="post" if post else "pre",
        norm=norm,
        norm_eps=eps,
        mlp_norm=not absent(getattr(mlp, "norm", None)) and not is_a(mlp, "GeGluMlp"),
        double_norm=not absent(getattr(mlp, "norm", None)) and is_a(mlp, "GeGluMlp"),
        relative_position="blocks" if relative else "",
    )


def _inner_norms(attention: Any, mlp: Any) -> dict[str, Any]:
    names = {f"attn.{name}": getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm")}
    return names | {"mlp.norm": getattr(mlp, "norm", None)}


def _table(attention: Any) -> Tensor | None:
    return getattr(attention, "relative_position_bias_table", None)


def attention_facts(attention: Any, where: str, norm: str) -> dict[str, Any]:
    """What an attention does: fields of `Facts`.

    Raises:
        CheckpointError: naming the part that is not known.
    """
    require(is_a(attention, *_ATTENTIONS), "this attention", where)
    dims = attention.proj.in_features
    require(dims % attention.num_heads == 0, f"{attention.num_heads} heads for {dims} channels", where)
    head_dim = dims // attention.num_heads
    normed = [not absent(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
    require(normed[0] == normed[1], "a norm of q or k only", where)
    differential = is_a(attention, "DiffAttention")
    if differential:
        differential_facts(attention, normed[0], where)
    else:
        require(attention.scale == head_dim**-0.5, f"scale={attention.scale}", where)
    rotates = type(attention).__name__ in ("AttentionRope", "EvaAttention")
    return {
        "heads": attention.num_heads,
        "head_dim": head_dim,
        "qk_norm": norm if normed[0] else "",
        "gated_attention": getattr(attention, "gate", None) is not None,
        "attention_norm": not absent(getattr(attention, "norm", None)),
        "differential": differential,
        "attention_scale": attention.scale if differential else 0.0,
        "interleaved": not getattr(attention, "rotate_half", False) if rotates else None,
    }


def differential_facts(part: Any, normed: bool, where: str) -> None:
    """Check what has differential attention: an attention or a block.

    Raises:
        CheckpointError: for a norm of half heads, another scale or eps.
    """
    require(not normed, "a norm of the halves of q and k", where)
    require(part.scale == part.head_dim**-0.5, f"scale={part.scale}", where)
    eps = part.sub_norm.eps
    require(eps == DIFFERENTIAL_EPS, f"a norm of heads with eps={eps}, not {DIFFERENTIAL_EPS}", where)


def read_differential(source: Source, config: ViTConfig, ours: str, theirs: str, part: Any) -> None:
    """Take lambda, which is computed here, and the norm of heads with the factor after it."""
    kept, half = 1 - part.lambda_init, config.head_dim // 2
    dual = part.lambda_a is not None
    names = ("a", "b") if dual else ("q1", "k1", "q2", "k2")

    def factor(*given: Tensor) -> Tensor:
        first, second = given if dual else ((given[0] * given[1]).sum(), (given[2] * given[3]).sum())
        return (first.exp() - second.exp() + part.lambda_init).view(1)

    source.derive(f"{ours}lambda", (1,), factor, {f"{theirs}lambda_{name}": () if dual else (half,) for name in names})
    norm = {f"{theirs}sub_norm.weight": (config.head_dim,)}
    source.derive(f"{ours}head_norm.weight", (config.head_dim,), lambda weight: weight * kept, norm)


def mlp_facts(mlp: Any, where: str) -> tuple[bool, str]:
    """Whether an MLP is gated, and its activation."""
    require(is_a(mlp, *_MLPS), "this MLP", where)
    require(isinstance(_second(mlp), nn.Linear), f"{type(_second(mlp)).__name__} in the MLP", where)
    gated, name = type(mlp).__name__ != "Mlp", activation(mlp.act, where)
    require(not gated or name in ("silu", "gelu"), f"a gated MLP with {name}", where)
    return gated, name


def _second(mlp: Any) -> Any:
    """The product that ends an MLP."""
    return mlp.w2 if is_a(mlp, "GeGluMlp") else mlp.fc2


def _scale_name(block: Any, half: int) -> str | None:
    """Where a block's LayerScale is; None if it has none."""
    if getattr(block, f"gamma_{half}", None) is not None:
        return f"gamma_{half}"
    return None if absent(getattr(block, f"ls{half}", None)) else f"ls{half}.gamma"


def read_block(source: Source, config: ViTConfig, i: int, block: Any) -> None:
    """Take block i's weights."""
    ours = theirs = f"blocks.{i}."
    for name in ("norm1", "norm2"):
        read_norm(source, f"{ours}{name}", f"{theirs}{name}.", getattr(block, name))
    _read_attention(source, config, ours, f"{theirs}attn.", block.attn)
    _read_mlp(source, config, ours, f"{theirs}mlp.", block.mlp)
    for half in (1, 2) if config.layer_scale else ():
        scale = _scale_name(block, half)
        if scale is None:  # Sapiens2 scales attention only
            source.derive(f"{ours}layer_scale{half}", (config.width,), lambda: torch.ones(config.width), {})
        else:
            source.copy(f"{ours}layer_scale{half}", theirs + scale)


def read_norm(source: Source, ours: str, theirs: str, part: Any) -> None:
    """Take a norm, with or without weight and bias."""
    if getattr(part, "weight", None) is None:
        size = part.normalized_shape[0]
        source.derive(f"{ours}.weight", (size,), lambda: torch.ones(size), {})
        return
    source.copy(f"{ours}.weight", f"{theirs}weight")
    if getattr(part, "bias", None) is not None:
        source.copy(f"{ours}.bias", f"{theirs}bias")


def _read_attention(source: Source, config: ViTConfig, ours: str, theirs: str, attention: Any) -> None:
    width = config.heads * config.head_dim
    if getattr(attention, "qkv", None) is not None:
        source.copy(f"{ours}qkv.weight", f"{theirs}qkv.weight")
        if getattr(attention, "q_bias", None) is not None:
            source.join_biases(f"{ours}qkv.bias", (f"{theirs}q_bias", None, f"{theirs}v_bias"), width)
        elif attention.qkv.bias is not None:
            source.copy(f"{ours}qkv.bias", f"{theirs}qkv.bias")
    else:
        _read_projections(source, config, ours, theirs, attention)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        read_norm(source, f"{ours}{name}", f"{theirs}{name}.", getattr(attention, name))
    if config.differential:
        read_differential(source, config, ours, theirs, attention)
    if config.gated_attention:
        source.dense(f"{ours}gate", f"{theirs}gate.", bias=attention.gate.bias is not None)
    if config.attention_norm:
        read_norm(source, f"{ours}attention_norm", f"{theirs}norm.", attention.norm)
    source.dense(f"{ours}proj", f"{theirs}proj.", bias=attention.proj.bias is not None)


def _read_projections(source: Source, config: ViTConfig, ours: str, theirs: str, attention: Any) -> None:
    """q, k and v apart; key and value heads that serve several query heads are repeated for each."""
    group = attention.num_heads // getattr(attention, "num_kv_heads", attention.num_heads)
    width, rows = config.heads * config.head_dim, config.heads // group * config.head_dim
    names = ("q_proj", "k_proj", "v_proj")
    biased = [getattr(attention, name).bias is not None for name in names]
    if group == 1:
        source.copy(f"{ours}qkv.weight", *(f"{theirs}{name}.weight" for name in names))
        if any(biased):
            given = [f"{theirs}{name}.bias" if has else None for name, has in zip(names, biased, strict=True)]
            source.join_biases(f"{ours}qkv.bias", given, width)
        return

    def repeat(*parts: Tensor) -> Tensor:
        q, *others = parts
        return torch.cat(
            [q, *(t.unflatten(0, (-1, config.head_dim)).repeat_interleave(group, 0).flatten(0, 1) for t in others)]
        )

    shapes = zip(names, (width, rows, rows), strict=True)
    weights = {f"{theirs}{name}.weight": (size, config.width) for name, size in shapes}
    source.derive(f"{ours}qkv.weight", (3 * width, config.width), repeat, weights)
    require(all(biased) or not any(biased), "grouped heads with a bias of q, k or v only", source.what)
    if all(biased):
        biases = {name.replace("weight", "bias"): shape[:1] for name, shape in weights.items()}
        source.derive(f"{ours}qkv.bias", (3 * width,), repeat, biases)


def _read_mlp(source: Source, config: ViTConfig, ours: str, theirs: str, mlp: Any) -> None:
    if type(mlp).__name__ == "GeGluMlp":
        source.dense(f"{ours}fc1", f"{theirs}w0.", f"{theirs}w1.", bias=mlp.w0.bias is not None)
        source.dense(f"{ours}fc2", f"{theirs}w2.", bias=mlp.w2.bias is not None)
        if config.double_norm:
            read_norm(source, f"{ours}norm3", f"{theirs}norm.", mlp.norm)
        return
    if type(mlp).__name__ == "SwiGLU":
        halves = (f"{theirs}fc1_g.", f"{theirs}fc1_x.")
        source.dense(f"{ours}fc1", *halves, bias=mlp.fc1_g.bias is not None)
    else:
        source.dense(f"{ours}fc1", f"{theirs}fc1.", bias=mlp.fc1.bias is not None)
        if getattr(mlp, "gate_last", False):
            source.swap_halves(f"{ours}fc1")
    if config.mlp_norm:
        read_norm(source, f"{ours}mlp_norm", f"{theirs}norm.", mlp.norm)
    source.dense(f"{ours}fc2", f"{theirs}fc2.", bias=mlp.fc2.bias is not None)
