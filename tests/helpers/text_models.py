"""Small whole CLIP and SigLIP models in a folder, with a tokenizer that knows single letters."""

import json

from helpers import peers
from helpers.transformers_models import CLIP_TEXT

WORDS = [*"abcdefghijklmnopqrstuvwxyz.!", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz.!")]
START, END = "<|startoftext|>", "<|endoftext|>"
TEXT = CLIP_TEXT | {"num_hidden_layers": 2, "max_position_embeddings": 24, "layer_norm_eps": 0.02}
SIGLIP_TEXT = TEXT | {"vocab_size": 70, "projection_size": 48}


def save_tokenizer(folder):
    """A tokenizer of CLIP's kind that knows single letters; its files are those of the family."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END,
                    "pad_token": END, "model_max_length": 24})
    )  # fmt: skip
    return vocabulary


def save(folder, name, eos=2):
    """A small whole model with its processor's settings, and transformers' own of it."""
    library = peers.import_transformers()
    text = {"CLIPModel": TEXT | {"vocab_size": 58, "eos_token_id": eos}, "SiglipModel": SIGLIP_TEXT}[name]
    config = getattr(library, name).config_class(
        vision_config=peers.VIT, text_config=text, **({"projection_dim": 24} if name == "CLIPModel" else {})
    )
    model = peers.transformers_model(name, config)
    model.save_pretrained(folder)
    kind = name.removesuffix("Model").upper().replace("SIGLIP", "Siglip")
    settings = {"image_processor_type": f"{kind}ImageProcessor", "size": {"height": 32, "width": 32}}
    settings |= {"crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model
