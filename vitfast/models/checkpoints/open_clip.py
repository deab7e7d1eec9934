"""OpenAI's CLIP and open_clip: image and text tower, from a state dict, a folder or a live model.

`tokens` are all tokens after `ln_post`; `embedding` is the projected image embedding, not scaled to unit length. A
state dict gives all sizes but a few facts, which the config says or the name: the head width (64), the activation
(quick_gelu in OpenAI's weights), where a norm stands, and how texts are pooled. Towers of timm's are built by timm.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from vitfast.images.preprocess import Preprocess
from vitfast.models import schema
from vitfast.models.checkpoints import files, open_clip_timm, open_clip_towers, state_dicts
from vitfast.models.checkpoints.open_clip_towers import MARKER, Text, Vision
from vitfast.models.checkpoints.preprocess import attempt
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError, read_settings, require
from vitfast.models.config import Flag, ViTConfig

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

POOLS = {"tok": "cls", "avg": "avg"}
TEXT_POOLS = {"argmax": "eot", "eos": "eot", "last": "last", "first": "first"}
"""open_clip's words for pooling -> ours."""

_Object = Annotated[Any, schema.OBJECT]


@dataclass(frozen=True)
class _Block:
    """What both towers' configs say of their blocks."""

    norm_kwargs: _Object = None
    act_kwargs: _Object = None
    block_type: Annotated[str, schema.TEXT] = ""
    qk_norm: Flag = False
    scaled_cosine_attn: Flag = False
    scale_heads: Flag = False
    scale_attn_inner: Flag = False
    scale_attn: Flag = False
    scale_fc: Flag = False

    def facts(self, quick_gelu: bool, where: str) -> dict[str, Any]:
        """Activation and eps.

        Raises:
            CheckpointError: for blocks of another kind.
        """
        custom = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
        for name in custom:
            require(not getattr(self, name), f"{name} in custom blocks", where)
        require(self.block_type in ("", "default"), f"block_type={self.block_type!r}", where)
        norm, act = dict(self.norm_kwargs or {}), dict(self.act_kwargs or {})
        eps, approximate = norm.pop("eps", 1e-5), act.pop("approximate", "none")
        require(not norm and not act, f"norm_kwargs {sorted(norm)}, act_kwargs {sorted(act)}", where)
        require(not quick_gelu or approximate == "none", "an approximate quick_gelu", where)
        plain = "gelu_tanh" if approximate == "tanh" else "gelu"
        return {"activation": "quick_gelu" if quick_gelu else plain, "norm_eps": float(eps)}


@dataclass(frozen=True)
class _Vision(_Block):
    """What is read of `vision_cfg`."""

    head_width: Annotated[int, schema.whole(1, 65_536)] = 64
    timm_model_name: Annotated[str, schema.TEXT] = ""
    attentional_pool: Annotated[Any, schema.Domain("false, or a kind of pooling", lambda v: True)] = False
    attn_pooler_heads: Annotated[int, schema.whole(1, 4_096)] = 8
    global_average_pool: Flag = False
    pool_type: Annotated[str, schema.TEXT] = "tok"
    final_ln_after_pool: Flag = False
    no_ln_pre: Flag = False


@dataclass(frozen=True)
class _Text(_Block):
    """What is read of `text_cfg`."""

    heads: Annotated[int, schema.whole(1, 4_096)] = 8
    no_causal_mask: Flag = False
    pool_type: Annotated[str, schema.TEXT] = "argmax"
    eos_id: Annotated[int, schema.whole(0, 100_000_000)] = 2
    pad_id: Annotated[int, schema.whole(0, 100_000_000)] = 0
    text_arch: Annotated[str, schema.TEXT] = "clip"
    hf_model_name: Annotated[str, schema.TEXT] = ""
    hf_tokenizer_name: Annotated[str, schema.TEXT] = ""
    tokenizer_kwargs: _Object = None


@dataclass(frozen=True)
class _Preprocess:
    """What is read of `preprocess_cfg`."""

    size: Annotated[Any, schema.side_or_sides(1, 65_536)] = None
    mean: Annotated[Any, schema.Domain("a list of numbers", lambda v: isinstance(v, (list, tuple)))] = OPENAI_MEAN
    std: Annotated[Any, schema.Domain("a list of numbers", lambda v: isinstance(v, (list, tuple)))] = OPENAI_STD
    interpolation: Annotated[str, schema.TEXT] = "bicubic"
    resize_mode: Annotated[str, schema.TEXT] = "shortest"
    mode: Annotated[str, schema.TEXT] = "RGB"


def names(name: str) -> bool:
    """Whether this is a CLIP's name: "ViT-B/32" (OpenAI), "ViT-B-32", "ViT-H-14-378-quickgelu" (open_clip)."""
    return re.fullmatch(r"ViT-[A-Za-z]+[-/]\d+.*", name) is not None


