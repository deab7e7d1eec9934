"""nn.MultiheadAttention with vitfast's attention inside: every layout and mask; all beyond that stays torch's."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers import peers
from helpers.peers import close
from torch import nn

import vitfast
import vitfast.testing
from vitfast.attention import sdpa
from vitfast.integrations import modules as integration
from vitfast.testing import device, make


def layer(**settings):
    torch.manual_seed(0)
    settings = {"embed_dim": 32, "num_heads": 4, "batch_first": True} | settings
    return peers.randomised(nn.MultiheadAttention(**settings)).to(device())


PADDING = {
    "none": None,
    "bool": torch.tensor([[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]], dtype=torch.bool),
    "float": torch.linspace(-2, 1, 14).view(2, 7),
}
_SEEN = torch.ones(5, 7, dtype=torch.bool).tril(1)
MASKS = {
    "none": None,
    "2-D bool": ~_SEEN,
    "2-D float": torch.linspace(-1, 1, 35).view(5, 7),
    "3-D bool": (~_SEEN).repeat(8, 1, 1).roll(1, 2).index_fill(2, torch.tensor([0]), False),
    "3-D float": torch.linspace(-3, 3, 280).view(8, 5, 7),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("padding", "mask"), list(itertools.product(PADDING, MASKS)))
def test_masks(batch_first, padding, mask, calls):
    attend = layer(batch_first=batch_first)
    query, key, value = make(2, 5, 32), make(2, 7, 32, seed=1), make(2, 7, 32, seed=2)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    masks = {"key_padding_mask": PADDING[padding], "attn_mask": MASKS[mask]}
    masks = {name: None if m is None else m.to(device()) for name, m in masks.items()}
    if "bool" in padding and "float" in mask:  # torch wants both alike, and adds them
        masks["key_padding_mask"] = make(2, 7).masked_fill(masks["key_padding_mask"], float("-inf"))
    if padding == "float" and "bool" in mask:
        masks["attn_mask"] = torch.zeros_like(masks["attn_mask"], dtype=torch.float).masked_fill(
            masks["attn_mask"], float("-inf")
        )
    expected, _ = attend(query, key, value, need_weights=False, **masks)
    with vitfast.replace_attention(attend, strict=True):
        actual, weights = attend(query, key, value, need_weights=False, **masks)
    close(actual, expected)
    assert weights is None
    assert len(calls) == 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": False}, {"kdim": 24, "vdim": 40}, {"kdim": 24, "vdim": 40, "bias": False}, {"num_heads": 1}],
    ids=str,
)
def test_projections_and_gradients(settings, calls):
    attend = layer(**settings).train()
    inputs = [make(2, 5, 32), make(2, 7, attend.kdim, seed=1), make(2, 7, attend.vdim, seed=2)]
    inputs = [x.requires_grad_() for x in inputs]
    parameters = [*inputs, *attend.parameters()]
    expected, _ = attend(*inputs, need_weights=False)
    wanted = torch.autograd.grad(expected.sin().sum(), parameters)
    with integration.replace(attend) as swap:
        assert swap.replaced == [""]
        actual, _ = attend(*inputs, need_weights=False)
        gradients = torch.autograd.grad(actual.sin().sum(), parameters)
    close(actual, expected)
    for gradient, want in zip(gradients, wanted, strict=True):
        close(gradient, want)
    assert len(calls) == 1


@pytest.mark.parametrize("padded", [False, True])
def test_causal_hint(padded, calls):
    attend, x = layer(), make(2, 7, 32)
    mask = torch.ones(7, 7, dtype=torch.bool, device=device()).triu(1)
    arguments = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    if padded:
        arguments["key_padding_mask"] = PADDING["bool"].to(device())
    expected, _ = attend(x, x, x, **arguments)
    with vitfast.replace_attention(attend):
        close(attend(x, x, x, **arguments)[0], expected)
    assert calls[0]["is_causal"] is not padded


def test_masks_reach_the_kernel():
    attend, x = layer(), make(2, 7, 32)
    expected, _ = attend(x, x, x, need_weights=False, key_padding_mask=PADDING["bool"].to(device()))
    with torch.no_grad(), vitfast.replace_attention(attend), sdpa.attention_backend("triton"):
        close(attend(x, x, x, need_weights=False, key_padding_mask=PADDING["bool"].to(device()))[0], expected)


@pytest.mark.parametrize("training", [True, False])
def test_no_visible_key(training):
    """Zeros before the output projection, as torch's composite path has it."""
    attend, x = layer().train(training), make(1, 7, 32)
    hidden = torch.ones(1, 7, dtype=torch.bool, device=device())
    with vitfast.replace_attention(attend):
        out, _ = attend(x, x, x, need_weights=False, key_padding_mask=hidden)
    assert torch.equal(out, attend.out_proj.bias.expand(1, 7, 32))


