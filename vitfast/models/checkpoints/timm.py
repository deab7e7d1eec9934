"""timm's VisionTransformer and VisionTransformerDistilled: ViT, DeiT, CLIP, DINOv2 and kin.

The module itself is the description: what it does is read from its parts, and a part that is not
known is refused. timm's files carry only an architecture's name, so timm builds the module there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import nn

from vitfast.models import libraries, schema
from vitfast.models.checkpoints import files, live, state_dicts
from vitfast.models.checkpoints.preprocess import TimmSettings, from_timm
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError, Source, read_settings, require
from vitfast.models.config import Channels, Classes, Depth, Heads, ViTConfig, Width
from vitfast.ops.names import did_you_mean

REFUSED = {
    "Eva": "rotary position embedding (RoPE) and EVA blocks",
    "NaFlexVit": "NaFlex (patch sequences of varying resolution)",
    "Beit": "relative position bias",
    "VisionTransformerRelPos": "relative position bias",
    "VisionTransformerSAM": "windowed attention with relative position bias",
}
"""timm classes that are near enough to be tried, with what the forward lacks for them."""

_DROP = ("Dropout", "Identity")
_PATH = ("DropPath", "Identity")
_NORM = ("LayerNorm", "Identity")
_ACTS = ("GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish")
_MLP = {
    **dict.fromkeys(("fc1", "fc1_g", "fc1_x", "fc2"), ("Linear",)),
    **dict.fromkeys(("drop1", "drop2"), _DROP),
    "act": _ACTS,
    "norm": ("Identity",),
}
_WHOLE = {
    "patch_embed": ("PatchEmbed", "PatchEmbedWithSize"),
    "pos_drop": _DROP,
    "patch_drop": ("PatchDropout", "Identity"),
    "norm_pre": _NORM,
    "blocks": ("Sequential",),
    "norm": _NORM,
    "fc_norm": _NORM,
    "head_drop": _DROP,
}
_BLOCKS = {"*": ("Block",)}
_ANATOMY: live.Anatomy = {
    "VisionTransformer": _WHOLE,
    "VisionTransformerDistilled": _WHOLE,
    "PatchEmbed": {"proj": ("Conv2d",), "norm": ("Identity",)},
    "PatchEmbedWithSize": {"proj": ("Conv2d",), "norm": ("Identity",)},
    **dict.fromkeys((f"{whole}.blocks" for whole in ("VisionTransformer", "VisionTransformerDistilled")), _BLOCKS),
    "Block": {
        **dict.fromkeys(("norm1", "norm2"), ("LayerNorm",)),
        **dict.fromkeys(("ls1", "ls2"), ("LayerScale", "Identity")),
        **dict.fromkeys(("drop_path1", "drop_path2"), _PATH),
        "attn": ("Attention",),
        "mlp": ("Mlp", "GluMlp", "SwiGLU"),
    },
    "Attention": {
        **dict.fromkeys(("qkv", "proj"), ("Linear",)),
        **dict.fromkeys(("q_norm", "k_norm", "norm"), ("Identity",)),
        **dict.fromkeys(("attn_drop", "proj_drop"), _DROP),
    },
    **dict.fromkeys(("Mlp", "GluMlp", "SwiGLU"), _MLP),
}
"""What timm's modules are made of, as far as it can be run here. Finer points are read from the parts."""

_ACTIVATIONS = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "Swish": "silu"}
_POOLS = {"token": "cls", "avg": "avg", "": "none"}


_Count = Annotated[int, schema.whole(0, 65_536)]
_Rate = Annotated[float, schema.number(0, 1)]


@dataclass(frozen=True)
class _ModelArgs:
    """What config.json may say of a VisionTransformer's sizes; other arguments are for timm to judge."""

    img_size: Annotated[Any, schema.side_or_sides(1, 65_536)] = None
    patch_size: Annotated[Any, schema.side_or_sides(1, 65_536)] = None
    in_chans: Channels = 3
    num_classes: Classes = 0
    embed_dim: Width = 1
    depth: Depth = 1
    num_heads: Heads = 1
    mlp_ratio: Annotated[float, schema.number(0, 64)] = 4
    init_values: Annotated[float, schema.number(0, 1e6)] = 0
    reg_tokens: _Count = 0
    drop_rate: _Rate = 0
    pos_drop_rate: _Rate = 0
    patch_drop_rate: _Rate = 0
    proj_drop_rate: _Rate = 0
    attn_drop_rate: _Rate = 0
    drop_path_rate: _Rate = 0
    global_pool: Annotated[str, schema.TEXT] = ""