def from_directory(
    directory: Path, name: str, *, allow_pickle: bool = False, weights_key: str | None = None
) -> Checkpoint:
    """Read a folder with open_clip_config.json.

    Raises:
        CheckpointError: for settings out of their domain, a tower that is not supported, or tensors that do not fit.
    """
    where = f"{name}/{CONFIG}"
    settings = files.read_json(directory / CONFIG)
    model, preprocess = _object(settings, "model_cfg", where), _object(settings, "preprocess_cfg", where)
    vision, text = (_object(model, key, where, "model_cfg.") for key in ("vision_cfg", "text_cfg"))
    facts = read_settings(_Vision, vision, where, "vision_cfg.")
    paths = files.find_weights(directory, allow_pickle=allow_pickle, names=WEIGHTS)
    state = files.read_weights(paths, allow_pickle=allow_pickle, weights_key=weights_key)
    quick_gelu = bool(model.get("quick_gelu", False))
    texts = _text_facts(text, quick_gelu, where, directory)
    if facts.timm_model_name:
        prepare = functools.partial(read_preprocess, preprocess, where=where)
        return open_clip_timm.from_state(vision, state, texts, name, where, prepare)
    return from_state(
        state, name, vision=_vision_facts(facts, quick_gelu, where), text=texts, preprocess=preprocess, where=where
    )


def _object(settings: Mapping[str, Any], key: str, where: str, prefix: str = "") -> Mapping[str, Any]:
    value = settings.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: {prefix}{key} must be an object, got {schema.shown(value)}")
    return value


def _vision_facts(facts: _Vision, quick_gelu: bool, where: str) -> Vision:
    kind = "avg" if facts.global_average_pool else facts.pool_type
    require(kind in POOLS, f"pool_type={kind!r}", where)
    pooled = facts.attentional_pool in (False, True)
    require(pooled, f"attentional pooling of the kind {facts.attentional_pool!r}", where)
    return Vision(
        **facts.facts(quick_gelu, where),
        head_width=facts.head_width,
        pre_norm=not facts.no_ln_pre,
        pool=POOLS[kind],
        norm_after_pool=facts.final_ln_after_pool and not facts.attentional_pool,
        pool_heads=facts.attn_pooler_heads,
    )


def _text_facts(settings: Mapping[str, Any], quick_gelu: bool, where: str, directory: Path) -> Text | None:
    """What `text_cfg` says; None where the text tower is one of transformers', or of a kind that is not known."""
    facts = read_settings(_Text, settings, where, "text_cfg.")
    if facts.hf_model_name or facts.text_arch != "clip" or facts.pool_type not in TEXT_POOLS:
        return None
    # open_clip cleans texts and pads them in its own way; that of CLIP's tokenizer comes to the same.
    same = facts.pool_type == "argmax" and not (facts.no_causal_mask or facts.hf_tokenizer_name)
    return Text(
        **facts.facts(quick_gelu, where),
        heads=facts.heads,
        causal=not facts.no_causal_mask,
        pool=TEXT_POOLS[facts.pool_type],
        eot=facts.eos_id if facts.pool_type == "eos" else None,
        pad=facts.pad_id,
        tokenizer=directory if same and not facts.tokenizer_kwargs else None,
    )


def from_state(
    state: Mapping[str, Tensor],
    name: str,
    *,
    vision: Vision,
    text: Text | None,
    preprocess: Mapping[str, Any] | None = None,
    where: str = "",
) -> Checkpoint:
    """Translate a whole CLIP's state dict.

    Args:
        vision, text: what the shapes do not say. preprocess: `preprocess_cfg`; OpenAI's without.
        where: of these settings, for messages.

    Raises:
        CheckpointError: for what the forward does not have, or tensors that do not fit.
    """
    state = state_dicts.strip_prefix(state, [MARKER], name)
    config, weights = open_clip_towers.vision(state, vision, name)
    tower = open_clip_towers.text(state, text, name) if text else None
    return Checkpoint(config, weights, read_preprocess(preprocess or {}, config, where or name), text=tower)


def from_name(state: Mapping[str, Tensor], model: str, where: str) -> Checkpoint:
    """Translate the state dict of a CLIP of this name: OpenAI's ("ViT-B/32") or one of open_clip's ("ViT-B-32").

    Raises:
        CheckpointError: as `from_state`.
    """
    activation = "quick_gelu" if "/" in model or "quickgelu" in model else "gelu"
    return from_state(state, where, vision=Vision(activation=activation), text=Text(activation=activation))


def read_preprocess(settings: Mapping[str, Any], config: ViTConfig, where: str) -> Preprocess | None:
    """How images are prepared, by `preprocess_cfg`.

    Raises:
        CheckpointError: for settings out of their domain.
    """
    facts = read_settings(_Preprocess, settings, where, "preprocess_cfg.")
    size = config.image_size

    def make() -> Preprocess:
        if facts.resize_mode not in ("shortest", "squash"):
            raise ValueError(f"resize_mode={facts.resize_mode!r} is not supported")
        return Preprocess(
            size=size,
            resize=size if facts.resize_mode == "squash" else min(size),
            interpolation=facts.interpolation,
            center_crop=facts.resize_mode == "shortest",
            mean=tuple(float(v) for v in facts.mean),
            std=tuple(float(v) for v in facts.std),
            rounding="even",
        )

    return attempt(make, config, where)
