"""Architectures beyond the plain pre-norm block: in Triton, natively on the CPU, their launches, and in 8 bits."""

import dataclasses

import pytest
import torch
from helpers.engines import SMALL, engine
from helpers.forwards import check
from helpers.grids import thinned

from vitfast import testing
from vitfast.diagnostics import launches
from vitfast.diagnostics.chips import CHIPS
from vitfast.engine.engine import Engine
from vitfast.models.config import ViTConfig

FIVE = ["qkv", "attention", "proj", "fc1", "fc2"]
NORMED = ["layer_norm", "qkv", "attention", "proj", "layer_norm", "fc1", "fc2"]
MAP = {"class_token": False, "prefix_tokens": 0, "pool": "map", "pool_heads": 2, "pool_mlp_dim": 96}
WINDOWS = {"window": 2, "global_blocks": (1,), "patch_size": (8, 8), "image_size": (24, 40), "prefix_tokens": 0,
           "class_token": False, "pool": "avg"}  # fmt: skip
ARCHITECTURES = {
    "DINOv3": ({"rope": "centered", "position": False, "layer_scale": True, "prefix_tokens": 5}, FIVE),
    "SigLIP": (MAP | {"activation": "gelu_tanh"}, FIVE),
    "BEiT": ({"relative_position": "blocks", "position": False, "layer_scale": True, "pool": "avg"}, FIVE),
    "shared relative position": ({"relative_position": "shared", "prefix_tokens": 0, "class_token": False,
                                  "pool": "avg_max"}, FIVE),
    "EVA-02": ({"rope": "index", "rope_interleaved": True, "rope_reference": (4, 4), "activation": "swiglu",
                "mlp_norm": True, "attention_norm": True, "pool": "avg"},
               ["qkv", "attention", "layer_norm", "proj", "fc1", "layer_norm", "fc2"]),
    "learned rotary": ({"rope": "index", "rope_learned": True, "rope_interleaved": True, "qk_norm": "layer_norm"},
                       FIVE),
    "AIMv2": (MAP | {"norm": "rms_norm", "embed_norm": True, "activation": "swiglu", "pool_mlp_dim": 0}, FIVE),
    "RMSNorm of q and k": ({"norm": "rms_norm", "qk_norm": "rms_norm", "rope": "span", "attention_scale": 0.3}, FIVE),
    "norms at the end": ({"block": "post"}, ["qkv", "attention", "proj", "layer_norm", "fc1", "fc2", "layer_norm"]),
    "halves in parallel": ({"block": "parallel", "layer_scale": True, "qk_norm": "layer_norm"}, FIVE),
    "a gate": ({"gated_attention": True}, NORMED),
    "ViTamin": ({"double_norm": True, "activation": "geglu"},
                ["layer_norm", "qkv", "attention", "proj", "layer_norm", "layer_norm", "fc1", "fc2"]),
    "SAM": (WINDOWS | {"relative_position": "decomposed"}, FIVE),
    "windows": (WINDOWS, FIVE),
    "Gemma 4": ({"block": "sandwich", "norm": "rms_norm", "qk_norm": "rms_norm", "v_norm": True,
                 "activation": "geglu_tanh", "position": False, "position_sides": (5, 4), "attention_scale": 1.0},
                FIVE),
    "differential attention": ({"differential": True, "attention_scale": 0.25},
                               ["qkv", "attention", "attention", "proj", "fc1", "fc2"]),
}  # fmt: skip
"""Architecture -> what its config changes of SMALL, and the launches of a block on Triton."""
DTYPES = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.full) for dtype in (torch.bfloat16, torch.float16))]
TORCH_NORMS = {"AIMv2": 2, "RMSNorm of q and k": 2, "Gemma 4": 4}
"""Norms a block that are predicted as LayerNorm, and run in torch."""


def config_of(name: str) -> ViTConfig:
    return dataclasses.replace(SMALL, **ARCHITECTURES[name][0])


@pytest.mark.parametrize("name", thinned(ARCHITECTURES))
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(d, marks=pytest.mark.full) for d in (torch.bfloat16, torch.float16))],
    ids=str,
)
def test_triton(name, dtype):
    check(config_of(name), testing.make(2, 3, *config_of(name).image_size), dtype, "triton")