def test_what_stays_torchs(calls):
    """Weights, dropout in training, unbatched input: the module's own forward, in value and in random numbers."""
    attend, x = layer(dropout=0.5), make(2, 7, 32)
    weights, single = attend(x, x, x)[1], attend(x[0], x[0], x[0], need_weights=False)[0]
    torch.manual_seed(0)
    dropped = attend.train()(x, x, x, need_weights=False)[0]
    with vitfast.replace_attention(attend):
        torch.manual_seed(0)
        assert torch.equal(attend(x, x, x, need_weights=False)[0], dropped)
        attend.eval()
        assert torch.equal(attend(x, x, x)[1], weights)
        assert torch.equal(attend(x[0], x[0], x[0], need_weights=False)[0], single)
        assert not calls
        attend(x, x, x, need_weights=False)
        assert len(calls) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"attn_mask": torch.zeros(3, 7)},
        {"attn_mask": torch.zeros(3, 7, 7)},
        {"key_padding_mask": torch.zeros(2, 6)},
        {"attn_mask": torch.zeros(7, 7, dtype=torch.int32)},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_as_by_torch(arguments):
    attend, x = layer().train(), make(2, 7, 32)
    arguments = {n: a.to(device()) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        attend(x, x, x, need_weights=False, **arguments)
    with vitfast.replace_attention(attend), pytest.raises(expected.type) as actual:
        attend(x, x, x, need_weights=False, **arguments)
    assert str(actual.value) == str(expected.value)


def test_what_is_left():
    class Mine(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict(
        {
            "mine": Mine(32, 4),
            "bias_kv": nn.MultiheadAttention(32, 4, add_bias_kv=True),
            "zero": nn.MultiheadAttention(32, 4, add_zero_attn=True),
            "encoder": nn.TransformerEncoderLayer(32, 4),
            "plain": nn.MultiheadAttention(32, 4),
        }
    )
    swap = vitfast.replace_attention(model)
    assert swap.replaced == ["plain"]
    reasons = {"mine": "subclass", "bias_kv": "add_bias_kv", "zero": "add_zero_attn", "encoder.self_attn": "fused path"}
    assert swap.left.keys() == reasons.keys()
    assert all(reason in swap.left[name] for name, reason in reasons.items())
    assert repr(swap).startswith("Swap(1 replaced, 4 left, in place; calls run ")
    assert "left bias_kv: add_bias_kv=True appends a learned key" in repr(swap)
    swap.restore()
    assert repr(swap) == "Swap(1 replaced, 4 left, restored)"
    with pytest.raises(ValueError, match=r"4 attention module\(s\) cannot be replaced"):
        vitfast.replace_attention(model, strict=True)


def test_not_a_module():
    with pytest.raises(ValueError, match="got dict"):
        vitfast.replace_attention({})


def test_torchvision(calls):
    """In eval mode torch runs its native kernel there; the swap reaches it all the same."""
    model, images = peers.torchvision_model(num_heads=4).to(device()), make(2, 3, 32, 32)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(images)
        swap = vitfast.replace_attention(model, strict=True)
        assert len(swap.replaced) == 2
        close(model(images), before)
        assert len(calls) == 2
        with sdpa.attention_backend("triton"):
            close(model(images), before)
        assert list(model.state_dict()) == keys
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        swap.restore()
        assert torch.equal(model(images), before)
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert len(calls) == 4
        for twin in twins:
            close(twin(images), before)
    assert len(calls) == 8


class Residual(nn.Module):
    """open_clip's way of calling it: a residual block, sequence first or batch first, additive causal mask."""

    def __init__(self, batch_first):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=batch_first)

    def forward(self, x, mask):
        x_norm = self.norm(x)
        return x + self.attn(x_norm, x_norm, x_norm, need_weights=False, attn_mask=mask)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_open_clip_like(batch_first, calls):
    block, x = peers.randomised(Residual(batch_first)).to(device()), make(7, 7, 32)
    mask = torch.full((7, 7), float("-inf"), device=device()).triu(1)
    expected = block(x, mask)
    with torch.no_grad(), vitfast.replace_attention(block, strict=True), sdpa.attention_backend("triton"):
        close(block(x, mask), expected)
    assert len(calls) == 1


def test_autocast(calls):
    """Under autocast the projections are bf16 and a float mask of the input's dtype still fits."""
    attend, x = layer().train(), make(2, 7, 32)
    mask = make(7, 7)
    with torch.autocast(device().type, dtype=torch.bfloat16):
        expected, _ = attend(x, x, x, need_weights=False, attn_mask=mask)
        with vitfast.replace_attention(attend):
            actual, _ = attend(x, x, x, need_weights=False, attn_mask=mask)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert len(calls) == 1
    oracle, _ = attend.double()(*(x.double(),) * 3, need_weights=False, attn_mask=mask.double())
    vitfast.testing.assert_close(actual, oracle, expected)
