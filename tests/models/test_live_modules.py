"""Live modules that are not what their class says: served exactly, or refused by the name of what was changed."""

import copy
import functools
import re

import pytest
import torch
from helpers import peers
from helpers.peers import DINO, TIMM, VIT, timm_model, torchvision_model, transformers_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import vitfast
from vitfast import testing
from vitfast.engine.engine import Engine
from vitfast.models import checkpoints
from vitfast.models.checkpoints import CheckpointError
from vitfast.models.vit import own_block


def vit(**kwargs):
    return transformers_model("ViTForImageClassification", VIT | {"num_labels": 5} | kwargs)


FAMILIES = {"timm": lambda: timm_model(**TIMM), "transformers": vit, "torchvision": torchvision_model}


def logits_of(model, images):
    output = model(images.cpu())
    return getattr(output, "logits", output)


def logits(model):
    return logits_of(model, testing.make(2, 3, 32, 32))


def assert_served(model) -> None:
    """An engine of the module gives the module's own outputs."""
    engine = Engine(checkpoints.load(model), device=testing.device(), dtype="fp32", backend="torch")
    with torch.no_grad():
        peers.close(engine(testing.make(2, 3, 32, 32)).logits.cpu(), logits(model))


def head_of(model) -> str:
    return {"timm": "head", "transformers": "classifier", "torchvision": "heads"}[type(model).__module__.split(".")[0]]


