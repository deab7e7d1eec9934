"""What a swap leaves behind on a module: copies with their own weights, scripts, names of what is left, its route."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from helpers import peers
from helpers.peers import close
from torch import nn
from torch.nn import functional as F

import vitfast
from vitfast.attention import sdpa
from vitfast.integrations.swap import Swap, original
from vitfast.testing import device, make


def timm_block():
    return peers.timm_model(**peers.TIMM).blocks[0].attn.to(device())


def torch_layer():
    torch.manual_seed(0)
    return peers.randomised(nn.MultiheadAttention(48, 3, batch_first=True)).to(device())


def call(module, x):
    with torch.no_grad():
        return module(x, x, x, need_weights=False)[0] if isinstance(module, nn.MultiheadAttention) else module(x)


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def replica(module):
    """As nn.DataParallel makes it: the attributes of the original, then other tensors under their names."""
    made = module._replicate_for_data_parallel()
    made._modules = {name: copy.deepcopy(child) for name, child in module._modules.items()}
    made._parameters = {n: None if p is None else p.detach().clone() for n, p in module._parameters.items()}
    for name, parameter in made._parameters.items():
        object.__setattr__(made, name, parameter)
    return made


COPIES = {
    "replica": replica,
    "shallow": lambda module: _apart(copy.copy(module)),
    "deep": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


def _apart(module):
    """A shallow copy with parameters of its own."""
    module._modules = {name: copy.deepcopy(child) for name, child in module._modules.items()}
    module._parameters = {n: None if p is None else nn.Parameter(p.detach().clone()) for n, p in _parameters(module)}
    return module


def _parameters(module):
    return module._parameters.items()


@pytest.mark.parametrize("kind", [timm_block, torch_layer])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_swapped_module_computes_with_its_own_weights(kind, how, calls):
    module, x = kind(), make(2, 5, 48)
    before = call(module, x)
    vitfast.replace_attention(module, strict=True)
    made = COPIES[how](module)
    close(call(made, x), before)
    with torch.no_grad():
        tensors = [p for child in made.modules() for p in child._parameters.values() if p is not None]
        for parameter in tensors:
            parameter.mul_(1.5)
    del calls[:]
    changed = call(made, x)
    assert len(calls) == 1  # still swapped
    plain = copy.copy(made)
    plain.__class__ = original(made)
    close(changed, call(plain, x))
    assert (changed - before).abs().max() > 0.1 * before.abs().max()
    close(call(module, x), before)


def test_a_swapped_module_is_of_its_class_by_name_and_isinstance():
    module = timm_block()
    kind, text = type(module), repr(module)
    with vitfast.replace_attention(module) as swap:
        assert isinstance(module, kind)
        assert repr(module) == text
        assert original(module) is kind
        again = vitfast.replace_attention(module)
        assert again.left == {"": "its forward has been replaced already"}
        assert not again.replaced
        swap.restore()
        assert type(module) is kind


def test_replace_uses_one_class_for_all_modules_of_a_class():
    """Or torch.compile would guard on, and compile, each of them."""
    model = peers.timm_model(**peers.TIMM)
    vitfast.replace_attention(model)
    assert type(model.blocks[0].attn) is type(model.blocks[1].attn)


def test_restore_names_a_module_that_has_got_another_class_since():
    module = timm_block()
    swap = vitfast.replace_attention(module)
    kind = type(module)
    module.__class__ = type("Other", (kind,), {})
    with pytest.raises(RuntimeError, match=r"not restored: the model \(Other\) has another forward by now"):
        swap.restore()
    assert type(module).__name__ == "Other"


def test_torch_jit_script_compiles_the_modules_own_code_and_says_so():
    model, x = peers.timm_model(**peers.TIMM), make(2, 3, 32, 32).cpu()
    before = model(x)
    with vitfast.replace_attention(model):
        with pytest.warns(UserWarning, match="torch.jit.script compiles Attention's own forward"):
            scripted = torch.jit.script(model)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        close(model(x), before)
    buffer.seek(0)
    close(scripted(x), before)
    close(torch.jit.load(buffer)(x), before)


def test_a_module_keeps_its_own_way_to_be_scripted():
    class Mine(nn.MultiheadAttention):
        def __prepare_scriptable__(self):
            return "prepared"

    module, swap = Mine(8, 2), Swap()
    swap.replace("mine", module, lambda module, x: x)
    with pytest.warns(UserWarning, match="Mine's own forward"):
        assert module.__prepare_scriptable__() == "prepared"


# --- what attends and is left ---


class PoolWithFunction(nn.Module):
    """As open_clip's AttentionPool2d and torchvision's ShiftedWindowAttention: the attention is in a function."""

    def forward(self, x):
        return _pool(x)


def _pool(x):
    return _inner(x, x)


def _inner(q, k):
    """Two calls away from forward."""
    return torch.softmax(q @ k.transpose(-2, -1), -1) @ k


class PoolWithTorchFunction(nn.Module):
    def forward(self, x):
        return F.multi_head_attention_forward(x, x, x)[0]


class SoftmaxModule(nn.Module):
    """As many plain implementations have it."""

    def __init__(self):
        super().__init__()
        self.attend = nn.Softmax(dim=-1)

    def forward(self, x):
        return torch.matmul(self.attend(torch.matmul(x, x.transpose(-1, -2))), x)


class AttentionInHelpers(nn.Module):
    def forward(self, x):
        return self.weigh(x) @ x

    def weigh(self, x):
        return x.softmax(-1)


class ByItsBase(AttentionInHelpers):
    def forward(self, x):
        return super().forward(x)


class PackedWithFlash(nn.Module):
    def forward(self, x):
        return flash_attn_varlen_func(x, x, x)  # noqa: F821  (a package that is not there)


class OnlyInTheDocstring(nn.Module):
    def forward(self, image, text):
        """Scores of texts, e.g. `probs = logits.softmax(dim=1)`; softmax of a matmul is not taken here."""
        return torch.matmul(image, text.t())  # softmax comes later


class LogitsOfAModel(nn.Module):
    """A product here and a softmax there are not attention."""

    def forward(self, image, text):
        return self.probabilities(image @ text.t())

    def probabilities(self, logits):
        return logits.softmax(-1)


@pytest.mark.parametrize(
    "kind",
    [PoolWithFunction, PoolWithTorchFunction, SoftmaxModule, AttentionInHelpers, ByItsBase, PackedWithFlash],
)
def test_attention_in_functions_and_methods_is_named(kind):
    kind_name = f"{__name__}.{kind.__qualname__}"
    if kind is ByItsBase:  # not named after attention, so only what stands in one function counts
        assert vitfast.replace_attention(kind()).left == {}
        return
    swap = vitfast.replace_attention(nn.Sequential(nn.Linear(2, 2), kind()))
    assert swap.left == {"1": f"vitfast has no exact replacement for {kind_name}"}
    with pytest.raises(ValueError, match="1 attention module"):
        vitfast.replace_attention(kind(), strict=True)


@pytest.mark.parametrize("kind", [OnlyInTheDocstring, LogitsOfAModel])
def test_what_is_no_attention_is_not_named(kind):
    swap = vitfast.replace_attention(kind(), strict=True)
    assert (swap.left, swap.replaced) == ({}, [])


def test_torchvision_swin_is_named():
    torchvision = peers.import_torchvision()
    settings = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": [2, 2]}
    model = torchvision.models.SwinTransformer(**settings)
    swap = vitfast.replace_attention(model)
    assert list(swap.left) == ["features.1.0.attn", "features.3.0.attn"]
    with pytest.raises(ValueError, match="ShiftedWindowAttention"):
        vitfast.replace_attention(model, strict=True)


def test_open_clip_attention_pool_is_named(monkeypatch):
    """A stand-in of open_clip's AttentionPool2d, by its path and by the function that it calls."""
    module = types.ModuleType("open_clip.modified_resnet")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kind = type("AttentionPool2d", (PoolWithTorchFunction,), {"__module__": module.__name__})
    assert list(vitfast.replace_attention(nn.Sequential(kind())).left) == ["0"]


