"""accelerate: the same calls, types and values, with the blocks on the engine; or the model's own code, and why."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import peers
from helpers.transformers_models import CLIP_TEXT, SWIN, text

import vitfast
from vitfast.diagnostics.differences import flatten
from vitfast.integrations import trunk as trunk_module
from vitfast.integrations.accelerate import accelerated, restore
from vitfast.models import positions, vit
from vitfast.ops import accuracy
from vitfast.testing import make

CLIP = {"vision_config": peers.VIT, "text_config": CLIP_TEXT, "projection_dim": 24}


@pytest.fixture
def ran(monkeypatch):
    """How often blocks of the engine ran."""
    made = []
    original = vit.run_block

    def counted(config, weights, i, x, stats, plan, place):
        made.append(plan)
        return original(config, weights, i, x, stats, plan, place)

    monkeypatch.setattr(vit, "run_block", counted)
    return made


def timm_vit(**kwargs):
    return peers.timm_model(**(peers.TIMM | kwargs))


def images(size=32):
    return make(2, 3, size, size)


def same(expected, actual):
    """Check that two outputs are of the same types, and equal but for rounding."""
    assert type(actual) is type(expected)
    want, got = flatten(expected), flatten(actual)
    assert list(want) == list(got)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert not got[name].requires_grad
        peers.close(got[name], tensor)


def check(model, *calls, ran, blocks=2):
    """Accelerate a model, and compare each call with that of a copy made before."""
    own = copy.deepcopy(model)
    assert vitfast.accelerate(model, strict=True) is model
    for call in calls:
        ran.clear()
        with torch.inference_mode():
            expected, actual = call(own), call(model)
        assert len(ran) == blocks
        same(expected, actual)


@pytest.mark.parametrize("changes", [{}, {"class_token": False, "global_pool": "avg"}, {"num_classes": 0}], ids=str)
def test_timm(ran, changes):
    x = images()
    check(
        timm_vit(**changes),
        lambda m: m(x),
        lambda m: m.forward_features(x),
        lambda m: m.get_intermediate_layers(x, n=[0, 1], reshape=True, norm=True),
        lambda m: m.forward_intermediates(x, indices=[0], norm=True, output_dict=True),
        ran=ran,
    )


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch32_clip_224"]
)
def test_timm_kin(ran, name):
    x = images()
    check(peers.timm_model(name, **peers.TIMM), lambda m: m(x), ran=ran)


def test_torchvision(ran):
    x = images()
    check(peers.torchvision_model(), lambda m: m(x), ran=ran)


FULL = ("ViTMSNModel", "Aimv2VisionModel", "IJepaModel")
TRANSFORMERS = {
    "DINOv3ViTModel": peers.VIT | {"num_register_tokens": 2},
    "SiglipVisionModel": peers.VIT,
    **dict.fromkeys(FULL, peers.VIT),
    "ViTModel": peers.VIT,
    "ViTForImageClassification": peers.VIT,
    "DeiTForImageClassificationWithTeacher": peers.VIT,
    "Dinov2Model": peers.DINO,
    "Dinov2ForImageClassification": peers.DINO,
    "Dinov2WithRegistersModel": peers.DINO,
    "CLIPVisionModel": peers.VIT,
    "CLIPVisionModelWithProjection": peers.VIT,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in TRANSFORMERS]
)
def test_transformers(ran, name):
    settings = TRANSFORMERS[name]
    x, other = images(settings["image_size"]), images(settings["patch_size"] * 6)
    interpolates = name.startswith(("ViTModel", "ViTFor", "DeiT", "CLIP", "Siglip"))
    resized = {"interpolate_pos_encoding": True} if interpolates else {}
    check(
        peers.transformers_model(name, settings),
        lambda m: m(x),
        lambda m: m(x, output_hidden_states=True),
        lambda m: m(x, return_dict=False),
        lambda m: m(pixel_values=other if interpolates or name.upper().startswith("DINO") else x, **resized),
        ran=ran,
    )


def test_shuffled_tokens_and_sizes_told_to_blocks(ran):
    """ViTMAE shuffles its tokens; BEiT without relative positions tells its blocks the image's size all the same."""
    for name, settings in (("ViTMAEModel", peers.VIT | {"mask_ratio": 0.5}), ("BeitForImageClassification", peers.VIT)):
        model, own = (peers.transformers_model(name, settings) for _ in range(2))
        vitfast.accelerate(model, strict=True)
        ran.clear()
        outputs = []
        for m in (own, model):
            torch.manual_seed(3)
            with torch.inference_mode():
                outputs.append(m(images()))
        assert len(ran) == 2
        same(*outputs)


def test_the_vision_tower_inside_a_clip(ran):
    inputs = {"pixel_values": images(), **text()}
    model = peers.transformers_model("CLIPModel", CLIP)
    check(model, lambda m: m(**inputs), ran=ran)
    assert list(accelerated(model)) == ["vision_model"]


