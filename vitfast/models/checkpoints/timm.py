"""timm's VisionTransformer and VisionTransformerDistilled: ViT, DeiT, CLIP, DINOv2 and kin.

The module itself is the description: what it does is read from its parts, and a part that is not
known is refused. timm's files carry only an architecture's name, so timm builds the module there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vitfast.images.preprocess import Preprocess
from vitfast.models.checkpoints import files
from vitfast.models.checkpoints.preprocess import from_timm
from vitfast.models.checkpoints.source import CheckpointError, Source, require
from vitfast.models.config import ViTConfig

REFUSED = {
    "Eva": "rotary position embedding (RoPE) and EVA blocks",
    "NaFlexVit": "NaFlex (patch sequences of varying resolution)",
    "Beit": "relative position bias",
    "VisionTransformerRelPos": "relative position bias",
    "VisionTransformerSAM": "windowed attention with relative position bias",
}
"""timm classes that are near enough to be tried, with what the forward lacks for them."""

_ACTIVATIONS = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "Swish": "silu"}
_POOLS = {"token": "cls", "avg": "avg", "": "none"}


def matches(module: nn.Module) -> bool:
    """Whether this is exactly one of timm's two classes; a subclass may do anything."""
    kind = type(module)
    return kind.__module__.startswith("timm.models.") and kind.__name__ in (
        "VisionTransformer",
        "VisionTransformerDistilled",
    )


def from_module(
    module: Any,
) -> tuple[ViTConfig, Mapping[str, Any], Preprocess | None, tuple[str, ...] | None]:
    """Translate a live module, of any dtype and device.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    settings = getattr(module, "pretrained_cfg", None) or {}
    name = ".".join(filter(None, (settings.get("architecture"), settings.get("tag")))) or type(module).__name__
    config = _config(module, name)
    source = Source(module.state_dict(), name)
    _read(module, config, source)
    weights = source.finish(config)
    return config, weights, from_timm(settings, config, name), _labels(settings, config)


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
    require(type(embed).__name__ in ("PatchEmbed", "PatchEmbedWithSize"), "a stem other than PatchEmbed", where)
    require(isinstance(embed.proj, nn.Conv2d), f"{type(embed.proj).__name__} as patch projection", where)
    require(_absent(embed.norm), "a norm in the patch embedding (embed_norm_layer)", where)
    require(embed.img_size is not None, "an undefined image size", where)
    require(module.attn_pool is None, f"attention pooling (attn_pool, {type(module.attn_pool).__name__})", name)
    distilled = type(module).__name__ == "VisionTransformerDistilled"
    require(not distilled or module.reg_token is None, "register tokens beside a distillation token", name)
    pool = _POOLS.get(module.global_pool)
    require(pool is not None, f"global_pool={module.global_pool!r}", name)
    assert pool is not None
    has_head = not _absent(module.head)
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
    return ViTConfig(
        image_size=tuple(embed.img_size),
        patch_size=tuple(embed.patch_size),
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
        num_classes=module.head.out_features if has_head else 0,
        dynamic_size=True,  # timm allows it with dynamic_img_size or set_input_size, and defines the resampling
        position_antialias=True,
        name=name,
    )


def _absent(part: nn.Module | None) -> bool:
    return part is None or isinstance(part, nn.Identity)


def _block(block: Any, where: str) -> _Block:
    kind = type(block).__name__
    require(kind == "Block", f"{kind} (only the pre-norm Block)", where)
    attention, mlp = block.attn, block.mlp
    there = f"{where}.attn ({type(attention).__name__})"
    require(type(attention).__name__ == "Attention", "this attention", there)
    require(_absent(attention.q_norm) and _absent(attention.k_norm), "qk_norm (q_norm, k_norm)", there)
    require(_absent(getattr(attention, "norm", None)), "a norm of the attention output (scale_attn_norm)", there)
    require(getattr(attention, "gate", None) is None, "gated attention (gate)", there)
    require(attention.scale == attention.head_dim**-0.5, f"scale={attention.scale}", there)
    require(_absent(block.ls1) == _absent(block.ls2), "LayerScale in one branch only", where)
    there = f"{where}.mlp ({type(mlp).__name__})"
    require(type(mlp).__name__ in ("Mlp", "GluMlp", "SwiGLU"), "this MLP", there)
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
        source.dense("head", "head.", bias=module.head.bias is not None)
        if config.distilled:
            source.dense("head_dist", "head_dist.", bias=module.head_dist.bias is not None)


def build(directory: Path, weights: Sequence[Path], *, name: str, allow_pickle: bool) -> nn.Module:
    """Let timm build and fill the module that a directory's config.json names, as `create_model` does.

    Raises:
        CheckpointError: if timm is not installed, does not know the architecture, or the weights do not fit it.
    """
    timm = _timm(f"{name}, whose config.json names a timm architecture,")
    if len(weights) == 1 and weights[0].suffix == ".safetensors":
        overlay: dict[str, Any] = {"source": "", "file": str(weights[0])}
    else:
        overlay = {"source": "", "state_dict": files.read_weights(weights, allow_pickle=allow_pickle)}
    try:
        return timm.create_model(f"local-dir:{directory}", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    except Exception as error:  # timm asserts, and raises RuntimeError, TypeError and what its readers raise
        raise CheckpointError(f"timm cannot load {name}: {type(error).__name__}: {error}") from error


def hub_id(name: str) -> str:
    """The hub id under which timm keeps the default (or the tagged) weights of one of its models.

    Raises:
        CheckpointError: if timm is not installed, or has no such model or no such weights.
    """
    timm = _timm(f"{name!r}, which is no file, directory or hub id (org/name), as a timm model name")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise CheckpointError(f"{name!r} is no file, directory or hub id (org/name), and timm has no such model")
    try:
        settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise CheckpointError(f"timm has no weights called {name!r}: {error}") from error
    if not settings.hf_hub_id:
        raise CheckpointError(f"timm has no weights on the Hugging Face hub for {name!r}")
    return settings.hf_hub_id


def _timm(what: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise CheckpointError(f"loading {what} needs timm, which cannot be imported: {error}") from error
    return timm