class Mine(nn.Module):
    """A layer that does more than the one it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


HEADS = {
    "dropout before": lambda linear: nn.Sequential(nn.Dropout(0.2), linear),
    "nested": lambda linear: nn.Sequential(nn.Identity(), nn.Sequential(linear, nn.Dropout(0.1))),
    "wider": lambda linear: nn.Linear(linear.in_features, 11),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_heads_that_are_one_linear_layer_are_served(family, head):
    model = FAMILIES[family]()
    name = head_of(model)
    linear = model.heads.head if family == "torchvision" else getattr(model, name)
    setattr(model, name, HEADS[head](linear))
    assert_served(model.eval())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "make",
    [
        lambda linear: nn.Sequential(linear, nn.Softmax(-1)),
        lambda linear: nn.Sequential(nn.Linear(48, 48), nn.ReLU(), linear),
        Mine,
    ],
)
def test_other_heads_are_refused_by_their_parts(family, make):
    model = FAMILIES[family]()
    name = head_of(model)
    linear = model.heads.head if family == "torchvision" else getattr(model, name)
    setattr(model, name, make(linear))
    with pytest.raises(CheckpointError, match=rf"{name}: .* as head is not supported"):
        checkpoints.load(model)


def test_a_head_without_classes():
    model = vit()
    model.classifier = nn.Identity()
    loaded = checkpoints.load(model)
    assert (loaded.config.num_classes, loaded.labels) == (0, None)


def block(model):
    """The first block of any family, its attention, and a linear layer in it."""
    if hasattr(model, "blocks"):
        return model.blocks[0], model.blocks[0].attn, (model.blocks[0].attn, "qkv")
    if hasattr(model, "vit"):
        layer = model.vit.layers[0]
        return layer, layer.attention, (layer.attention, "q_proj")
    layer = model.encoder.layers[0]
    return layer, layer.self_attention, (layer.mlp, "0")


def replaced(parent, name, make):
    parent._modules[name] = make(parent._modules[name])


def patched(model):
    attention = block(model)[1]
    attention.forward = functools.partial(lambda attention, x, *args, **kwargs: x, attention)


def other_norm(model):
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.RMSNorm(child.normalized_shape))
                return


def other_activation(model):
    for module in model.modules():
        for name, child in module.named_children():
            if "gelu" in type(child).__name__.lower():
                setattr(module, name, nn.ReLU())
                return


def eps_of_one_norm(model):
    next(module for module in model.modules() if isinstance(module, nn.LayerNorm)).eps = 0.5


def stride(model):
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv.stride = (4, 4)


def halved(module, inputs, output):
    return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5


IN_BLOCKS = {
    "forward hook": (lambda m: block(m)[0].register_forward_hook(halved), "a forward hook"),
    "forward pre-hook": (
        lambda m: block(m)[1].register_forward_pre_hook(lambda _, x: (-x[0], *x[1:])),
        "a forward pre-",
    ),
    "a patched forward": (patched, "a patched forward"),
}
"""Code of one's own inside a block: served where the family's blocks are given tokens and nothing else."""

CHANGES = {
    "a hook on the whole": (lambda m: m.register_forward_hook(lambda *_: None), "a forward hook"),
    "a hook on all blocks": (lambda m: _blocks(m).register_forward_hook(lambda *_: None), "a forward hook"),
    "LoRA or the like": (lambda m: replaced(*block(m)[2], Mine), r"test_live_modules\.Mine"),
    "a Sequential layer": (lambda m: replaced(*block(m)[2], nn.Sequential), "Sequential"),
    "a wrapped block": (lambda m: replaced(_blocks(m), _first(m), Mine), "Mine"),
    "parametrization": (
        lambda m: parametrizations.weight_norm(_linear(m)),
        "a parametrization .*weight by _WeightNorm",
    ),
    "weight_norm": (lambda m: weight_norm(_linear(m)), "a forward pre-hook .*WeightNorm"),
    "pruning": (lambda m: prune.l1_unstructured(_linear(m), "weight", 0.5), "a forward pre-hook .*L1Unstructured"),
    "another norm": (other_norm, "RMSNorm"),
    "another activation": (other_activation, "ReLU"),
    "another eps": (eps_of_one_norm, "eps"),
    "overlapping patches": (stride, r"stride"),
}


def _blocks(model):
    return (
        model.blocks
        if hasattr(model, "blocks")
        else model.vit.layers
        if hasattr(model, "vit")
        else (model.encoder.layers)
    )


def _first(model):
    return next(iter(_blocks(model)._modules))


def _linear(model):
    parent, name = block(model)[2]
    return parent._modules[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_changes_the_result_is_refused_by_name(family, change):
    model = FAMILIES[family]()
    act, reason = CHANGES[change]
    act(model)
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.load(model)


@pytest.mark.parametrize("change", IN_BLOCKS)
def test_code_of_ones_own_in_a_block_is_refused_by_name_in_other_families(change):
    model = vit()
    act, reason = IN_BLOCKS[change]
    act(model)
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.load(model)


@pytest.mark.parametrize("family", ["timm", "torchvision"])
@pytest.mark.parametrize("change", IN_BLOCKS)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_block_with_code_of_its_own_runs_as_the_module_it_is(family, change, backend):
    model = FAMILIES[family]()
    images = testing.make(2, 3, 32, 32)
    with torch.no_grad():
        plain = logits(model)
        IN_BLOCKS[change][0](model)
        want = logits(model)
    assert (plain - want).abs().max() > 1e-2
    engine = Engine(checkpoints.load(model), device=testing.device(), dtype="fp32", backend=backend)
    copied = copy.deepcopy(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for made in (engine, copied):
        peers.close(made(images).logits.cpu(), want)
    assert len(engine(images, layers=[0, 1]).layers) == 2


def test_what_a_block_with_code_of_its_own_cannot_do_is_refused(tmp_path):
    model = timm_model(**TIMM)
    IN_BLOCKS["a patched forward"][0](model)
    engine = vitfast.load(model, device=testing.device(), dtype="fp32", backend="torch")
    images = testing.make(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"blocks \[0\] have code of their own"):
        engine(images, attention_maps=[1])
    with pytest.raises(ValueError, match="blocks have code of their own"):
        engine(list(images))
    with pytest.raises(CheckpointError, match=r"code of its own in blocks \[0\] cannot be saved"):
        engine.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"blocks \[0\] have code of their own, which has no fingerprint"):
        engine.fingerprint  # noqa: B018


def test_the_blocks_beside_one_with_code_of_its_own_are_quantised():
    model = timm_model(**TIMM)
    IN_BLOCKS["forward hook"][0](model)
    images = testing.make(4, 3, 32, 32)
    engine = vitfast.load(
        model, device=testing.device(), dtype="int8", backend="torch", calibration=images, target=0.999999
    )
    assert {name.split(".")[1] for name in engine.calibration.alone} == {"1"}
    with torch.no_grad():
        cosine = torch.cosine_similarity(engine(images).logits.float().cpu(), logits_of(model, images))
    assert cosine.min() > 0.99


def test_a_hook_on_every_module_is_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(CheckpointError, match="a hook on every module"):
            checkpoints.load(timm_model(**TIMM))
    finally:
        handle.remove()


def test_a_class_that_was_patched_is_refused(monkeypatch):
    model = timm_model(**TIMM)
    monkeypatch.setattr(type(model.blocks[0].attn), "forward", lambda self, x, **_: x)
    with pytest.raises(CheckpointError, match=r"Attention\.forward replaced by test_live_modules"):
        checkpoints.load(model)


def test_other_methods_that_were_patched_are_refused():
    model = timm_model(**TIMM)
    model.forward_features = lambda x: x
    with pytest.raises(CheckpointError, match="a patched forward_features"):
        checkpoints.load(model)


def test_a_function_of_attention_that_was_registered_is_refused():
    modeling = peers.import_transformers().modeling_utils
    modeling.ALL_ATTENTION_FUNCTIONS.register("mine", lambda *args, **kwargs: None)
    model = vit()
    model.config._attn_implementation = "mine"
    with pytest.raises(CheckpointError, match="attention function 'mine'"):
        checkpoints.load(model)


def test_a_config_that_was_changed_after_building_is_refused():
    model = vit()
    model.config.layer_norm_eps = 0.5
    with pytest.raises(CheckpointError, match=r"layernorm.*eps=0\.02 where its config makes 0\.5"):
        checkpoints.load(model)


HARMLESS = {
    "backward hooks": lambda m: block(m)[0].register_full_backward_hook(lambda *_: None),
    "hooks that record for transformers": lambda m: m(testing.make(1, 3, 32, 32).cpu(), output_hidden_states=True),
    "a swapped attention": vitfast.replace_attention,
    "compiled in place": lambda m: m.compile(),
    "training mode": lambda m: m.train(),
    "its own method, bound": lambda m: setattr(m, "forward", m.forward),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", HARMLESS)
def test_what_changes_nothing_is_served(family, change):
    if "transformers" in change and family != "transformers":
        pytest.skip("transformers alone records so")
    model = FAMILIES[family]()
    with torch.no_grad():
        want = logits(model)
    HARMLESS[change](model)
    engine = Engine(checkpoints.load(model), device=testing.device(), dtype="fp32", backend="torch")
    peers.close(engine(testing.make(2, 3, 32, 32)).logits.cpu(), want)


def test_parts_that_have_no_say_may_be_anything():
    model = transformers_model("ViTModel", VIT)
    model.pooler = Mine(model.pooler)
    whole = transformers_model("CLIPModel", {"vision_config": VIT, "text_config": peers.TEXT, "projection_dim": 20})
    whole.text_model.register_forward_hook(lambda *_: None)
    for loaded in (model, whole):
        assert checkpoints.load(loaded).config.depth == 2


def distributed(model):
    """As DistributedDataParallel is made, but for the group of processes, which there is none of here."""
    made = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(made)
    made.module = model
    return made


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "DistributedDataParallel": lambda m: distributed(m),
    "torch.compile": torch.compile,
    "two of them": lambda m: nn.DataParallel(torch.compile(m)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_come_off(wrapper):
    model = timm_model(**TIMM)
    wrapped, plain = checkpoints.load(WRAPPERS[wrapper](model)), checkpoints.load(model)
    assert wrapped.config == plain.config
    assert all(torch.equal(wrapped.weights[name], plain.weights[name]) for name in plain.weights)


def test_wrappers_with_hooks_and_other_wrappers_are_refused():
    wrapped = nn.DataParallel(timm_model(**TIMM))
    wrapped.register_forward_hook(lambda *_: None)
    with pytest.raises(CheckpointError, match=r"DataParallel: a forward hook"):
        checkpoints.load(wrapped)
    with pytest.raises(CheckpointError, match=r"Mine is not supported\. Its part base can be loaded by itself"):
        checkpoints.load(Mine(timm_model(**TIMM)))
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(CheckpointError, match=r"torch\.jit.* pass the one it was made from"):
        checkpoints.load(scripted)
    for module, advice in (
        ("peft.peft_model", r"merge them and pass the model: model\.merge_and_unload\(\)"),
        ("torch.distributed.fsdp.fully_sharded_data_parallel", "gather a full state dict and load that"),
        ("torch.fx.graph_module", "pass the one it was made from"),
    ):
        wrapper = type("Wrapper", (Mine,), {"__module__": module})
        with pytest.raises(CheckpointError, match=rf"{re.escape(module)}\.Wrapper \(.*{advice}\) is not supported"):
            checkpoints.load(wrapper(timm_model(**TIMM)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_a_snapshot(family):
    model = FAMILIES[family]()
    loaded = checkpoints.load(model)
    before = copy.deepcopy(dict(loaded.weights))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(loaded.weights[name], before[name]) for name in before)


SIZES = {  # torchvision's weights -> patch, width, heads, layers cut to one
    "ViT_B_16_Weights.IMAGENET1K_V1": (16, 768, 12),
    "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1": (16, 768, 12),
    "ViT_B_32_Weights.IMAGENET1K_V1": (32, 768, 12),
    "ViT_L_16_Weights.IMAGENET1K_V1": (16, 1024, 16),
    "ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1": (16, 1024, 16),
    "ViT_L_32_Weights.IMAGENET1K_V1": (32, 1024, 16),
    "ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1": (14, 1280, 16),
    "ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1": (14, 1280, 16),
}


@pytest.mark.parametrize("weights", SIZES)
def test_torchvision_preprocess_of_its_own_weights(weights):
    torchvision = peers.import_torchvision()
    patch, width, heads = SIZES[weights]
    own = torchvision.models.get_weight(weights).transforms()
    sizes = {"image_size": own.crop_size[0], "patch_size": patch, "hidden_dim": width, "num_heads": heads}
    found = checkpoints.load(torchvision_model(**sizes, num_layers=1)).preprocess
    assert ([found.resize], list(found.size)) == (own.resize_size, own.crop_size * 2)
    assert (found.interpolation, list(found.mean), list(found.std)) == (own.interpolation.value, own.mean, own.std)


def test_dinov2_classifiers_may_be_replaced():
    model = transformers_model("Dinov2ForImageClassification", DINO | {"num_labels": 5})
    model.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(96, 3))
    model.eval()
    pixels = testing.make(2, 3, 42, 42)
    engine = Engine(checkpoints.load(model), device=testing.device(), dtype="fp32", backend="torch")
    with torch.no_grad():
        peers.close(engine(pixels).logits.cpu(), model(pixels.cpu()).logits)


def test_parametrize_has_a_way_back():
    """What the refusal says to do."""
    model = timm_model(**TIMM)
    parametrizations.weight_norm(model.blocks[0].attn.proj)
    parametrize.remove_parametrizations(model.blocks[0].attn.proj, "weight")
    assert_served(model)


def test_what_a_block_of_ones_own_gives_is_contiguous():
    """Whatever its strides are: a norm of ours may come next."""

    class TokensFirst(nn.Module):
        def forward(self, x):
            return (x * 2).transpose(0, 1).contiguous().transpose(0, 1)

    x = testing.make(2, 5, 8)
    plan = Engine(checkpoints.load(vit()), device=testing.device(), dtype="fp32", backend="torch").plan
    assert not TokensFirst()(x).is_contiguous()
    y, _ = own_block(TokensFirst(), x, plan)
    assert y.is_contiguous() and torch.equal(y, x * 2)