def test_the_vision_tower_inside_a_language_model(ran):
    library = peers.import_transformers()
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = library.LlavaConfig(
        vision_config=library.CLIPVisionConfig(**peers.VIT),
        text_config=library.LlamaConfig(vocab_size=99, **llama),
        image_token_index=98,
        vision_feature_layer=-1,
    )
    ids = torch.tensor([[1] + [98] * 16 + [5, 6]] * 2)
    inputs = {"input_ids": ids, "pixel_values": images(), "attention_mask": torch.ones_like(ids), "use_cache": False}
    check(peers.transformers_model("LlavaForConditionalGeneration", config), lambda m: m(**inputs), ran=ran)


def test_another_library_is_not_touched(ran):
    """A model of nobody's, around a timm model."""
    x = images()
    model = torch.nn.Sequential(timm_vit(num_classes=0), torch.nn.LayerNorm(48))
    check(model, lambda m: m(x), ran=ran)
    assert list(accelerated(model)) == ["0"]


PLACED = {
    "vit_small_patch16_dinov3": {"depth": 2, "img_size": 64},
    "beit_base_patch16_224": {"depth": 2, "img_size": 64, "embed_dim": 48, "num_heads": 3},
    "vit_srelpos_small_patch16_224": {"depth": 2, "img_size": 64},
}


@pytest.mark.parametrize("name", [n if n == "vit_small_patch16_dinov3" else pytest.param(n, marks=pytest.mark.full)
                                  for n in PLACED])  # fmt: skip
def test_blocks_that_depend_on_where_their_tokens_are(ran, name):
    """Rotary and relative positions: the size of the images is noted where they are cut into patches."""
    model = peers.timm_model(name, **PLACED[name])
    own = copy.deepcopy(model)
    check(model, lambda m: m(images(64)), ran=ran)
    copied = pickle.loads(pickle.dumps(model))
    for x in (make(1, 3, 80, 112), make(1, 3, 112, 80)) if "dinov3" in name else (images(64),):
        for made in (model, copied):
            ran.clear()
            peers.close(logits(made, x), logits(own, x))
            assert len(ran) == 2
    trunk = accelerated(model)[""]
    tokens = torch.randn(1, trunk.checkpoint().config.tokens() + 1, model.embed_dim)
    assert trunk._misplaced(tokens).startswith(f"it has {tokens.shape[1]} tokens, of an image of ")
    trunk._last.size = None
    assert trunk._misplaced(tokens) == "the size of its image is not known"
    restore(model)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_positions_that_are_the_models_own_at_one_size_only(ran, monkeypatch):
    monkeypatch.setattr("vitfast.models.positions._coordinates", _wrong_coordinates(positions._coordinates))
    name = "vit_small_patch16_dinov3"
    model, own = peers.timm_model(name, **PLACED[name]), peers.timm_model(name, **PLACED[name])
    check(model, lambda m: m(images(64)), ran=ran)
    ran.clear()
    peers.close(logits(model, make(1, 3, 80, 96)), logits(own, make(1, 3, 80, 96)))
    assert not ran
    assert "positions are known to be the model's own at (64, 64) only" in accelerated(model)[""].refusal


def _wrong_coordinates(right):
    return lambda config, axis, side: right(config, axis, side) * (1 if side == 4 else 1.5)


@torch.inference_mode()
def logits(model, x):
    return model(x)


def test_copies_are_accelerated_and_compute_with_their_own_weights(ran):
    model, x = timm_vit(), images()
    expected = logits(model, x)
    vitfast.accelerate(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.blocks[0].mlp.fc2.weight)
    for made in copies:
        ran.clear()
        peers.close(logits(made, x), expected)
        assert len(ran) == 2
        assert accelerated(made)[""].blocks[0] is made.blocks[0]


def changes_weights(how):
    """Ways to change a model's weights in place."""

    def load(model, state):
        model.load_state_dict(state)

    def assign(model, state):
        model.load_state_dict(state, assign=True)

    def step(model, state):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state[name])

    def data(model, state):
        for name, parameter in model.named_parameters():
            parameter.data = state[name].clone()

    return {"load": load, "assign": assign, "step": step, "data": data}[how]


@pytest.mark.parametrize("how", ["load", "assign", "step", "data"])
def test_changed_weights_are_read_anew(ran, how):
    model, x = vitfast.accelerate(timm_vit()), images()
    before = logits(model, x)
    other = peers.randomised(timm_vit())
    changes_weights(how)(model, other.state_dict())
    ran.clear()
    peers.close(logits(model, x), expected := logits(other, x))
    assert len(ran) == 2
    assert (before - expected).abs().max() > 0.1
    assert model.state_dict().keys() == other.state_dict().keys()


