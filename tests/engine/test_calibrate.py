"""Calibration: the product that suffers is found and kept, nothing else is; refusals."""

import pytest
import torch
from helpers.engines import PREPROCESS, SMALL
from helpers.grids import thinned

import vitfast
from vitfast import testing
from vitfast.engine.calibrate import calibrate
from vitfast.engine.calibration import TARGET
from vitfast.engine.dtypes import QUANTIZED
from vitfast.engine.engine import Engine
from vitfast.engine.runner import Runner
from vitfast.models.plan import PRODUCTS

PIXELS = torch.randint(0, 256, (8, 32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def planted(name):
    """SMALL with one product that 8 bits ruin: a huge weight in every row of it, on an input that is always 0."""
    weights = testing.random_weights(SMALL)
    block, _, site = name.rpartition(".")
    before = f"{block}.norm1" if site == "qkv" else f"{block}.fc1"
    for part in ("weight", "bias"):
        weights[f"{before}.{part}"][3] = 0.0
    weights[f"{name}.weight"][:, 3] = 3e4
    return vitfast.Checkpoint(SMALL, weights, PREPROCESS)


def run(checkpoint, precision="fp8", images=PIXELS, target=0.996, **options):
    """With a target that SMALL's random weights meet in 8 bits, where none is ruined."""
    runner = Runner(checkpoint, device=testing.device(), dtype=precision, skip_quantize=PRODUCTS)
    return calibrate(runner, checkpoint, images, target=target, **options)


@pytest.mark.parametrize("name", thinned(["blocks.1.fc2", "blocks.0.qkv"]))
@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_bad_product_is_the_one_that_is_kept(precision, name):
    found = run(planted(name), precision)
    assert found.skip_quantize == (name,)
    assert next(iter(found.alone)) == name and len(found.alone) == 4 * SMALL.depth
    assert found.alone[name] < 0.99 < min(cosine for other, cosine in found.alone.items() if other != name)
    assert found.before < 0.99 and found.after >= 0.996
    assert f"{name:<20} {found.alone[name]:.6f}  in bf16" in str(found) and str(found).count("  in bf16") == 1
    assert run(planted(name), precision) == found, "a second run says otherwise"


def test_load_builds_the_model_that_was_measured(monkeypatch):
    checkpoint = planted("blocks.1.fc2")
    monkeypatch.setattr("vitfast.engine.load.load_checkpoint", lambda source, **_: checkpoint)
    options = {"device": testing.device(), "dtype": "int8"}
    made = vitfast.load("anything", calibration=PIXELS, **options)
    assert made.calibration.target == TARGET == 0.998
    plain = Engine(checkpoint, device=testing.device(), dtype="bf16")
    assert vitfast.load("anything", **options).calibration is None
    assert made.plan.skip_quantize == frozenset(made.calibration.skip_quantize) == {"blocks.1.fc2"}
    cosine = torch.cosine_similarity(made(PIXELS).embedding.double(), plain(PIXELS).embedding.double()).mean()
    assert cosine.item() == pytest.approx(made.calibration.after, abs=1e-4)


def test_nothing_is_kept_where_the_target_is_met():
    found = run(vitfast.Checkpoint(SMALL, testing.random_weights(SMALL), PREPROCESS), "int8", target=0.99)
    assert found.skip_quantize == () and found.before == found.after >= 0.99


def test_more_are_kept_for_a_higher_target_worst_first():
    found = run(planted("blocks.1.fc2"), target=0.9995)
    assert len(found.skip_quantize) > 1 and found.skip_quantize == tuple(found.alone)[: len(found.skip_quantize)]
    assert found.after >= 0.9995


def test_what_is_skipped_is_not_measured():
    found = run(planted("blocks.1.fc2"), skip_quantize=("fc2",))
    assert set(found.skip_quantize) >= {"blocks.0.fc2", "blocks.1.fc2"} and len(found.alone) == 3 * SMALL.depth
    assert found.before > run(planted("blocks.1.fc2")).before


def test_float_images_and_batches(monkeypatch):
    """Preprocessed images give what their pixels do, in batches of any size."""
    checkpoint = planted("blocks.0.qkv")
    mean, std = (torch.tensor(values) for values in (PREPROCESS.mean, PREPROCESS.std))
    floats = ((PIXELS / 255 - mean) / std).permute(0, 3, 1, 2)
    monkeypatch.setattr("vitfast.engine.calibrate.BATCH", 3)
    assert run(checkpoint, images=floats).skip_quantize == run(checkpoint).skip_quantize == ("blocks.0.qkv",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "got 1.0"),
        ({"images": PIXELS[:0]}, r"\(0, 32, 48, 3\)"),
        ({"images": torch.full((2, 3, 32, 48), float("nan"))}, "finite"),
        ({"images": PIXELS[0]}, r"\(32, 48, 3\)"),
        ({"skip_quantize": ("fc3",)}, "got 'fc3'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        run(planted("blocks.1.fc2"), **options)


def test_a_model_in_bf16_has_nothing_to_calibrate(monkeypatch):
    checkpoint = planted("blocks.1.fc2")
    with pytest.raises(ValueError, match="'fp8' or 'int8', got 'bfloat16'"):
        calibrate(Runner(checkpoint, device=testing.device(), dtype="bf16"), checkpoint, PIXELS)
    monkeypatch.setattr("vitfast.engine.load.load_checkpoint", lambda source, **_: checkpoint)
    with pytest.raises(ValueError, match="'fp8' or 'int8', got 'bf16'"):
        vitfast.load("anything", dtype="bf16", calibration=PIXELS)


def test_the_old_names_work_and_say_so(monkeypatch):
    checkpoint = vitfast.Checkpoint(SMALL, testing.random_weights(SMALL), PREPROCESS)
    monkeypatch.setattr("vitfast.engine.load.load_checkpoint", lambda source, **_: checkpoint)
    options = {"device": testing.device(), "dtype": "int8", "backend": "torch"}
    with pytest.warns(DeprecationWarning, match="skip_quantize="):
        old = vitfast.load("anything", keep=("fc2",), **options)
    assert old.plan.skip_quantize == vitfast.load("anything", skip_quantize=("fc2",), **options).plan.skip_quantize
    with pytest.raises(ValueError, match="give one of them"), pytest.warns(DeprecationWarning, match="skip_quantize="):
        vitfast.load("anything", keep=("fc2",), skip_quantize=("fc1",), **options)
    with pytest.warns(DeprecationWarning, match="skip_quantize"):
        assert run(checkpoint, "int8", target=0.99).kept == ()
