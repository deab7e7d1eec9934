"""timm's Vision Transformers: ViT, DeiT, CLIP, DINOv2 and v3, EVA, PE, SigLIP, AIMv2, BEiT and kin.

The module itself is the description: what it does is read from its parts, and a part that is not known is refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitfast.models.checkpoints import live, timm_blocks, timm_parallel, timm_rope, timm_stem
from vitfast.models.checkpoints.source import Checkpoint, Source, require
from vitfast.models.checkpoints.timm_blocks import DROP, NORM, Facts, absent, is_a, norm_of, read_norm
from vitfast.models.config import ViTConfig

PLAIN = ("VisionTransformer", "VisionTransformerDistilled")
"""Classes whose blocks are given tokens and nothing else."""
SUPPORTED = (*PLAIN, "Eva", "Beit", "VisionTransformerRelPos", "NaFlexVit")
REFUSED = {
    "Hiera": "pooling of queries between stages (a hierarchical model)",
    "HieraDet": "pooling of queries between stages (a hierarchical model)",
}
"""timm classes that are near enough to be tried, with what the forward lacks for them."""

_WHOLE = {
    "patch_embed": ("PatchEmbed", "PatchEmbedWithSize", *timm_stem.KINDS),
    "pos_drop": DROP,
    "patch_drop": ("PatchDropout", "PatchDropoutWithIndices", "Identity"),
    "norm_pre": (*NORM, "Identity"),
    "embeds": ("NaFlexEmbeds",),
    "rope": timm_rope.KINDS,
    **dict.fromkeys(("rel_pos_bias", "shared_rel_pos"), ("RelativePositionBias", "RelPosBias", "RelPosMlp")),
    "blocks": ("Sequential", "ModuleList"),
    "norm": (*NORM, "Identity"),
    "attn_pool": ("AttentionPoolLatent",),
    "fc_norm": (*NORM, "Identity"),
    "head_drop": DROP,
}
_BLOCKS = {"*": tuple(name for name in timm_blocks.ANATOMY if "Block" in name and "." not in name)}
_PATCHES = {"proj": ("Conv2d",), "norm": (*NORM, "Identity")}
_NAFLEX = {
    "proj": ("Conv2d", "Linear"),
    "norm": (*NORM, "Identity"),
    "pos_drop": DROP,
    "patch_interpolator": ("PatchEmbedInterpolator",),
}
_ANATOMY: live.Anatomy = {
    **dict.fromkeys(SUPPORTED, _WHOLE),
    **dict.fromkeys((f"{whole}.blocks" for whole in SUPPORTED), _BLOCKS),
    **dict.fromkeys(("PatchEmbed", "PatchEmbedWithSize"), _PATCHES),
    "NaFlexEmbeds": _NAFLEX,
    **timm_blocks.ANATOMY,
    "AttentionPoolLatent": {
        **dict.fromkeys(("q", "kv", "proj"), ("Linear", "Identity")),
        **dict.fromkeys(("q_norm", "k_norm", "norm"), (*NORM, "Identity")),
        "proj_drop": DROP,
        "mlp": ("Mlp",),
    },
}
"""What timm's modules are made of, as far as it can be run here. Finer points are read from the parts."""

_SCALING = ("ParallelScalingBlock", "DiffParallelScalingBlock")
_POOLS = {"token": "cls", "avg": "avg", "avgmax": "avg_max", "max": "max", "": "none"}


def translate(module: Any, name: str) -> Checkpoint:
    """Config, weights and stem of a module of one of the `SUPPORTED` classes.

    Raises:
        CheckpointError: naming the feature that cannot be represented, the part that is not timm's own, or the
            tensors that do not fit.
    """
    config = config_of(module, name)
    skip = ("head", "head_dist", *(("patch_embed",) if config.stem else ()))
    live.composed(module, _ANATOMY, ("torch.nn.", "timm."), name, skip=skip)
    state = module.state_dict()
    if config.stem:
        state = {key: t for key, t in state.items() if not key.startswith("patch_embed.")}
    source = Source(state, name)
    _read(module, config, source)
    return Checkpoint(config, source.finish(config), stem=timm_stem.stem(module) if config.stem else None)


