"""Live modules of open_clip: whole models, and their image towers by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vitfast.models.checkpoints import live, open_clip, open_clip_timm, open_clip_towers, timm
from vitfast.models.checkpoints.open_clip_towers import Text, Vision
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError, require

WHOLE, TOWERS = ("CLIP", "CustomTextCLIP", "CoCa"), ("VisionTransformer", "TimmModel")
SUPPORTED = (*WHOLE, *TOWERS)
REFUSED = {"ModifiedResNet": "a ResNet", "HFTextEncoder": "a text model of transformers'"}

_NORM = ("LayerNorm", "LayerNormFp32")
_VISION = {
    "conv1": ("Conv2d",),
    "patch_dropout": ("PatchDropout", "Identity"),
    "ln_pre": (*_NORM, "Identity"),
    "transformer": ("Transformer",),
    "attn_pool": ("AttentionalPooler",),
    "ln_post": _NORM,
}
_TEXT = {
    "transformer": ("Transformer",),
    "token_embedding": ("Embedding",),
    "ln_final": _NORM,
    "text_projection": ("Linear",),
}
_ANATOMY: live.Anatomy = {
    "CLIP": {"visual": TOWERS, **_TEXT},
    **{whole: {"visual": TOWERS, "text": ("TextTransformer",)} for whole in ("CustomTextCLIP", "CoCa")},
    "VisionTransformer": _VISION,
    "TextTransformer": _TEXT,
    "Transformer": {"resblocks": ("ModuleList",)},
    "Transformer.resblocks": {"*": ("ResidualAttentionBlock",)},
    "ResidualAttentionBlock": {
        **dict.fromkeys(("ln_1", "ln_2"), _NORM),
        **dict.fromkeys(("ls_1", "ls_2"), ("LayerScale", "Identity")),
        "attn": ("MultiheadAttention",),
        "mlp": ("Sequential",),
    },
    "ResidualAttentionBlock.mlp": {"c_fc": ("Linear",), "gelu": ("GELU", "QuickGELU"), "c_proj": ("Linear",)},
    "MultiheadAttention": {"out_proj": ("NonDynamicallyQuantizableLinear",)},
    "AttentionalPooler": {"attn": ("MultiheadAttention",), **dict.fromkeys(("ln_q", "ln_k"), _NORM)},
}
"""What open_clip's modules are made of, as far as it can be run here."""


def matches(module: nn.Module) -> bool:
    """Whether this is exactly one of the classes that are known; a subclass may do anything."""
    kind = live.kind_of(module)
    return kind.__module__.startswith("open_clip.") and kind.__name__ in SUPPORTED


def from_module(module: Any) -> Checkpoint:
    """Translate a live model, or an image tower by itself, of any dtype and device.

    Raises:
        CheckpointError: naming the feature that cannot be represented, the part that is not open_clip's own, or the
            tensors that do not fit.
    """
    name = live.kind_of(module).__name__
    whole = name in WHOLE
    visual = module.visual if whole else module
    foreign = [part for part in ("visual", "text") if hasattr(module, part) and _foreign(getattr(module, part))]
    if whole:
        live.unchanged(module, name, ("visual", "text_decoder", *foreign))
        live.composed(module, _ANATOMY, ("torch.nn.", "open_clip."), name, skip=("visual", "text_decoder", *foreign))
    lead = "" if whole else "visual."
    state = {f"{lead}{key}": tensor for key, tensor in module.state_dict().items()}
    texts = _text_facts(module, name) if whole and "text" not in foreign else None
    if live.kind_of(visual).__name__ == "TimmModel":
        return _timm(visual, state, texts, name)
    live.unchanged(visual, f"{name}: visual")
    if live.kind_of(visual).__name__ in REFUSED:
        raise CheckpointError(f"{name}: {REFUSED[live.kind_of(visual).__name__]} as vision tower is not supported")
    live.composed(visual, _ANATOMY, ("torch.nn.", "open_clip."), f"{name}: visual")
    live.patches(visual.conv1, f"{name}: visual.conv1")
    settings = getattr(visual, "preprocess_cfg", None) or {}
    facts = _vision_facts(visual, name)
    return open_clip.from_state(state, name, vision=facts, text=texts, preprocess=settings, where=f"visual of {name}")


