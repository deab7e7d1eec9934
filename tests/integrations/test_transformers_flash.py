"""transformers with attn_implementation="vitfast_flash": padding taken out, images packed, no mask lost."""

import pytest
import torch
from helpers import peers
from helpers import transformers_models as plain
from helpers.peers import close
from torch import nn

import vitfast
from vitfast.attention import flash_attn, sdpa
from vitfast.integrations import transformers as integration
from vitfast.integrations.transformers_attention import FLASH_NAME, attention_forward, flash_attention_forward
from vitfast.testing import device, make

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
RIGHT, LEFT = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
RIGHT[1, 5:] = 0
LEFT[1, :4] = 0
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
LAYERS = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
CLIP = LAYERS | {"num_attention_heads": 4, "max_position_embeddings": 9, "eos_token_id": 49, "pad_token_id": 1}
GEMMA = LAYERS | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attn_logit_softcapping": 2.0}
GEMMA |= {"sliding_window": 3}
LLAMA = LAYERS | {"num_attention_heads": 4, "num_key_value_heads": 2}
MODERN = LAYERS | {"num_attention_heads": 4, "local_attention": 4, "global_attn_every_n_layers": 2, "pad_token_id": 0}
MODERN |= {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
QWEN2 = {"depth": 2, "embed_dim": 32, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
QWEN25 = {"depth": 2, "hidden_size": 32, "out_hidden_size": 24, "num_heads": 2, "intermediate_size": 48}
QWEN25 |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}


@pytest.fixture
def calls(monkeypatch):
    """Which of vitfast's functions ran, in order."""
    made = []
    for module, name in (
        (flash_attn, "flash_attn_func"),
        (flash_attn, "flash_attn_varlen_func"),
        (sdpa, "scaled_dot_product_attention"),
    ):
        original = getattr(module, name)

        def counted(*args, original=original, name=name, **kwargs):
            made.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return made


def qwen(version):
    """A Qwen vision tower, and two images of different sizes, packed."""
    peers.import_transformers()
    if version == "Qwen2":
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig as Config
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Model
    else:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig as Config
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Model
    torch.manual_seed(0)
    model = peers.randomised(Model(Config(**(QWEN2 if version == "Qwen2" else QWEN25)))).to(device())
    grid = torch.tensor([[1, 4, 4], [1, 4, 6]], device=device())
    return model, {"hidden_states": make(16 + 24, 3 * 2 * 4 * 4), "grid_thw": grid}


def text(name, settings, **inputs):
    """A text model, its inputs, and which positions of its output are real."""
    model = peers.transformers_model(name, settings).to(device())
    inputs = {"input_ids": IDS[: len(inputs.get("position_ids", IDS))], **inputs}
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return model, {key: value.to(device()) for key, value in inputs.items()}, real.to(device())


def outputs(model, name, inputs):
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(**inputs)


integration_registered = pytest.fixture(autouse=True)(lambda: peers.import_transformers() and integration.register())


@pytest.mark.parametrize("version", ["Qwen2", "Qwen2.5"])
def test_packed_images(version, calls):
    """One varlen call a layer, not one call an image; windows of Qwen2.5 are sequences too."""
    model, inputs = qwen(version)
    expected = outputs(model, "eager", inputs).last_hidden_state
    close(outputs(model, FLASH_NAME, inputs).last_hidden_state, expected)
    assert calls.count("flash_attn_varlen_func") == 2
    with sdpa.attention_backend("triton"):
        close(outputs(model, FLASH_NAME, inputs).last_hidden_state, expected)
    joined = inputs | {"grid_thw": torch.tensor([[1, 4, 10]], device=device())}  # as if it were one image
    assert (outputs(model, FLASH_NAME, joined).last_hidden_state - expected).abs().max() > 0.01 * expected.abs().max()


TEXTS = {
    "CLIP": ("CLIPTextModel", CLIP, {"attention_mask": RIGHT}),
    "Gemma2 right": ("Gemma2Model", GEMMA, {"attention_mask": RIGHT}),
    "Gemma2 left": ("Gemma2Model", GEMMA, {"attention_mask": LEFT}),
    "ModernBert": ("ModernBertModel", MODERN, {"attention_mask": RIGHT}),
}
"""Causal with padding; softcap, window and fewer key heads; a window to both sides."""


@pytest.mark.parametrize("key", TEXTS)
def test_padding_softcap_and_windows(key, calls):
    name, settings, inputs = TEXTS[key]
    model, inputs, real = text(name, settings, **inputs)
    if name == "CLIPTextModel":
        inputs["input_ids"][:, 4] = 49  # its end of text, behind which the padding lies
    eager = outputs(model, "eager", inputs)
    flash = outputs(model, FLASH_NAME, inputs)
    close(flash.last_hidden_state[real], eager.last_hidden_state[real])
    if name == "CLIPTextModel":
        close(flash.pooler_output, eager.pooler_output)
    assert [call for call in calls if call.startswith("flash")] == ["flash_attn_varlen_func"] * 2
    unpadded = outputs(model, FLASH_NAME, inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})
    if not key.endswith("right") and key != "CLIP":  # there causality hides the padding already
        assert (unpadded.last_hidden_state - eager.last_hidden_state)[real].abs().max() > 0.01
    with sdpa.attention_backend("triton"):
        kernels = outputs(model, FLASH_NAME, inputs).last_hidden_state
    close(kernels[real], eager.last_hidden_state[real])


