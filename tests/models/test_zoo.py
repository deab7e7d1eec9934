"""The zoo: other libraries' models, perturbed, against the engine. A sample here; all of it in the full suite."""

import pytest
import torch
from helpers import peers

from vitfast import testing
from vitfast.benchmarks import zoo
from vitfast.engine.engine import Engine
from vitfast.models import checkpoints

EQUAL = [name for name in zoo.TRANSFORMERS if name in checkpoints.hf.supported()]
SAMPLE = ["DINOv3ViTModel", "SiglipModel", "Siglip2VisionModel", "Aimv2VisionModel", "BeitModel", "BlipVisionModel",
          "PixtralVisionModel", "FlavaImageModel", "Dinov2Backbone", "LlavaModel", "Mistral3Model",
          "ViTForMaskedImageModeling", "TimmWrapperModel"]  # fmt: skip


@pytest.fixture(autouse=True)
def libraries():
    peers.import_transformers()
    peers.import_timm()


def equal(case: zoo.Case) -> None:
    result = zoo.tried(case)
    assert (result.status, result.reason) == ("equal", "")


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_transformers(name):
    (case,) = zoo.transformers_cases([name])
    equal(case)


TIMM_SAMPLE = ("vit_dwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256", "samvit_base_patch16_224",
               "samvit_base_patch16", "naflexvit_base_patch16_parfac_gap", "deepseek_vit_412m")  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_timm():
    for case in zoo.timm_cases():
        if case.name in TIMM_SAMPLE:
            equal(case)


@pytest.mark.full
@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.filterwarnings("ignore")
def test_transformers(name):
    (case,) = zoo.transformers_cases([name])
    equal(case)


@pytest.mark.filterwarnings("ignore")
def test_a_pooler_that_is_missing_is_named():
    (case,) = zoo.transformers_cases(["Data2VecVisionForSemanticSegmentation"])
    refused = zoo.tried(case)
    assert refused.status == "refused"
    assert refused.reason.endswith("without its norm (pooler.layernorm) is not supported")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_equal_is_refused_with_a_reason():
    cases = [*zoo.timm_cases(), *zoo.transformers_cases(), *zoo.torchvision_cases()]
    results = [zoo.tried(case) for case in cases]
    assert not [(r.case.name, r.reason) for r in results if r.status == "different"]
    assert all("not supported" in r.reason for r in results if r.status == "refused")
    assert sum(r.status == "equal" for r in results if r.case.library == "timm") >= 325
    assert sum(r.status == "equal" for r in results if r.case.library == "transformers") >= 90


SAVED = ("DINOv3ViTModel", "BeitForImageClassification", "SiglipVisionModel", "Siglip2Model", "Aimv2VisionModel",
         "Data2VecVisionModel", "IJepaForImageClassification", "OwlViTVisionModel", "InternVLVisionModel")  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_saves_gives_the_same(name, tmp_path):
    (case,) = zoo.transformers_cases([name])
    model = zoo.perturbed(case.build())
    model.save_pretrained(tmp_path)
    engines = [
        Engine(checkpoints.load(what), device="cpu", dtype="fp32", backend="torch") for what in (model, tmp_path)
    ]
    images = testing.make(2, 3, *engines[0].config.image_size).cpu()
    (live, saved) = (engine(images) for engine in engines)
    assert torch.equal(live.tokens, saved.tokens) and torch.equal(live.embedding, saved.embedding)


@pytest.mark.parametrize(
    ("name", "tower"),
    [("LlavaForConditionalGeneration", "CLIPVisionModel"), ("InternVLModel", "InternVLVisionModel")],
)
def test_the_tower_in_a_folder_of_a_larger_model(name, tower, tmp_path):
    (case,) = zoo.transformers_cases([name])
    model = zoo.perturbed(case.build())
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"the model taken is the {tower} in a {name}"):
        saved = Engine(checkpoints.load(tmp_path), device="cpu", dtype="fp32", backend="torch")
    with pytest.warns(UserWarning, match=f"{name}: the model taken is its part .* \\({tower}\\)"):
        live = Engine(checkpoints.load(model), device="cpu", dtype="fp32", backend="torch")
    images = testing.make(2, 3, *live.config.image_size).cpu()
    assert torch.equal(live(images).tokens, saved(images).tokens)


@pytest.mark.filterwarnings("ignore")
def test_a_dropped_term_shows(monkeypatch):
    """A translation without the relative positions would not be called equal."""
    forget = lambda self, config, block: {}  # noqa: E731
    monkeypatch.setattr("vitfast.models.positions.Positions.of_block", forget)
    (case,) = zoo.transformers_cases(["BeitModel"])
    assert zoo.tried(case).status == "different"


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "Siglip2VisionModel", "DPTModel", "Tipsv2VisionModel"])
@pytest.mark.filterwarnings("ignore")
def test_another_size_than_the_native_one(name):
    (case,) = zoo.transformers_cases([name])
    model = zoo.perturbed(case.build())
    engine = Engine(checkpoints.load(model), device="cpu", dtype="fp32", backend="torch")
    images = testing.make(2, 3, 48, 40).cpu()
    with torch.no_grad():
        expected = case.outputs(model, images)
    peers.close(engine(images).tokens, expected["tokens"])


def test_the_report_tells_counts_and_reasons():
    case = zoo.Case("timm", "ViT", "vit_x", None, None)
    other = zoo.Case("timm", "ViT", "vit_y", None, None)
    results = [
        zoo.Result(case, "equal", 2e-6),
        zoo.Result(other, "refused", reason="vit_y: blocks.0: X is not supported"),
    ]
    text = zoo.report(results)
    assert "2 tried: 1 equal, 1 refused." in text and "| ViT | 2 | 1 | 1 | 0 | 2e-06 |" in text
    assert "* refused: vit_y: blocks.0: X is not supported" in text