def _foreign(part: nn.Module) -> bool:
    """Whether a tower is another library's."""
    return live.kind_of(part).__name__ in ("TimmModel", "HFTextEncoder")


def _timm(visual: Any, state: Mapping[str, Tensor], texts: Text | None, name: str) -> Checkpoint:
    """A model around a tower of timm's."""
    live.unchanged(visual, f"{name}: visual", ("trunk",))
    kind = live.kind_of(visual.trunk).__name__
    if not timm.matches(visual.trunk):
        reason = timm.REFUSED.get(kind, "not a Vision Transformer that is known")
        raise CheckpointError(f"{name}: timm's {kind} as image tower is not supported: {reason}")
    made = open_clip_timm.with_head(timm.from_module(visual.trunk), state, f"{name}: visual")
    if settings := getattr(visual, "preprocess_cfg", None):
        made = replace(made, preprocess=open_clip.read_preprocess(settings, made.config, f"visual of {name}"))
    return replace(made, labels=None, text=open_clip_towers.text(state, texts, name) if texts else None)


def _vision_facts(visual: Any, name: str) -> Vision:
    pool = visual.attn_pool
    require(visual.pool_type in open_clip.POOLS, f"pool_type={visual.pool_type!r}", name)
    heads, facts = _block_facts(visual.transformer, f"{name}: visual")
    norms = [visual.ln_pre, visual.ln_post, *((pool.ln_q, pool.ln_k) if pool is not None else ())]
    _one_eps([norm for norm in norms if not isinstance(norm, nn.Identity)], facts["norm_eps"], f"{name}: visual")
    return Vision(
        **facts,
        head_width=visual.conv1.out_channels // heads,
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        pool=open_clip.POOLS[visual.pool_type],
        norm_after_pool=visual.final_ln_after_pool and pool is None,
        pool_heads=pool.attn.num_heads if pool is not None else 8,
    )


def _text_facts(module: Any, name: str) -> Text | None:
    """Of a whole model; None where texts are pooled in a way that is not known."""
    inside = hasattr(module, "text")
    text = module.text if inside else module
    pool = text.pool_type if inside else text.text_pool_type
    if pool not in open_clip.TEXT_POOLS or getattr(text, "use_pad_mask", False):
        return None
    heads, facts = _block_facts(text.transformer, f"{name}: text")
    _one_eps([text.ln_final], facts["norm_eps"], f"{name}: text")
    eos = text.eos_id if inside else text.text_eos_id
    return Text(
        **facts,
        heads=heads,
        causal=text.attn_mask is not None,
        pool=open_clip.TEXT_POOLS[pool],
        eot=eos if pool == "eos" else None,
        pad=getattr(text, "pad_id", 0),
    )


def _block_facts(transformer: Any, where: str) -> tuple[int, dict[str, Any]]:
    """Heads, and activation and eps, the same in every block."""
    found = set()
    for block in transformer.resblocks:
        act = block.mlp.gelu
        tanh = getattr(act, "approximate", "none") == "tanh"
        kind = "quick_gelu" if type(act).__name__ == "QuickGELU" else "gelu_tanh" if tanh else "gelu"
        found.add((block.attn.num_heads, kind, block.ln_1.eps, block.ln_2.eps))
    require(len(found) == 1, f"differing blocks ({len(found)} kinds)", where)
    heads, kind, eps, other = found.pop()
    require(eps == other, f"LayerNorm eps that differ ({sorted((eps, other))})", where)
    return heads, {"activation": kind, "norm_eps": eps}


def _one_eps(norms: list[Any], eps: float, where: str) -> None:
    differing = sorted({norm.eps for norm in norms} | {eps})
    require(len(differing) == 1, f"LayerNorm eps that differ ({differing})", where)
