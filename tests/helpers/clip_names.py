"""Weights of transformers' CLIP by the names of OpenAI's and open_clip's state dicts."""

import torch

_BLOCK = {
    "layer_norm1.": "ln_1.",
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_REST = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "logit_scale": "logit_scale",
}


def openai_names(model):
    """The state dict of a CLIPModel as OpenAI's `clip` and `open_clip` name it."""
    state, made = model.state_dict(), {}
    for tower, ours, depth in (
        ("vision_model", "visual.transformer", model.config.vision_config.num_hidden_layers),
        ("text_model", "transformer", model.config.text_config.num_hidden_layers),
    ):
        for i in range(depth):
            block, named = f"{tower}.encoder.layers.{i}.", f"{ours}.resblocks.{i}."
            for kind in ("weight", "bias"):
                parts = [state[f"{block}self_attn.{p}_proj.{kind}"] for p in "qkv"]
                made[f"{named}attn.in_proj_{kind}"] = torch.cat(parts)
                for theirs, other in _BLOCK.items():
                    made[f"{named}{other}{kind}"] = state[f"{block}{theirs}{kind}"]
    for theirs, other in _REST.items():
        made |= {name.replace(theirs, other): t for name, t in state.items() if name.startswith(theirs)}
    made["visual.proj"] = state["visual_projection.weight"].T
    made["text_projection"] = state["text_projection.weight"].T
    return made