def test_window_matters():
    model, inputs, _ = text("Gemma2Model", GEMMA)
    narrow = outputs(model, FLASH_NAME, inputs).last_hidden_state
    wide, _, _ = text("Gemma2Model", GEMMA | {"sliding_window": 9})
    close(narrow, outputs(model, "eager", inputs).last_hidden_state)
    assert (narrow - outputs(wide, FLASH_NAME, inputs).last_hidden_state).abs().max() > 0.01


def test_packed_texts_keep_their_mask(calls):
    """Positions that start again mean several texts in one row: more than flash-attn can be told without lengths."""
    model, inputs, _ = text("LlamaModel", LLAMA, position_ids=PACKED)
    inputs["use_cache"] = False
    expected = outputs(model, "eager", inputs).last_hidden_state
    close(outputs(model, FLASH_NAME, inputs).last_hidden_state, expected)
    assert calls == ["scaled_dot_product_attention"] * 2
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32, device=device())
    told = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
    rows = inputs | {"position_ids": torch.arange(9, device=device())[None]}
    apart = outputs(model, FLASH_NAME, rows | told).last_hidden_state
    assert calls[2:].count("flash_attn_varlen_func") == 2
    alone = outputs(model, "eager", {"input_ids": inputs["input_ids"][:, 4:], "use_cache": False})
    close(apart[:, 4:], alone.last_hidden_state)  # rotary positions are relative


def test_cached_generation():
    library = peers.import_transformers()
    model, inputs, _ = text("LlamaForCausalLM", LLAMA, attention_mask=LEFT)
    found = {}
    for name in ("eager", FLASH_NAME):
        model.set_attn_implementation(name)
        found[name] = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found[FLASH_NAME], found["eager"])
    prompt, cache = {"input_ids": inputs["input_ids"]}, {}
    for name in ("eager", FLASH_NAME):  # a cache with free places, and no mask that says so
        cache[name] = library.StaticCache(model.config, max_cache_len=16)
        found[name] = outputs(model, name, prompt | {"past_key_values": cache[name]}).logits
    close(found[FLASH_NAME], found["eager"])


@pytest.mark.parametrize("name", ["ViTModel", "Siglip2VisionModel", "BeitModel", "SwinModel", "DetrForObjectDetection"])
def test_vision_models(name, calls):
    """Also models that are not written for FlashAttention: their masks stay masks, in SigLIP2's head too."""
    settings, inputs, count = plain.FAMILIES[name]
    if name == "Siglip2VisionModel":
        settings = plain.SIGLIP2
    model, inputs = plain.build(name, settings), inputs()
    expected = plain.run(model, inputs)
    for config in integration._configs(model):  # as building it with the name does
        config._attn_implementation_internal = FLASH_NAME
    close(plain.run(model, inputs), expected)
    assert ("flash_attn_varlen_func" in calls) == (name == "DetrForObjectDetection")
    assert ("flash_attn_func" in calls) == (name in ("ViTModel", "DetrForObjectDetection"))
    assert len(calls) >= count


def test_built_with_the_name(calls):
    library = peers.import_transformers()
    config = library.ViTConfig(**peers.VIT, attn_implementation=FLASH_NAME)
    model, inputs = plain.build("ViTModel", config), plain.images()
    actual = plain.run(model, inputs)
    assert calls == ["flash_attn_func", "flash_attn_func"]
    close(actual, plain.run(plain.build("ViTModel", peers.VIT), inputs))
    assert integration.load_flash(lambda *names: names, "flash_attention_2", 1) == ("flash_attention_2", 1)
    with vitfast.replace_attention(model, strict=True) as swap:  # which leaves it as it is
        assert len(swap.replaced) == 2
        assert model.config._attn_implementation == FLASH_NAME
    assert model.config._attn_implementation == FLASH_NAME


def masks(name, kind, **settings):
    """What a text model with this implementation is given by one of transformers' mask functions."""
    library = peers.import_transformers()
    from transformers import masking_utils

    config = library.MistralConfig(**LLAMA, sliding_window=3, attn_implementation=name)
    make_mask = getattr(masking_utils, f"create_{kind}_mask")
    arguments = {"inputs_embeds": torch.zeros(2, 9, 32), "attention_mask": None, "past_key_values": None} | settings
    if "bidirectional" in kind:
        del arguments["past_key_values"]
    return make_mask(config=config, **arguments)


