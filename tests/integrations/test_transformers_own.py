"""transformers' own tests of its models, each model accelerated as soon as it is in evaluation mode.

Its wheel has no tests, its source distribution has. Where VITFAST_TRANSFORMERS_SOURCE names that of the version that is
installed, unpacked, and `parameterized` is installed, they run, with the assertions and inputs that they have:

    pip download --no-deps --no-binary :all: transformers==VERSION
"""

import copy
import importlib
import os
import sys
import unittest

import pytest
from helpers import peers

import vitfast
from vitfast.integrations.accelerate import accelerated
from vitfast.models import vit

SOURCE = os.environ.get("VITFAST_TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("VITFAST_TRANSFORMERS_SOURCE names no source of transformers, with tests", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' tests need parameterized")
transformers = peers.import_transformers()
sys.path.insert(0, SOURCE)
common = importlib.import_module("tests.test_modeling_common")  # theirs

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

COMMON = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "attn_implementation": "eager"}  # fmt: skip
MODELS = {
    "ViT": (("ViTModel", "ViTForImageClassification"), {"intermediate_size": 37}),
    "Dinov2": (("Dinov2Model", "Dinov2ForImageClassification"), {"mlp_ratio": 2}),
    "Dinov2WithRegisters": (("Dinov2WithRegistersModel",), {"mlp_ratio": 2, "num_register_tokens": 2}),
    "DINOv3ViT": (("DINOv3ViTModel",), {"intermediate_size": 37, "num_register_tokens": 2}),
    "SiglipVision": (("SiglipVisionModel",), {"intermediate_size": 37}),
    "CLIPVision": (
        ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        {"intermediate_size": 37, "projection_dim": 16},
    ),
}
"""Of a config: the models, and what it has beside COMMON."""
CHECKPOINTING = [
    f"test_training_gradient_checkpointing{how}" for how in ("", "_use_reentrant_false", "_use_reentrant_true")
]
NOT_FOR_THEM = {
    "": {"test_model_get_set_embeddings": "asks for the embeddings of tokens"},
    "CLIPVision": dict.fromkeys(["test_training", *CHECKPOINTING], "the model has no loss"),
    "Dinov2": dict.fromkeys(CHECKPOINTING, "its mask token has no gradient without a mask")
    | {"test_reverse_loading_mapping": "is for SwiGLU"},
    "Dinov2WithRegisters": {"test_reverse_loading_mapping": "is for SwiGLU"},
}
"""Config ("" for all) -> tests that do not concern it, and why; they fail without vitfast, too."""


class Asked:
    """What their tests ask about a model."""

    is_training = True
    batch_size, num_hidden_layers, hidden_size, num_attention_heads = 3, 2, 32, 4
    num_masks, mask_length = 4, 16

    def __init__(self, config):
        self.config = config
        class_token = not isinstance(config, transformers.SiglipVisionConfig)
        self.seq_length = 16 + class_token + getattr(config, "num_register_tokens", 0)
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": common.floats_tensor([3, 3, 32, 32])}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


@pytest.fixture(autouse=True, scope="class")
def _accelerated():
    """Models are accelerated when they are put into evaluation mode; most tests then run blocks on the engine."""
    own, run_block, blocks, busy = transformers.PreTrainedModel.eval, vit.run_block, [], []

    def evaluate(model):
        own(model)
        if not busy and not accelerated(model):
            busy.append(model)
            try:
                vitfast.accelerate(model, strict=True)
            except ValueError as error:
                if not any(why in str(error) for why in ("meta device", "is recorded")):  # no values; attention weights
                    raise
            finally:
                busy.clear()
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "eval", evaluate)
        patch.setattr(vit, "run_block", lambda *args: blocks.append(1) or run_block(*args))
        yield
    assert blocks, "no block ran on the engine"


def _case(name):
    classes, more = MODELS[name]

    class Case(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = tuple(getattr(transformers, model) for model in classes)
        test_resize_embeddings = False

        def setUp(self):
            self.model_tester = Asked(getattr(transformers, f"{name}Config")(**COMMON, **more))

    for test, why in (NOT_FOR_THEM[""] | NOT_FOR_THEM.get(name, {})).items():
        setattr(Case, test, unittest.skip(why)(getattr(Case, test)))
    return type(f"Test{name}", (Case,), {"__module__": __name__})


for _name in MODELS:
    globals()[f"Test{_name}"] = _case(_name)