@pytest.mark.parametrize("name", ["CLIPModel", "CLIPSegModel", "OwlViTModel"])
def test_the_root_of_a_model_is_not_left(name):
    kind = getattr(peers.import_transformers(), name)
    config = kind.config_class(text_config=peers.TEXT | {"eos_token_id": 2}, vision_config=peers.VIT)
    with vitfast.replace_attention(kind(config), strict=True) as swap:
        assert len(swap.replaced) == 3
        assert swap.left == {}


# --- the handle ---


def test_a_swap_says_which_route_its_calls_take():
    model = nn.Sequential(torch_layer())
    swap = vitfast.replace_attention(model)
    route = swap.route
    x = make(2, 3, 5, 16)
    assert route == sdpa.explain(x, x, x)
    with sdpa.attention_backend("torch"):
        assert swap.route == sdpa.Route("torch", ("attention_backend('torch') is in force",))
        assert "calls run torch (attention_backend('torch') is in force)" in repr(swap)
    with sdpa.attention_backend("triton"):
        assert swap.route == sdpa.Route("triton")
        assert "calls run the Triton kernels" in repr(swap)
        model.double()
        assert swap.route.reasons  # in float64 they cannot
    swap.restore()
    assert "restored" in repr(swap)


def test_repr_and_html_list_what_is_left_by_reason():
    swap = Swap(nn.Linear(1, 1))
    swap.left |= {f"blocks.{i}.attn": "it is <old>" for i in range(50)} | {f"layer {i}": f"why {i}" for i in range(60)}
    lines = repr(swap).splitlines()
    assert len(lines) <= 40
    assert lines[1] == "  left blocks.0.attn and 49 more: it is <old>"
    assert "and 31 more reasons" in lines[-1]
    html = swap._repr_html_()
    assert "it is &lt;old&gt;" in html
    assert "calls run" in html