@dataclass(frozen=True)
class _Settings:
    """timm's config.json."""

    architecture: Annotated[str, schema.TEXT] = ""
    num_classes: Annotated[int, schema.whole(-1, 10_000_000)] = 0
    global_pool: Annotated[str, schema.TEXT] = ""
    label_names: Annotated[Any, schema.TEXTS] = ()
    label_descriptions: Annotated[Any, schema.OBJECT] = None
    pretrained_cfg: Annotated[Any, schema.OBJECT] = None
    model_args: Annotated[Any, schema.OBJECT] = None


def _settings(directory: Path, where: str) -> _Settings:
    """config.json, checked.

    Raises:
        CheckpointError: with each field that is out of its domain.
    """
    settings = read_settings(_Settings, content := files.read_json(directory / "config.json"), where)
    if (inside := settings.pretrained_cfg) is None:
        read_settings(TimmSettings, content, where)
    else:
        read_settings(TimmSettings, inside, where, "pretrained_cfg.")
    read_settings(_ModelArgs, settings.model_args or {}, where, "model_args.")
    return settings


def matches(module: nn.Module) -> bool:
    """Whether this is exactly one of timm's two classes; a subclass may do anything."""
    kind = type(module)
    return kind.__module__.startswith("timm.models.") and kind.__name__ in (
        "VisionTransformer",
        "VisionTransformerDistilled",
    )


def from_module(module: Any, where: str | None = None) -> Checkpoint:
    """Translate a live module, of any dtype and device.

    Args:
        where: the file that its `pretrained_cfg` is from, for messages.

    Raises:
        CheckpointError: naming the feature that cannot be represented, the part that is not timm's own, or the
            tensors that do not fit.
    """
    settings = getattr(module, "pretrained_cfg", None) or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{type(module).__name__}: pretrained_cfg must be a dict, got {schema.shown(settings)}")
    named = (settings.get("architecture"), settings.get("tag"))
    name = ".".join(part for part in named if isinstance(part, str) and part) or type(module).__name__
    live.unchanged(module, name)
    config = _config(module, name)
    live.composed(module, _ANATOMY, ("torch.nn.", "timm."), name, skip=("head", "head_dist"))
    source = Source(module.state_dict(), name)
    _read(module, config, source)
    weights = source.finish(config)
    preprocess = from_timm(settings, config, tuple(module.patch_embed.img_size), where or f"pretrained_cfg of {name}")
    return Checkpoint(config, weights, preprocess, _labels(settings, config))


def _labels(settings: Mapping[str, Any], config: ViTConfig) -> tuple[str, ...] | None:
    """The class names in timm's settings, described where they have a description."""
    names = settings.get("label_names")
    if not isinstance(names, (list, tuple)) or len(names) != config.num_classes:
        return None
    described = settings.get("label_descriptions") or {}
    return tuple(str(described.get(name, name)) for name in names)


class _Block(NamedTuple):
    """What must be the same in every block."""

    heads: int
    head_dim: int
    mlp_dim: int
    activation: str
    layer_scale: bool