def config_of(module: Any, name: str) -> ViTConfig:
    """The architecture of a module of one of the `SUPPORTED` classes.

    Raises:
        CheckpointError: naming the feature that cannot be represented.
    """
    naflex = is_a(module, "NaFlexVit")
    embed = module.embeds if naflex else module.patch_embed
    where = f"{name}: {'embeds' if naflex else 'patch_embed'} ({type(embed).__name__})"
    patched = is_a(embed, "PatchEmbed", "PatchEmbedWithSize", "NaFlexEmbeds")
    if naflex:
        facts = timm_stem.naflex_facts(embed, where)
    elif patched:
        live.patches(embed.proj, f"{where}.proj")
        facts = timm_stem.patch_facts(embed)
    else:
        facts = timm_stem.stem_facts(embed, where)
    require(naflex or embed.img_size is not None, "an undefined image size", where)
    distilled = type(module).__name__ == "VisionTransformerDistilled"
    registers = getattr(module, "reg_token", None) is not None
    require(not distilled or not registers, "register tokens beside a distillation token", name)
    head, _ = live.linear_head(module.head, f"{name}: head")
    pool = _pool(module, name, distilled, has_head=head is not None)
    every = {_facts_of(block, f"{name}: blocks.{i}") for i, block in enumerate(module.blocks)}
    require(len(every) == 1, f"differing blocks ({len(every)} kinds)", f"{name}: blocks")
    block: Facts = every.pop()
    norms = {"norm_pre": getattr(module, "norm_pre", None), "norm": module.norm, "fc_norm": module.fc_norm}
    norms |= {"patch_embed.norm": embed.norm} if patched else {}
    norms = {key: norm for key, norm in norms.items() if not absent(norm)}
    for key, norm in norms.items():
        found = norm_of(norm, f"{name}: {key}")
        require(found[0] == block.norm, f"{type(norm).__name__} beside other norms in the blocks", f"{name}: {key}")
        require(found[1] == block.norm_eps, f"LayerNorm eps that differ ({sorted((found[1], block.norm_eps))})", name)
    relative = block.relative_position
    if getattr(module, "rel_pos_bias", None) is not None or getattr(module, "shared_rel_pos", None) is not None:
        require(not relative, "relative position both shared and in each block", name)
        relative = "shared"
    rope = getattr(module, "rope", None)
    turned = timm_rope.facts(rope, f"{name}: rope") if rope is not None else {}
    if rope is not None:
        kept = block.interleaved == turned["rope_interleaved"]
        require(kept, "rotary embedding in one layout, rotation in the other", f"{name}: rope")
    own = {key: value for key, value in block._asdict().items() if key not in ("interleaved", "relative_position")}
    return ViTConfig(
        **facts,
        **own,
        **turned,
        **pool,
        depth=len(module.blocks),
        prefix_tokens=module.num_prefix_tokens,
        class_token=(embed if naflex else module).cls_token is not None,
        position=any(getattr(embed if naflex else module, n, None) is not None for n in ("pos_embed", "pos_embed_y")),
        embed_norm="patch_embed.norm" in norms,
        relative_position=relative,
        pre_norm="norm_pre" in norms,
        final_norm="norm" in norms,
        pool_norm="fc_norm" in norms,
        distilled=distilled and head is not None,
        num_classes=head.out_features if head is not None else 0,
        off_grid="pad" if getattr(embed, "dynamic_img_pad", False) else "refuse",
        # timm allows it with dynamic_img_size or set_input_size, and defines the resampling; not of a stem's patches.
        dynamic_size=patched and not relative,
        name=name,
    )


def _facts_of(block: Any, where: str) -> Facts:
    if is_a(block, *_SCALING):
        return timm_parallel.scaling_facts(block, where)
    if is_a(block, "ParallelThingsBlock"):
        return timm_parallel.things_facts(block, where)
    return timm_blocks.facts_of(block, where)


def _pool(module: Any, name: str, distilled: bool, *, has_head: bool) -> dict[str, Any]:
    """The fields of ViTConfig about pooling."""
    pooling = getattr(module, "attn_pool", None)
    prefix = getattr(module, "pool_include_prefix", False)
    if distilled:
        return {"pool": "cls_dist"}
    if pooling is not None:
        prefix = prefix or type(module).__name__ == "Eva"  # which pools all tokens
        return {"pool": "map_all" if prefix else "map", **_pool_facts(pooling, f"{name}: attn_pool")}
    pool = _POOLS.get(module.global_pool)
    require(pool is not None, f"global_pool={module.global_pool!r}", name)
    assert pool is not None
    if pool == "none":
        require(not has_head and absent(module.fc_norm), "global_pool='' with a head or fc_norm (per token)", name)
    require(pool in ("cls", "none", "avg") or not prefix, f"global_pool={module.global_pool!r} of all tokens", name)
    return {"pool": "avg_all" if pool == "avg" and prefix else pool}


def _pool_facts(pool: Any, where: str) -> dict[str, Any]:
    require(is_a(pool, "AttentionPoolLatent"), f"pooling by {type(pool).__name__}", where)
    require(pool.latent_len == 1, f"{pool.latent_len} queries", where)
    require(pool.pos_embed is None, "a position embedding of its own", where)
    require(pool.mlp is not None and isinstance(pool.proj, nn.Linear), "no projection (out_features=0)", where)
    width = pool.kv.in_features
    require(pool.proj.out_features == width, f"{pool.proj.out_features} features of {width}", where)
    require(absent(pool.mlp.norm), "a norm inside the MLP", where)
    require(absent(pool.q_norm) == absent(pool.k_norm), "a norm of q or k only", where)
    return {
        "pool_heads": pool.num_heads,
        "pool_qk_norm": "" if absent(pool.k_norm) else norm_of(pool.k_norm, where)[0],
        "pool_mlp_dim": pool.mlp.fc1.out_features,
        "pool_activation": timm_blocks.activation(pool.mlp.act, where),
    }


