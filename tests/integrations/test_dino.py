"""The attention of the dinov2 and dinov3 repositories, in stand-ins written here: same path, arguments and attributes.

dinov2 0.0.1.dev2 of PyPI has the first version; the other two come from the repositories alone.
"""

import pytest
import torch
from helpers.peers import close, randomised
from torch import nn

import vitfast
from vitfast.attention import sdpa
from vitfast.testing import device, make


class Layer(nn.Module):
    """What all of them hold."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = 3, 16**-0.5
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)


class First(Layer):
    """dinov2's, spelt out."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q * self.scale @ k.mT).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class MemEff(First):
    """dinov2's with xFormers, for which torch's function stands in."""

    def forward(self, x, attn_bias=None):
        if attn_bias is not None:
            raise NotImplementedError("nested")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))


class Second(Layer):
    """dinov2's of today."""

    def forward(self, x, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        drop = self.attn_drop.p if self.training else 0
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=is_causal)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Third(Layer):
    """dinov3's."""

    def forward(self, x, attn_bias=None, rope=None):
        return self.proj_drop(self.proj(self.compute_attention(self.qkv(x), attn_bias, rope)))

    def forward_list(self, x_list, attn_bias=None, rope_list=None):
        return [self.forward(x, attn_bias, rope) for x, rope in zip(x_list, rope_list, strict=True)]

    def apply_rope(self, q, k, rope):
        sin, cos = rope

        def turned(x):
            prefix, x = x.split([x.shape[-2] - len(sin), len(sin)], dim=-2)
            first, second = x.chunk(2, dim=-1)
            return torch.cat([prefix, x * cos + torch.cat([-second, first], dim=-1) * sin], dim=-2)

        return turned(q), turned(k)

    def compute_attention(self, qkv, attn_bias=None, rope=None):
        assert attn_bias is None
        size = (3, self.num_heads, self.qkv.in_features // self.num_heads)
        q, k, v = qkv.unflatten(-1, size).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = self.apply_rope(q, k, rope)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


PATHS = {
    First: "dinov2.layers.attention.Attention",
    MemEff: "dinov2.layers.attention.MemEffAttention",
    Second: "dinov2.layers.attention.Attention",
    Third: "dinov3.layers.attention.SelfAttention",
}
for kind, path in PATHS.items():
    kind.__module__, _, kind.__qualname__ = path.rpartition(".")

ROPE = (make(7, 16, seed=1), make(7, 16, seed=2))  # two tokens of nine are not turned
CASES = {
    "first": (First, {}),
    "memeff": (MemEff, {}),
    "second": (Second, {}),
    "second causal": (Second, {"is_causal": True}),
    "third": (Third, {}),
    "third turned": (Third, {"rope": ROPE}),
}


@pytest.mark.parametrize("name", CASES)
def test_layers(name, calls):
    kind, arguments = CASES[name]
    layer, x = randomised(kind()).to(device()), make(2, 9, 48)
    if arguments:  # they matter
        assert (layer(x, **arguments) - layer(x)).abs().max() > 0.01
    inputs = x.clone().requires_grad_()
    parameters = [inputs, *layer.parameters()]
    expected = layer(inputs, **arguments)
    wanted = torch.autograd.grad(expected.sin().sum(), parameters)
    swap = vitfast.replace_attention(layer, strict=True)
    actual = layer(inputs, **arguments)
    close(actual, expected)
    for gradient, want in zip(torch.autograd.grad(actual.sin().sum(), parameters), wanted, strict=True):
        close(gradient, want)
    with torch.no_grad(), sdpa.attention_backend("triton"):
        close(layer(x, **arguments), expected)
    assert len(calls) == 2
    assert ("rope" in calls[1]) == ("rope" in arguments)  # the kernel rotates
    swap.restore()
    assert torch.equal(layer(inputs, **arguments), expected)
    assert not {"forward", "compute_attention"} & layer.__dict__.keys()


def test_lists_of_images_of_two_sizes(calls):
    """dinov3's blocks may call forward_list."""
    layer, xs = randomised(Third()).to(device()), [make(2, 9, 48), make(2, 12, 48, seed=3)]
    ropes = [ROPE, (make(10, 16, seed=4), make(10, 16, seed=5))]
    expected = layer.forward_list(xs, rope_list=ropes)
    with vitfast.replace_attention(layer, strict=True):
        for actual, want in zip(layer.forward_list(xs, rope_list=ropes), expected, strict=True):
            close(actual, want)
    assert len(calls) == 2


def test_another_rotation_stays(calls, monkeypatch):
    layer, x = randomised(Third()).to(device()), make(2, 9, 48)
    monkeypatch.setattr(Third, "apply_rope", lambda self, q, k, rope: tuple(t * 2 for t in (q, k)))
    with torch.no_grad():
        expected = layer(x, rope=ROPE)
        with vitfast.replace_attention(layer), sdpa.attention_backend("triton"):
            close(layer(x, rope=ROPE), expected)
    assert "rope" not in calls[0]


def test_biases_and_dropout_go_to_the_layer_itself(calls):
    layer, third, x = randomised(MemEff()).to(device()), Third().to(device()), make(2, 9, 48)
    with vitfast.replace_attention(layer), vitfast.replace_attention(third):
        with pytest.raises(NotImplementedError, match="nested"):
            layer(x, attn_bias=object())
        with pytest.raises(AssertionError):
            third(x, attn_bias=object())
    first = randomised(First()).to(device()).train()
    first.attn_drop.p = 0.5
    torch.manual_seed(0)
    expected = first(x)
    with vitfast.replace_attention(first):
        torch.manual_seed(0)
        assert torch.equal(first(x), expected)
    assert not calls
