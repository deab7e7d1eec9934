"""Settings of files that nobody would write by hand: every answer names the file, the field and the value."""

import dataclasses
import json
import math
import random
import warnings

import pytest
import torch
from helpers import peers
from helpers.peers import DINO, TEXT, TIMM, VIT, timm_model, transformers_model
from safetensors.torch import save_file

from vitfast.models import checkpoints, schema
from vitfast.models.checkpoints import CheckpointError
from vitfast.models.config import ViTConfig

HOSTILE = (
    -1, 0, 1, 2, 7, 10**9, 10**30, 2**63, -(10**18), 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf, True, False,
    "", "x", "64", "nan", "\u0000", "a" * 5000, [], [0], [1, 2], [[1, 2], [3, 4]], [10**9, 10**9], [None, None],
    ["x", 1], {}, {"a": 1}, {"0": {}}, {"x": "y"}, {"height": -1, "width": 1e9}, [1] * 1000,
)  # fmt: skip

PROCESSOR = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "do_center_crop": False,
    "crop_size": 32,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "image_processor_type": "ViTImageProcessor",
}
COMMON = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size",
    "patch_size", "num_channels", "id2label", "problem_type", "architectures", "head_dim", "num_labels",
)  # fmt: skip
CLASSES = {
    "ViTForImageClassification": (VIT | {"num_labels": 5}, (*COMMON, "intermediate_size", "qkv_bias")),
    "Dinov2WithRegistersForImageClassification": (
        DINO | {"num_labels": 5, "num_register_tokens": 2},
        (*COMMON, "mlp_ratio", "use_swiglu_ffn", "num_register_tokens", "qkv_bias"),
    ),
    "CLIPModel": (
        {"vision_config": VIT, "text_config": TEXT, "projection_dim": 20},
        ("vision_config", "projection_dim", *(f"vision_config.{name}" for name in COMMON[:8])),
    ),
}
TIMM_FIELDS = (
    "architecture", "num_classes", "global_pool", "pretrained_cfg", "model_args",
    *(f"model_args.{name}" for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes",
                                        "reg_tokens", "init_values", "mlp_ratio", "drop_path_rate", "in_chans",
                                        "qkv_bias", "norm_layer", "no_such_argument")),
    *(f"pretrained_cfg.{name}" for name in ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation",
                                            "label_names", "label_descriptions", "num_classes")),
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each kind of model -> (settings file, fields to change)."""
    found = {}
    for name, (config, fields) in CLASSES.items():
        folder = tmp_path_factory.mktemp(name)
        transformers_model(name, config).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        found[folder, "config.json"] = fields
        found[folder, "preprocessor_config.json"] = tuple(PROCESSOR)
    peers.import_timm()
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("timm")
    model = timm_model(**TIMM)
    save_for_hf(model, folder, model_args=dict(TIMM), safe_serialization=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    found[folder, "config.json"] = TIMM_FIELDS
    return found


def answer(folder, file, field, value) -> str:
    """What loading says with one setting changed, "" if it loads; raises whatever is no answer."""
    path = folder / file
    original = path.read_text()
    settings = json.loads(original)
    at = settings
    *parents, last = field.split(".")
    for parent in parents:
        at = at[parent]
    at[last] = value
    path.write_text(json.dumps(settings))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoints.load(folder)
        return "\n".join(str(warning.message) for warning in caught if "preprocessing unknown" in str(warning.message))
    except CheckpointError as error:
        return str(error)
    finally:
        path.write_text(original)


def check(folder, file, field, value) -> bool:
    """Whether loading refused the value, having checked that it says which file, field and value."""
    said = answer(folder, file, field, value)
    name = field.split(".")[-1]
    if said:
        assert f"{folder.name}/{file}" in said, (field, value, said)
        words = name.removesuffix("_type").replace("_", " ")
        assert name in said or words in said or name in ("pretrained_cfg", "model_args", "vision_config"), (
            field,
            value,
            said,
        )
        if isinstance(value, dict) and field in ("vision_config", "model_args", "pretrained_cfg", "id2label"):
            return True  # an object of defaults is no hostile one: what they come to is in the answer
        named = schema.shown(value)[:40]
        inside = str(value)[:40] if not isinstance(value, (dict, list)) else named
        assert named in said or inside in said or schema.shown(tuple(value))[:20] in said, (field, value, said)
    return bool(said)


def draw(folders, count, seed):
    chance = random.Random(seed)
    cases = sorted(folders, key=str)
    for _ in range(count):
        folder, file = chance.choice(cases)
        yield folder, file, chance.choice(folders[folder, file]), chance.choice(HOSTILE)


def test_hostile_settings_get_an_answer(folders):
    refused = [check(*case) for case in draw(folders, 100, seed=1)]
    assert sum(refused) > 50


@pytest.mark.full
def test_a_thousand_hostile_settings_get_an_answer(folders):
    refused = [check(*case) for case in draw(folders, 1000, seed=2)]
    assert sum(refused) > 500


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_hidden_layers", 10**9, "a whole number from 1 to 1,024, got 1000000000"),
        ("layer_norm_eps", -1, "a number from 0 to 1, got -1"),
        ("layer_norm_eps", math.nan, "a number from 0 to 1, got nan"),
        ("hidden_size", "48", "a whole number from 1 to 65,536, got '48'"),
        ("qkv_bias", 1, "true or false, got 1"),
        ("image_size", [32], r"a whole number from 1 to 65,536, or two: [height, width], got [32]"),
        ("id2label", {"x": "y"}, "an object: class number -> name, got {'x': 'y'}"),
        ("problem_type", "guess", "one of 'regression', 'single_label_classification', 'multi_label_classification'"),
    ],
)
def test_what_is_allowed_is_said(folders, field, value, allowed):
    folder = next(folder for folder, _ in folders if folder.name.startswith("ViT"))
    assert f"{field} must be {allowed}" in answer(folder, "config.json", field, value)


def test_every_field_is_told_of(folders):
    folder = next(folder for folder, _ in folders if folder.name.startswith("ViT"))
    said = json.loads((folder / "config.json").read_text()) | {"hidden_size": 0, "num_hidden_layers": "many"}
    original = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"(?s)hidden_size must be .*num_hidden_layers must be"):
        checkpoints.load(folder)
    (folder / "config.json").write_text(original)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "nul", '{"model_type": 1e999999}', "[]"]
)
def test_files_that_are_no_settings(folders, text):
    folder = next(folder for folder, _ in folders if folder.name.startswith("ViT"))
    original = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        checkpoints.load(folder)
    (folder / "config.json").write_text(original)


def test_a_timm_config_far_larger_than_its_weights_is_not_built(folders):
    folder = next(folder for folder, _ in folders if folder.name.startswith("timm"))
    for field, value in (("model_args.depth", 100), ("model_args.embed_dim", 600), ("model_args.img_size", 6_000)):
        said = answer(folder, "config.json", field, value)
        assert "describes a model of" in said and str(value) in said.replace(",", ""), said


SMALL = {"image_size": (32, 48), "patch_size": (16, 16), "width": 64, "depth": 2, "heads": 2, "mlp_dim": 128}
FIELDS = [field.name for field in dataclasses.fields(ViTConfig)]


def made_or_why(field, value) -> ViTConfig | str:
    try:
        return ViTConfig(**{**SMALL, field: value})
    except ValueError as error:
        return str(error)


def test_vitconfig_itself():
    """Each field with each hostile value: either it is one of the field's own, or ValueError names both."""
    for field in FIELDS:
        for value in HOSTILE:
            made = made_or_why(field, value)
            if isinstance(made, str):
                size = field in ("image_size", "patch_size") and "is not a positive multiple of the patch size" in made
                assert size or schema.shown(value)[:30] in made or str(value)[:30] in made, (field, value, made)
                assert size or field in made, (field, value, made)
            else:
                assert made.head_dim > 0 and made.tokens() > 0
                assert isinstance(getattr(made, field), (int, float, str, tuple)), (field, value)


def test_bounds_do_not_hurt_real_models():
    """The largest Vision Transformer of the literature (22 billion), and numpy's whole numbers."""
    import numpy as np

    ViTConfig((224, 224), (14, 14), width=6144, depth=48, heads=48, mlp_dim=24576)
    assert ViTConfig(**{**SMALL, "width": np.int64(64)}).head_dim == 32


def test_all_values_that_are_shown_are_short():
    for value in (*HOSTILE, 10**5000, object(), torch.zeros(1000, 1000)):
        assert len(schema.shown(value)) < 400