def _read(module: Any, config: ViTConfig, source: Source) -> None:
    naflex = is_a(module, "NaFlexVit")
    embed = module.embeds if naflex else module.patch_embed
    if naflex:
        timm_stem.read_naflex(source, config, embed)
    elif not config.stem:
        source.dense("patch_embed", "patch_embed.proj.", bias=module.patch_embed.proj.bias is not None)
    if config.embed_norm:
        read_norm(source, "embed_norm", f"{'embeds' if naflex else 'patch_embed'}.norm.", embed.norm)
    tokens = [key for key in ("cls_token", "dist_token", "reg_token") if getattr(module, key, None) is not None]
    covered = 0 if getattr(module, "no_embed_class", False) or not config.position else config.prefix_tokens
    if not naflex:
        source.tokens(config, tokens, "pos_embed" if config.position else None, covered)
    if config.rope:
        timm_rope.read(source, config, module.rope, f"{source.what}: rope")
    if config.relative_position:
        timm_rope.read_relative(source, config, module)
    for i, block in enumerate(module.blocks):
        if is_a(block, *_SCALING):
            timm_parallel.read_scaling(source, config, f"blocks.{i}.", block)
        elif is_a(block, "ParallelThingsBlock"):
            timm_parallel.read_things(source, config, f"blocks.{i}.", block)
        else:
            timm_blocks.read_block(source, config, i, block)
    for present, ours, theirs in (
        (config.pre_norm, "norm_pre", "norm_pre"),
        (config.final_norm, "norm", "norm"),
        (config.pool_norm, "pool_norm", "fc_norm"),
    ):
        if present:
            read_norm(source, ours, f"{theirs}.", getattr(module, theirs))
    if config.attention_pool:
        _read_pool(module.attn_pool, config, source)
    if config.num_classes:
        for ours in ("head", "head_dist") if config.distilled else ("head",):
            linear, inner = live.linear_head(getattr(module, ours), f"{source.what}: {ours}")
            require(linear is not None, f"no {ours} beside a head", source.what)
            assert linear is not None
            source.dense(ours, f"{ours}.{inner}", bias=linear.bias is not None)


def _read_pool(pool: Any, config: ViTConfig, source: Source) -> None:
    """Attention pooling; its query is the same for every image, and computed here."""
    width, theirs = config.width, "attn_pool."
    names: dict[str, tuple[int, ...]] = {f"{theirs}latent": (1, 1, pool.latent_dim)}
    projected, biased = isinstance(pool.q, nn.Linear), getattr(pool.q, "bias", None) is not None
    names |= {f"{theirs}q.weight": (width, pool.latent_dim)} if projected else {}
    names |= {f"{theirs}q.bias": (width,)} if biased else {}
    normed = [f"{theirs}q_norm.{key}" for key, t in pool.q_norm.named_parameters()]
    names |= dict.fromkeys(normed, (width // config.pool_heads,))

    def query(latent: Tensor, *given: Tensor) -> Tensor:
        have = dict(zip(list(names)[1:], given, strict=True))
        q = latent.flatten()
        q = have[f"{theirs}q.weight"] @ q if projected else q
        q = q + have[f"{theirs}q.bias"] if biased else q
        if not config.pool_qk_norm:
            return q
        heads = q.view(config.pool_heads, -1)
        weight, bias = (have.get(f"{theirs}q_norm.{key}") for key in ("weight", "bias"))
        norm = nn.functional.rms_norm if config.pool_qk_norm == "rms_norm" else nn.functional.layer_norm
        heads = norm(heads, heads.shape[-1:], weight, eps=pool.q_norm.eps)
        return (heads if bias is None else heads + bias).flatten()

    source.derive("pool.query", (width,), query, names)
    source.dense("pool.kv", f"{theirs}kv.", bias=pool.kv.bias is not None)
    if config.pool_qk_norm:
        read_norm(source, "pool.k_norm", f"{theirs}k_norm.", pool.k_norm)
    source.dense("pool.proj", f"{theirs}proj.", bias=pool.proj.bias is not None)
    eps = {norm.eps for norm in (pool.q_norm, pool.k_norm, pool.norm) if not absent(norm)}
    require(eps <= {config.norm_eps}, f"LayerNorm eps that differ ({sorted(eps)})", f"{source.what}: attn_pool")
    if not absent(pool.norm):
        require(norm_of(pool.norm, source.what)[0] == config.norm, "another norm", f"{source.what}: attn_pool.norm")
        read_norm(source, "pool.norm", f"{theirs}norm.", pool.norm)
    source.dense("pool.fc1", f"{theirs}mlp.fc1.", bias=pool.mlp.fc1.bias is not None)
    source.dense("pool.fc2", f"{theirs}mlp.fc2.", bias=pool.mlp.fc2.bias is not None)