@pytest.mark.parametrize("name", thinned(ARCHITECTURES, 3))
@pytest.mark.skipif(torch.device(testing.device()).type != "cpu", reason="the plan that a CPU chooses")
def test_the_plan_that_is_chosen_on_a_cpu(name):
    check(config_of(name), testing.make(2, 3, *config_of(name).image_size), torch.float32, "auto")


@pytest.mark.parametrize("name", thinned([*ARCHITECTURES][1:] + [*ARCHITECTURES][:1]))
def test_launches_of_a_block_are_those_that_are_predicted(name):
    config, (_, block) = config_of(name), ARCHITECTURES[name]
    made, seen = engine(config, backend="triton", dtype="fp32"), []

    def counted(site, call):
        return lambda *args, **kwargs: (seen.append(site), call(*args, **kwargs))[1]

    calls = {site: counted(site, getattr(made.plan, site)) for site in made.plan.backends}
    made.runner.plan = dataclasses.replace(made.plan, **calls | {"mlp": None})
    made.run(testing.make(1, 3, *config.image_size))
    start = ["patch_embed", *(["row_stats"] if made.plan.fold_norm else [])]
    end = ["layer_norm", *(["layer_norm"] if config.pool_mlp_dim else []), "head"]  # of pooling's own network
    assert seen == [*start, *block * config.depth, *end] or name in TORCH_NORMS
    rows = launches.launches(config, 1, CHIPS["h100"], torch.bfloat16)
    predicted = [row.op for row in rows for _ in range(row.count // config.depth)]
    ops = {"qkv": "linear", "proj": "linear", "fc1": "linear", "fc2": "linear"}
    norms = ["layer_norm"] * TORCH_NORMS.get(name, 0)
    assert sorted(op for op in predicted if op != "linear_sum") == sorted([*(ops.get(s, s) for s in block), *norms])


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["DINOv3", "SigLIP", "BEiT"])
def test_products_in_8_bits(name, precision):
    config = config_of(name)
    images = testing.make(4, 3, *config.image_size)
    exact = engine(config, dtype="fp32", backend="torch")(images).embedding.double()
    made = engine(config, dtype=precision, backend="torch")(images).embedding.double()
    assert torch.cosine_similarity(exact, made).min() > 0.99


@pytest.mark.parametrize(
    "name",
    [
        *("EVA-02", "AIMv2", "norms at the end", "halves in parallel", "a gate", "ViTamin"),
        *("SAM", "windows", "Gemma 4", "differential attention"),
    ],
)
def test_blocks_that_products_in_8_bits_are_not_for(name):
    with pytest.raises(ValueError, match="products in 8 bits are not for blocks with"):
        engine(config_of(name), dtype="int8")


def test_a_backend_without_rotary_embedding_is_not_taken():
    with pytest.raises(RuntimeError, match=r"native.*cannot run attention: it has no rope"):
        engine(config_of("DINOv3"), dtype="fp32", backend="native")
    assert engine(config_of("DINOv3"), dtype="fp32").plan.backends["attention"] != "native"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope": "index", "head_dim": 5}, "even head_dim, got 5"),
        ({"rope": "round"}, "rope must be one of '', 'index', 'span', 'centered', got 'round'"),
        ({"pool": "map", "pool_heads": 5}, "pool_heads must divide the width 64, got 5"),
        ({"pool": "map", "pool_heads": 2, "pool_mlp_dim": 8, "pool_activation": "swiglu"}, "must not be gated"),
        ({"relative_position": "blocks", "prefix_tokens": 3}, "knows a class token only, got 3"),
        ({"window": 2}, "windows and decomposed relative position are of patches alone"),
        ({"differential": True, "qk_norm": "rms_norm"}, "no qk_norm"),
        (WINDOWS | {"relative_position": "decomposed", "image_size": (800, 1600)}, "attention over 332 channels"),
    ],
)
def test_facts_that_do_not_go_together(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SMALL, **changes)


def test_positions_of_other_sizes_are_made_once():
    config = dataclasses.replace(config_of("DINOv3"), dynamic_size=True)
    made = engine(config, dtype="fp32", backend="torch")
    assert isinstance(made, Engine)
    first, again = (made.runner.position((48, 48)) for _ in range(2))
    assert first is again and first.cos.shape == (1, 9, 32)
    assert made.runner.position((32, 48)) is made.runner.weights.positions