def test_weights_that_cannot_be_run_leave_the_model_to_itself(ran):
    model, x = vitfast.accelerate(timm_vit()), images()
    model.blocks[1].mlp.fc1.weight.data[0, 0] = float("nan")
    model.blocks[1].mlp.fc1.weight.data = model.blocks[1].mlp.fc1.weight.data.clone()
    ran.clear()
    with pytest.warns(UserWarning, match=r"its blocks run their own code now: (.|\n)*fc1.weight holds 1 NaN"):
        assert logits(model, x).isnan().any()
    assert len(ran) == 1  # the block before, which is what it was
    logits(model, x)
    assert len(ran) == 1


def test_another_dtype(ran):
    model, x = vitfast.accelerate(timm_vit()), images()
    own = timm_vit().bfloat16()
    model.bfloat16()
    ran.clear()
    got, want = logits(model, x.bfloat16()), logits(own, x.bfloat16())
    assert len(ran) == 2
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= accuracy.MODEL_TOLERANCES[torch.bfloat16].error * want.abs().max()
    ran.clear()
    with pytest.warns(UserWarning, match="dtype must be one of"):
        got = logits(model.double(), x.double())
    assert not ran
    torch.testing.assert_close(got, logits(own.double(), x.double()))


def test_blocks_in_another_dtype_than_the_model(ran):
    x = images()
    want = logits(timm_vit(), x)
    model = vitfast.accelerate(timm_vit(), dtype="bf16", strict=True)
    ran.clear()
    got = logits(model, x)
    assert len(ran) == 2
    assert all(plan is accelerated(model)[""].runner(x.device).plan for plan in ran)
    assert got.dtype == torch.float32
    difference = (got - want).abs().max() / want.abs().max()
    assert 1e-5 < difference <= accuracy.MODEL_TOLERANCES[torch.bfloat16].error


def test_autocast_is_the_dtype_of_the_blocks(ran):
    model, own, x = vitfast.accelerate(timm_vit()), timm_vit(), images()
    ran.clear()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = logits(model, x), logits(own, x)
    assert len(ran) == 2
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= accuracy.MODEL_TOLERANCES[torch.bfloat16].error * want.abs().max()


def test_training_and_gradients_are_the_models_own(ran):
    model, own, x = vitfast.accelerate(timm_vit()), timm_vit(), images()
    ran.clear()
    for mode in (True, False):
        model.train(mode), own.train(mode)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model(x).square().sum().backward()
            model(x)
        assert [str(w.message).startswith("VisionTransformer: gradients are enabled") for w in told] == [True] * (
            not mode
        )
        own(x).square().sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), own.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), name
    assert not ran
    model.requires_grad_(False)
    model(x)
    assert len(ran) == 2
    assert not model(x).requires_grad


def test_hooks(ran):
    x = images()
    model, own = vitfast.accelerate(timm_vit()), timm_vit()
    for m in (model, own):  # on a block: what it makes is changed
        handle = m.blocks[0].register_forward_hook(lambda module, args, output: output * 0.5)
    ran.clear()
    peers.close(logits(model, x), logits(own, x))
    assert len(ran) == 2
    for m in (model, own):  # inside a block: that one runs its own code
        handle = m.blocks[0].attn.register_forward_hook(lambda module, args, output: output * 0.5)
        m.blocks[1].mlp.forward = lambda h: h
    ran.clear()
    peers.close(logits(model, x), logits(own, x))
    assert not ran
    assert accelerated(model)[""].refusal == "Mlp inside it has a patched forward"
    del model.blocks[1].mlp.forward
    handle.remove()
    ran.clear()
    logits(model, x)
    assert len(ran) == 1


def test_a_model_with_hooks_and_patches_is_accelerated(ran):
    """What loading refuses by name: here the hook runs, and so does the block that is patched inside."""
    model, x = timm_vit(depth=3), images()
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 0.5)
    model.blocks[-1].attn.forward = lambda h, **kwargs: torch.zeros_like(h)
    model.patch_embed.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match=r"a forward hook \(.*vitfast.accelerate leaves hooks their work\) is not"):
        vitfast.load(model)
    expected = logits(model, x)
    vitfast.accelerate(model, strict=True)
    ran.clear()
    peers.close(logits(model, x), expected)
    assert len(ran) == 2
    for block in model.blocks:
        block.attn.forward = lambda h, **kwargs: torch.zeros_like(h)
    with pytest.raises(ValueError, match="0 of its 3 blocks could be tried: Attention inside it has a patched forward"):
        vitfast.accelerate(model, strict=True)