def _config(module: Any, name: str) -> ViTConfig:
    embed = module.patch_embed
    where = f"{name}: patch_embed ({type(embed).__name__})"
    require(_is(embed, "PatchEmbed", "PatchEmbedWithSize"), "a stem other than PatchEmbed", where)
    live.patches(embed.proj, f"{where}.proj")
    require(_absent(embed.norm), "a norm in the patch embedding (embed_norm_layer)", where)
    require(embed.img_size is not None, "an undefined image size", where)
    require(module.attn_pool is None, f"attention pooling (attn_pool, {type(module.attn_pool).__name__})", name)
    distilled = type(module).__name__ == "VisionTransformerDistilled"
    require(not distilled or module.reg_token is None, "register tokens beside a distillation token", name)
    pool = _POOLS.get(module.global_pool)
    require(pool is not None, f"global_pool={module.global_pool!r}", name)
    assert pool is not None
    head, _ = live.linear_head(module.head, f"{name}: head")
    has_head = head is not None
    if pool == "none":
        require(not has_head and _absent(module.fc_norm), "global_pool='' with a head or fc_norm (per token)", name)
        require(module.cls_token is not None, "global_pool='' without a class token", name)
    if pool == "avg" and getattr(module, "pool_include_prefix", False):
        pool = "avg_all"
    if distilled:
        pool = "cls_dist"

    blocks = {_block(block, f"{name}: blocks.{i}") for i, block in enumerate(module.blocks)}
    require(len(blocks) == 1, f"differing blocks ({len(blocks)} kinds)", f"{name}: blocks")
    block = blocks.pop()
    norms = {"norm_pre": module.norm_pre, "norm": module.norm, "fc_norm": module.fc_norm}
    present = {key: norm for key, norm in norms.items() if not _absent(norm)}
    for i, part in enumerate(module.blocks):
        present |= {f"blocks.{i}.norm1": part.norm1, f"blocks.{i}.norm2": part.norm2}
    for key, norm in present.items():
        require(isinstance(norm, nn.LayerNorm), f"{type(norm).__name__} as norm", f"{name}: {key}")
        require(
            norm.weight is not None and norm.bias is not None, "a LayerNorm without weight or bias", f"{name}: {key}"
        )
    eps = {norm.eps for norm in present.values()}
    require(len(eps) == 1, f"LayerNorm eps that differ ({sorted(eps)})", name)
    patch = embed.proj.kernel_size
    grid = [side // p for side, p in zip(embed.img_size, patch, strict=True)]
    return ViTConfig(
        image_size=(grid[0] * patch[0], grid[1] * patch[1]),
        patch_size=patch,
        width=embed.proj.out_channels,
        depth=len(module.blocks),
        heads=block.heads,
        mlp_dim=block.mlp_dim,
        in_channels=embed.proj.in_channels,
        head_dim=block.head_dim,
        activation=block.activation,
        norm_eps=eps.pop(),
        prefix_tokens=module.num_prefix_tokens,
        class_token=module.cls_token is not None,
        position=module.pos_embed is not None,
        pre_norm="norm_pre" in present,
        layer_scale=block.layer_scale,
        final_norm="norm" in present,
        pool=pool,
        pool_norm="fc_norm" in present,
        distilled=distilled and has_head,
        num_classes=head.out_features if head is not None else 0,
        off_grid="pad" if getattr(embed, "dynamic_img_pad", False) else "refuse",
        dynamic_size=True,  # timm allows it with dynamic_img_size or set_input_size, and defines the resampling
        position_antialias=True,
        name=name,
    )


def _is(part: nn.Module, *names: str) -> bool:
    """Whether a part is of one of these classes of timm's."""
    return type(part).__name__ in names and type(part).__module__.startswith("timm.")


def _absent(part: nn.Module | None) -> bool:
    return part is None or isinstance(part, nn.Identity)


def _block(block: Any, where: str) -> _Block:
    require(_is(block, "Block"), f"{type(block).__name__} (only the pre-norm Block)", where)
    attention, mlp = block.attn, block.mlp
    there = f"{where}.attn ({type(attention).__name__})"
    require(_is(attention, "Attention"), "this attention", there)
    require(_absent(attention.q_norm) and _absent(attention.k_norm), "qk_norm (q_norm, k_norm)", there)
    require(_absent(getattr(attention, "norm", None)), "a norm of the attention output (scale_attn_norm)", there)
    require(getattr(attention, "gate", None) is None, "gated attention (gate)", there)
    require(attention.scale == attention.head_dim**-0.5, f"scale={attention.scale}", there)
    require(_absent(block.ls1) == _absent(block.ls2), "LayerScale in one branch only", where)
    there = f"{where}.mlp ({type(mlp).__name__})"
    require(_is(mlp, "Mlp", "GluMlp", "SwiGLU"), "this MLP", there)
    require(_absent(getattr(mlp, "norm", None)), "a norm inside the MLP (scale_mlp_norm)", there)
    require(isinstance(mlp.fc2, nn.Linear), f"{type(mlp.fc2).__name__} in the MLP", there)
    activation = _activation(mlp.act, there)
    if type(mlp).__name__ != "Mlp":
        require(activation == "silu", f"a gated MLP with {activation}", there)
        activation = "swiglu"
    return _Block(attention.num_heads, attention.head_dim, mlp.fc2.in_features, activation, not _absent(block.ls1))


def _activation(part: nn.Module, where: str) -> str:
    kind = type(part).__name__
    if kind == "GELU":
        return "gelu_tanh" if getattr(part, "approximate", "none") == "tanh" else "gelu"
    require(kind in _ACTIVATIONS, f"the activation {kind}", where)
    return _ACTIVATIONS[kind]


def _read(module: Any, config: ViTConfig, source: Source) -> None:
    source.dense("patch_embed", "patch_embed.proj.", bias=module.patch_embed.proj.bias is not None)
    tokens = [key for key in ("cls_token", "dist_token", "reg_token") if getattr(module, key, None) is not None]
    covered = 0 if module.no_embed_class or not config.position else config.prefix_tokens
    source.tokens(config, tokens, "pos_embed" if config.position else None, covered)
    for i, block in enumerate(module.blocks):
        ours = theirs = f"blocks.{i}."
        source.norm(f"{ours}norm1", f"{theirs}norm1.")
        source.dense(f"{ours}qkv", f"{theirs}attn.qkv.", bias=block.attn.qkv.bias is not None)
        source.dense(f"{ours}proj", f"{theirs}attn.proj.", bias=block.attn.proj.bias is not None)
        source.norm(f"{ours}norm2", f"{theirs}norm2.")
        if type(block.mlp).__name__ == "SwiGLU":
            halves = (f"{theirs}mlp.fc1_g.", f"{theirs}mlp.fc1_x.")
            source.dense(f"{ours}fc1", *halves, bias=block.mlp.fc1_g.bias is not None)
        else:
            source.dense(f"{ours}fc1", f"{theirs}mlp.fc1.", bias=block.mlp.fc1.bias is not None)
            if getattr(block.mlp, "gate_last", False):
                source.swap_halves(f"{ours}fc1")
        source.dense(f"{ours}fc2", f"{theirs}mlp.fc2.", bias=block.mlp.fc2.bias is not None)
        if config.layer_scale:
            source.copy(f"{ours}layer_scale1", f"{theirs}ls1.gamma")
            source.copy(f"{ours}layer_scale2", f"{theirs}ls2.gamma")
    for present, ours, theirs in (
        (config.pre_norm, "norm_pre", "norm_pre."),
        (config.final_norm, "norm", "norm."),
        (config.pool_norm, "pool_norm", "fc_norm."),
    ):
        if present:
            source.norm(ours, theirs)
    if config.num_classes:
        for ours in ("head", "head_dist") if config.distilled else ("head",):
            linear, inner = live.linear_head(getattr(module, ours), f"{source.what}: {ours}")
            require(linear is not None, f"no {ours} beside a head", source.what)
            assert linear is not None
            source.dense(ours, f"{ours}.{inner}", bias=linear.bias is not None)


def build(
    directory: Path, weights: Sequence[Path], *, name: str, allow_pickle: bool, weights_key: str | None
) -> nn.Module:
    """Let timm build and fill the module that a directory's config.json names, as `create_model` does.

    Raises:
        CheckpointError: if timm is not installed, does not know the architecture, config.json asks for what no model
            has or is far larger than the weights, or the weights do not fit it.
    """
    where = f"{name}/config.json"
    settings = _settings(directory, where)
    timm = _timm(f"{name}, whose config.json names a timm architecture,")
    state = files.read_weights(weights, allow_pickle=allow_pickle, weights_key=weights_key)
    state = dict(state_dicts.strip_prefix(state, ["patch_embed.proj.weight"], name))
    _no_larger_than(timm, settings, sum(tensor.numel() for tensor in state.values()), where)
    # No classifier: timm would leave out a head of another size, and go on with a random one.
    overlay: dict[str, Any] = {"source": "", "state_dict": state, "custom_load": False, "classifier": None}
    try:
        return timm.create_model(f"local-dir:{directory}", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    except Exception as error:  # timm asserts, and raises RuntimeError, TypeError and what its readers raise
        raise CheckpointError(f"{_cannot(settings, name, where)}: {type(error).__name__}: {error}") from error


def _no_larger_than(timm: Any, settings: _Settings, elements: int, where: str) -> None:
    """Refuse a config whose model is far larger than the weights beside it, before any memory is taken for it."""
    try:
        with torch.device("meta"):
            empty = timm.create_model(settings.architecture, pretrained=False, **(settings.model_args or {}))
    except Exception as error:  # as above
        raise CheckpointError(f"{_cannot(settings, where, where)}: {type(error).__name__}: {error}") from error
    wanted = sum(parameter.numel() for parameter in empty.parameters())
    if wanted > 2 * elements:
        raise CheckpointError(
            f"{where} describes a model of {wanted:,} weights and the files hold {elements:,}: architecture="
            f"{settings.architecture!r}, model_args={schema.shown(settings.model_args)}"
        )


def _cannot(settings: _Settings, name: str, where: str) -> str:
    return (
        f"timm cannot load {name} ({where} says architecture={schema.shown(settings.architecture)}, "
        f"model_args={schema.shown(settings.model_args)})"
    )


def hub_id(name: str) -> str:
    """The hub id under which timm keeps the default (or the tagged) weights of one of its models.

    Raises:
        CheckpointError: if timm is not installed, or has no such model or no such weights.
    """
    timm = _timm(f"{name!r}, which is no file, directory or hub id (org/name), as a timm model name")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models())
        raise CheckpointError(f"{name!r} is no file, directory or hub id (org/name), and timm has no such model{near}")
    try:
        settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise CheckpointError(f"timm has no weights called {name!r}: {error}") from error
    if not settings.hf_hub_id:
        raise CheckpointError(f"timm has no weights on the Hugging Face hub for {name!r}")
    return settings.hf_hub_id


def _timm(what: str) -> Any:
    try:
        return libraries.import_library("timm")
    except ImportError as error:
        raise CheckpointError(f"loading {what} needs timm, which cannot be imported: {error}") from error
