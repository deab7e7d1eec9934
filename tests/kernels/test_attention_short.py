"""attention over short sequences: every config against the oracle, its limits, and masks that matter."""

import functools

import pytest
import torch

from vitfast.kernels import attention
from vitfast.kernels import attention_short as kernels
from vitfast.kernels._parts import launch
from vitfast.kernels._parts.launch import capability
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import check_op, device, guarded, make

# Keys and what is special about them.
LENGTHS = [
    (1, "one key"),
    (16, "the least tile, full"),
    (17, "one more"),
    (50, "ViT-B/32"),
    (65, "two tiles, one key in the last"),
    (196, "14 x 14 patches"),
    (197, "three tiles, 5 keys in the last"),
    (257, "16 x 16 patches and CLS"),
    (320, "the most"),
]


def call(config, q, k, v, *, scale=None):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernels.attention_short(out, None, q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, config)
    return out


def packed(tokens, head_dim, dtype, heads=2, batch=1):
    """q, k, v as views of one guarded qkv [B, N, 3, H, D]."""
    return guarded(make(batch, tokens, 3, heads, head_dim, dtype=dtype)).unbind(2)


def able(config, head_dim, keys, dtype=torch.bfloat16):
    """Limits are of registers: the interpreter has none, a GPU would only spill and is spared the time."""
    return device().type == "cpu" or not why_not(config, head_dim, keys, dtype, capability(device()))


def why_not(config, head_dim, keys, dtype, chip):
    return kernels.why_not(config, attention.Problem(head_dim, keys, keys, dtype, chip))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [n for n, _ in LENGTHS], ids=[why for _, why in LENGTHS])
@pytest.mark.parametrize("config", kernels.CONFIGS, ids=lambda config: config.name)
def test_lengths(config, tokens, dtype):
    if not able(config, 64, tokens):
        pytest.skip("; ".join(why_not(config, 64, tokens, dtype, capability(device()))))
    check_op(functools.partial(call, config), reference.attention, *packed(tokens, 64, dtype))


@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_head_dims(head_dim):
    ran = 0
    for config in kernels.CONFIGS:
        if able(config, head_dim, 50):
            ran += 1
            check_op(functools.partial(call, config), reference.attention, *packed(50, head_dim, torch.float16, 3, 2))
    assert ran


@pytest.mark.parametrize("queries", [1, 63, 64, 65, 130])
def test_other_numbers_of_queries(queries):
    q = guarded(make(2, queries, 2, 32, dtype=torch.bfloat16, seed=1))
    k, v = (guarded(make(2, 33, 2, 32, dtype=torch.bfloat16, seed=seed)) for seed in (2, 3))
    for config in kernels.CONFIGS:
        if able(config, 32, 33):
            check_op(functools.partial(call, config), reference.attention, q, k, v)


def test_scale_and_large_scores():
    q, k, v = packed(50, 32, torch.float16)
    for scale in (1.0, 1e-3):
        check_op(functools.partial(call, kernels.CONFIGS[0]), reference.attention, q * 20, k, v, scale=scale)


def test_a_key_beyond_the_end_would_be_noticed(monkeypatch):
    """The mask of the last tile is what keeps zeros out of the softmax."""
    q, k, v = packed(50, 32, torch.bfloat16)
    oracle, baseline = reference.attention(q, k, v, upcast=True), reference.attention(q, k, v)
    wider = [torch.cat([t, torch.zeros_like(t[:, :1])], dim=1) for t in (k, v)]  # as if key 50 were seen
    with pytest.raises(AssertionError, match="error"):
        assert_close(call(kernels.CONFIGS[0], q, *wider), oracle, baseline)


@pytest.mark.parametrize("count", [*range(1, 70), 196, 197, 240, 256, 257, 320])
def test_key_tiles_cover_the_keys_and_only_the_last_is_partly_empty(count):
    tiles = kernels.key_tiles(count)
    used = [tile for tile in tiles if tile]
    assert sum(used) >= count
    assert sum(used[:-1]) < count
    assert sum(used) - count < 16 or len(used) == 3 or count > 128  # little is wasted
    assert all(tile & (tile - 1) == 0 and 16 <= tile <= 128 for tile in used)
    assert list(tiles) == sorted(tiles, reverse=True)


def test_limits():
    short, *_, walk_32 = kernels.CONFIGS
    assert not why_not(short, 64, 197, torch.bfloat16, (9, 0))
    assert why_not(short, 64, 577, torch.bfloat16, (9, 0)) == ["577 keys of head dim 64 are outside 1..272"]
    assert why_not(short, 72, 197, torch.bfloat16, (9, 0)) == ["197 keys of head dim 72 are outside 1..0"]
    assert why_not(short, 64, 0, torch.bfloat16, (8, 0)) == ["0 keys of head dim 64 are outside 1..208"]
    assert why_not(short, 64, 197, torch.float32, (9, 0)) == ["dtype torch.float32 is not fp16 or bf16"]
    assert not why_not(walk_32, 64, 320, torch.bfloat16, (8, 6))
    assert why_not(walk_32, 64, 320, torch.bfloat16, (9, 0))


def test_through_the_launcher_by_name_and_by_table(monkeypatch):
    q, k, v = packed(50, 32, torch.bfloat16)
    short = kernels.CONFIGS[0]
    wanted = call(short, q, k, v)
    assert torch.equal(attention.attention(q, k, v, config=short), wanted)
    launched = []
    right = kernels.attention_short
    monkeypatch.setattr(kernels, "attention_short", lambda *args: launched.append(args[-1].name) or right(*args))
    attention.attention(q, k, v)
    assert not launched  # without a table the general kernel runs
    table = {"attention": {attention.problem_of(q, k, v).key: "short-walk"}}
    monkeypatch.setattr(launch, "tuned_choices", lambda device: table)
    attention.attention(q, k, v)
    attention.attention(q, k, v, right=0)  # another key
    assert launched == ["short-walk"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"right": 0}, "it has no right"),
        ({"scale": 0.0}, "the scale must be positive, got 0.0"),
        ({"bias": torch.zeros(1, 1, 50, 50)}, "it has no bias"),
        ({"return_lse": True}, "config must be None with return_lse, got short"),
    ],
)
def test_the_launcher_refuses_what_a_short_config_cannot(options, message):
    q, k, v = packed(50, 32, torch.bfloat16)
    options = {name: x.to(device()) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(ValueError, match=message):
        attention.attention(q, k, v, config=kernels.CONFIGS[0], **options)
    if "return_lse" not in options:
        with pytest.raises(ValueError, match="577 keys"):
            attention.attention(*packed(577, 32, torch.bfloat16), config=kernels.CONFIGS[0])