def test_which_masks_are_made_in_full():
    def neighbours(batch, head, query, key):
        return (query - key).abs() < 2

    for kind in ("causal", "sliding_window_causal", "bidirectional", "bidirectional_sliding_window"):
        assert masks(FLASH_NAME, kind) is None
        assert torch.equal(masks(FLASH_NAME, kind, attention_mask=LEFT), LEFT.bool())
    for kind, settings in (
        ("causal", {"or_mask_function": neighbours}),
        ("bidirectional", {"and_mask_function": neighbours}),
        ("sliding_window_causal", {"or_mask_function": neighbours}),
        ("causal", {"position_ids": PACKED}),
    ):
        found = masks(FLASH_NAME, kind, **settings)
        assert found.shape[1:] == (1, 9, 9), kind
        assert torch.equal(found, masks("sdpa", kind, **settings))


def reference(q, k, v, mask, softcap=None):
    """softmax attention in float64 on [B, H, N, D]; mask True is seen."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0)
    return (weights @ v).transpose(1, 2).float()


@pytest.mark.parametrize(("side", "queries"), [("left", 1), ("left", 3), ("left", 7), ("right", 1), ("right", 7)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_function(queries, causal, window, side):
    """Queries are the last of 7 tokens; 2 places of the cache beyond them hold NaN."""
    q, k, v = make(2, 4, queries, 8), make(2, 2, 9, 8, seed=1), make(2, 2, 9, 8, seed=2)
    k[:, :, 7:] = v[:, :, 7:] = float("nan")
    mask = torch.ones(2, 7, dtype=torch.long, device=device())
    mask[1, 5:] = 0
    mask = mask.flip(1) if side == "left" else mask
    key, query = torch.arange(7, device=device()), torch.arange(7, device=device())[7 - queries :, None]
    seen = mask.bool()[:, None, None, :].expand(2, 1, queries, 7)
    seen = seen & (key <= query) if causal else seen
    seen = seen & ((key - query).abs() < window) if window else seen
    layer = nn.Identity()
    arguments = {"is_causal": causal, "sliding_window": window, "softcap": 1.5}
    actual, weights = flash_attention_forward(layer, q, k, v, mask, **arguments)
    expected = reference(q, k[:, :, :7], v[:, :, :7], seen, 1.5)
    if causal or window:
        expected = expected * mask[:, 7 - queries :, None, None]
    close(actual, expected)
    assert weights is None
    assert actual.is_contiguous()


def test_function_without_padding():
    q, k, v = make(2, 4, 5, 8), make(2, 2, 7, 8, seed=1), make(2, 2, 7, 8, seed=2)
    layer, distance = nn.Identity(), torch.arange(7) - torch.arange(2, 7)[:, None]
    for arguments, seen in (
        ({"is_causal": False}, distance < 9),
        ({}, distance <= 0),
        ({"sliding_window": 2}, (distance <= 0) & (distance > -2)),
        ({"sliding_window": 2, "is_causal": False}, distance.abs() < 2),
    ):
        close(flash_attention_forward(layer, q, k, v, None, **arguments)[0], reference(q, k, v, seen.to(device())))
    mask = make(2, 1, 5, 7) > 0  # in full: as "vitfast" has it
    close(flash_attention_forward(layer, q, k, v, mask)[0], attention_forward(layer, q, k, v, mask)[0])
    with torch.autocast(device().type, dtype=torch.bfloat16):
        assert flash_attention_forward(layer, q, k.bfloat16(), v, None)[0].dtype == torch.bfloat16


def test_gradients_of_padded_queries():
    q, k, v = (make(2, 2, 6, 8, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=device())
    seen = mask.bool()[:, None, None, :] & torch.ones(6, 6, dtype=torch.bool, device=device()).tril()
    actual, _ = flash_attention_forward(nn.Identity(), q, k, v, mask)
    expected = reference(q, k, v, seen) * mask[..., None, None]
    for got, want in zip(
        torch.autograd.grad(actual.sin().sum(), (q, k, v)), torch.autograd.grad(expected.sin().sum(), (q, k, v)),
        strict=True,
    ):  # fmt: skip
        close(got, want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s_aux": torch.ones(2)}, "s_aux=Tensor"),
        ({"position_bias": torch.ones(1, 2, 5, 5)}, "position_bias=Tensor"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"cache": {}}, "cache=dict"),
        ({"max_length_q": 5}, "None are cu_seq_lens_q, cu_seq_lens_k, max_length_k"),
        ({"attention_mask": torch.ones(1, 6)}, r"\(1, 6\) does not fit 5 queries and 5 keys"),
        ({"attention_mask": torch.ones(1, 4)}, r"\(1, 4\) does not fit 5 queries and 5 keys"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]]), "sliding_window": 2}, "between real tokens"),
        ({"attention_mask": torch.ones(1, 1, 5, 5), "softcap": 2.0}, "softcap=2.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(arguments, message):
    q = make(1, 2, 5, 8)
    arguments = {name: x.to(device()) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        flash_attention_forward(nn.Identity(), q, q, q, **{"attention_mask": None, **arguments})