def test_masks_and_attention_weights_are_the_models_own(ran):
    x = images(32)
    model = peers.transformers_model("ViTModel", peers.VIT)
    model.set_attn_implementation("eager")
    own = copy.deepcopy(model)
    vitfast.accelerate(model)
    ran.clear()
    with torch.inference_mode():
        for kwargs in ({"output_attentions": True}, {"attention_mask": torch.tensor([[1] * 17, [1] * 9 + [0] * 8])}):
            same(own(x, **kwargs), model(x, **kwargs))
        assert not ran
        model.config.output_attentions = own.config.output_attentions = True
        same(own(x), model(x))
        assert not ran
        model.config.output_attentions = False
        model(x)
        assert len(ran) == 2


def test_changed_structure_is_the_models_own(ran):
    """A layer in place of another, after acceleration."""
    x = images()
    model, own = vitfast.accelerate(timm_vit()), timm_vit()
    for m in (model, own):
        torch.manual_seed(0)
        m.blocks[0].mlp = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.Tanh())
    ran.clear()
    with pytest.warns(UserWarning, match="its blocks run their own code now"):
        peers.close(logits(model, x), logits(own, x))
    assert not ran


def test_restore(ran):
    model, x = timm_vit(), images()
    kinds = [type(part) for part in model.modules()]
    vitfast.accelerate(model)
    vitfast.accelerate(model)  # a second time: no layer upon layer
    restore(model)
    assert [type(part) for part in model.modules()] == kinds
    assert not any("vitfast" in name for part in model.modules() for name in vars(part))
    ran.clear()
    logits(model, x)
    assert not ran


def test_a_wrong_engine_is_refused_and_the_model_unchanged(monkeypatch):
    model, x = timm_vit(init_values=1e-5), images()
    expected = logits(model, x)
    original = vit.run_block

    def wrong(config, weights, i, x, *args):
        made, stats = original(config, weights, i, x, *args)
        return x + 1.001 * (made - x), stats

    monkeypatch.setattr(vit, "run_block", wrong)
    with pytest.raises(ValueError, match="block 0 differs from its own code by"):
        vitfast.accelerate(model, strict=True)
    assert not accelerated(model)
    assert torch.equal(logits(model, x), expected)


def test_hierarchical_models_get_the_attention_swap_and_say_so(calls):
    model = peers.transformers_model("SwinModel", SWIN)
    x = images()
    with pytest.raises(ValueError, match=r"not accelerated:\n  SwinModel: .*SwinModel is not supported"):
        vitfast.accelerate(model, strict=True)
    want = logits(model, x).last_hidden_state
    assert not calls
    with pytest.warns(UserWarning, match=r"only attention is replaced \(2 modules, 0 left\)(.|\n)*SwinModel"):
        assert vitfast.accelerate(model) is model
    peers.close(logits(model, x).last_hidden_state, want)
    assert len(calls) == 2
    restore(model)
    logits(model, x)
    assert len(calls) == 2


def test_what_cannot_be_accelerated_is_refused():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got str"):
        vitfast.accelerate("vit")
    with pytest.raises(ValueError, match=r"nothing in this model can be accelerated:\n  Linear: torch.nn"):
        vitfast.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dtype must be one of"):
        vitfast.accelerate(timm_vit(), dtype="fp8")


def test_a_part_that_cannot_run_is_named():
    model = torch.nn.ModuleList([timm_vit(), timm_vit()])
    model[1].blocks[0].attn.q_norm = torch.nn.Tanh()
    with pytest.warns(UserWarning, match=r"not accelerated and run as they are:\n  1 \(VisionTransformer\): .*Tanh"):
        vitfast.accelerate(model)
    assert list(accelerated(model)) == ["0"]


def test_training_mode_is_left_as_it_was():
    model = timm_vit().train()
    model.blocks[1].eval()
    before = [part.training for part in model.modules()]
    vitfast.accelerate(model)
    assert [part.training for part in model.modules()] == before


def test_row_statistics_go_from_block_to_block(monkeypatch, ran):
    """With folded norms each block takes the statistics that the one before has made, as in the engine's forward."""
    model, x = timm_vit(), images()
    want = logits(model, x)
    asked = []
    original = vit.first_stats
    monkeypatch.setattr(trunk_module.vit, "first_stats", lambda plan, x: asked.append(1) or original(plan, x))
    vitfast.accelerate(model, strict=True)
    trunk = accelerated(model)[""]
    folded = trunk_module.Runner(trunk.checkpoint(), device=x.device, dtype=x.dtype, backend="triton")
    assert folded.plan.fold_norm
    trunk._runners[torch.float32] = folded
    asked.clear()
    peers.close(logits(model, x), want)
    assert len(asked) == 1
    asked.clear()
    hidden = model.patch_embed(x)
    with torch.inference_mode():
        made = model.blocks[0](hidden)
        made += 1  # no longer what the statistics were made of
        other = model.blocks[1](made)
    assert len(asked) == 2
    restore(model)
    with torch.inference_mode():
        peers.close(other, model.blocks[1](made))
