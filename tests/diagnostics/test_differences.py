"""What vitfast.verify calls the same and what not: errors, tolerances, oracles, structures."""

import copy
import json
from collections import namedtuple
from dataclasses import astuple, dataclass

import pytest
import torch
from helpers.audits import constant, only, small_model
from helpers.peers import VIT, import_transformers, transformers_model
from torch import nn

import vitfast
from vitfast import testing
from vitfast.diagnostics.verify import DifferenceError, verify
from vitfast.ops import accuracy
from vitfast.ops.accuracy import MODEL_TOLERANCES
from vitfast.testing import make

# --- what passes ---


@pytest.mark.parametrize("dtype", [torch.float64, *testing.DTYPES])
def test_identical_models_pass(dtype):
    model = small_model(dtype)
    report = verify(model, copy.deepcopy(model), make(6, 16, dtype=dtype))
    assert report
    report.raise_if_different()
    output = only(report)
    assert (output.name, output.shape, output.elements) == ("output", (6, 10), 60)
    assert (output.max_error, output.relative_rms, output.top1_flips, output.top1_rows) == (0, 0, 0, 6)
    assert output.cosine_min == pytest.approx(1)
    assert (output.allowed_rms, output.allowed_error) == astuple(MODEL_TOLERANCES[dtype])
    names = [layer.name for layer in report.layers]
    assert names == ["0.norm", "0.fc1", "0.fc2", "0", "1.norm", "1.fc1", "1.fc2", "1", "2", "3"]
    assert report.blame is None


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_error_against_tolerance(dtype, x):
    """Just within the tolerance of its dtype passes, just beyond it fails."""
    limit = MODEL_TOLERANCES[dtype].rms
    values = make(1000).clamp(-1, 1).to(dtype)
    for factor, same in ((0.5, True), (2.0, False)):
        report = verify(constant(values), constant((values.double() * (1 + factor * limit)).to(dtype)), x)
        assert report.ok is same, factor
        assert only(report).relative_rms == pytest.approx(factor * limit, rel=0.2)


def test_one_wrong_number_among_many_is_found(x):
    values = make(100_000)
    wrong = values.clone()
    wrong[77] += 2 * MODEL_TOLERANCES[torch.float32].error * values.abs().max()
    output = only(verify(constant(values), constant(wrong), x))
    assert output.relative_rms < output.allowed_rms
    assert len(output.problems) == 1
    assert "of the largest value" in output.problems[0]


def test_tolerance_in_place_of_the_table(x):
    values = make(64)
    assert verify(constant(values), constant(values.clone()), x, tolerance=0)
    assert not verify(constant(values), constant(values * (1 + 1e-6)), x, tolerance=0)
    assert verify(constant(values), constant(values * 1.04), x, tolerance=0.05)
    assert not verify(constant(values), constant(values * 1.06), x, tolerance=0.05)


def test_errors_are_those_of_the_definition(x):
    a, b = make(5, 8), make(5, 8, seed=1)
    output = only(verify(constant(a), constant(b), x))
    error, want = (b - a).double().abs().cpu(), a.double().cpu()
    assert output.max_error == pytest.approx(error.max().item())
    assert output.mean_error == pytest.approx(error.mean().item())
    assert output.relative_error == pytest.approx((error.max() / want.abs().max()).item())
    assert output.relative_rms == pytest.approx((error.norm() / want.norm()).item())
    cosine = nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    assert output.cosine_mean == pytest.approx(cosine.mean().item())
    assert output.cosine_min == pytest.approx(cosine.min().item())


def test_batches_count_as_one(model, x):
    """Sums over a list of batches are those of one batch with all of it."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[3].bias += 0.01
    whole = only(verify(model, other, x, layers=False))
    parts = verify(model, other, [x[:4], x[4:]], layers=False)
    split = only(parts)
    assert parts.batches == 2
    assert (split.elements, split.top1_rows) == (60, 6)
    for name in ("max_error", "mean_error", "relative_rms", "relative_error", "cosine_mean", "cosine_min"):
        assert getattr(split, name) == pytest.approx(getattr(whole, name), rel=1e-4), name
    assert split.problems[-1] == "and 1 more of the batches differ"


def test_a_batch_that_alone_differs_is_enough(x):
    calls = []

    def after(x):
        calls.append(x)
        return x + (len(calls) == 2)

    report = verify(lambda x: x, after, [x, x, x])
    assert not report
    assert "more of the batches" not in str(only(report).problems)


# --- the rule with an oracle ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_with_an_oracle_before_sets_the_measure(dtype, x):
    exact = make(64, 32)
    near = exact.to(dtype)
    good, bad = constant(exact.to(dtype) * 1), constant((exact + 3 * accuracy.TOLERANCES[dtype].rms).to(dtype))
    report = verify(constant(near), good, x, oracle=constant(exact))
    assert report
    assert only(report).before_rms == only(report).relative_rms > 0
    assert only(report).allowed_rms is None
    report = verify(constant(near), bad, x, oracle=constant(exact))
    assert "exceeds" in only(report).problems[0]
    assert verify(constant(near), bad, x), "the bad result is within what two models may differ without an oracle"


def test_an_oracle_of_another_shape(x):
    report = verify(constant(make(4)), constant(make(4) + 0), x, oracle=constant(make(5)))
    assert only(report).problems == ("the oracle gives a tensor (5,) float32 torch.strided, expected shape (4,)",)
    assert not verify(constant(make(4)), constant(make(4) + 0), x, oracle=constant(None))


# --- what is found ---


def test_nan_and_infinity(x):
    values = make(4, 8)
    values[0, 0], values[0, 1] = float("nan"), float("inf")
    report = verify(constant(values), constant(values.clone()), x)
    assert report
    assert (only(report).nonfinite, only(report).nonfinite_mismatches, only(report).elements) == (2, 0, 30)
    for place, value in (((1, 1), float("nan")), ((0, 1), -float("inf")), ((0, 0), 0.0)):
        wrong = values.clone()
        wrong[place] = value
        report = verify(constant(values), constant(wrong), x)
        assert only(report).problems == ("NaN or infinity in 1 place on one side only",)
        assert only(report).nonfinite_mismatches == 1
    nothing = torch.full((3,), float("nan"))
    report = verify(constant(nothing), constant(nothing.clone()), x)
    assert "no place where both sides are finite" in only(report).problems[0]


def test_shape_dtype_and_structure_are_findings(x):
    values = make(4, 8)
    report = verify(constant(values), constant(values.T), x)
    assert only(report).problems == ("shape (8, 4), expected (4, 8)",)
    report = verify(constant(values), constant(values.double()), x)
    assert only(report).problems == ("dtype float64, expected float32",)
    assert only(report).elements == 32
    report = verify(constant((values, values)), constant((values,)), x)
    assert [output.ok for output in report.outputs] == [True, False]
    assert "after has no such output" in report.outputs[1].problems[0]
    report = verify(constant({"a": values, "b": None}), constant({"a": values, "b": values}), x)
    assert "before has no such output" in report.outputs[1].problems[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "gives a str, not a tensor: wrap the model"),
        (torch.ones(3, dtype=torch.complex64), "only dense real tensors"),
        (torch.eye(3).to_sparse(), "only dense real tensors"),
        (torch.ones(3).to(torch.float8_e4m3fn), "no tolerance is known for float8_e4m3fn"),
    ],
)
def test_what_cannot_be_compared_is_a_finding(value, message, x):
    report = verify(constant((x, value)), constant((x, value)), x)
    assert report.outputs[0].ok
    assert message in report.outputs[1].problems[0]
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("value", [None, (), torch.ones(0, 4)])
def test_no_numbers_are_not_the_same(value, x):
    report = verify(constant(value), constant(value), x)
    assert not report
    with pytest.raises(DifferenceError, match="nothing was compared"):
        report.raise_if_different()


def test_integers_and_bools_must_be_equal(x):
    big = torch.tensor([2**60, 5, 6])
    assert verify(constant((big, big > 5)), constant((big.clone(), big > 5)), x)
    report = verify(constant((big, big > 5)), constant((big + torch.tensor([1, 0, 0]), big > 6)), x)
    assert [output.problems for output in report.outputs] == [("1 of 3 values differ",)] * 2


def test_top1_flips_are_counted(x):
    logits = torch.eye(4)
    flipped = logits[[0, 1, 3, 2]]
    for wrap in (lambda t: t, lambda t: {"logits": t}, lambda t: {"heads": [{"logits": t[None]}]}):
        output = only(verify(constant(wrap(logits)), constant(wrap(flipped)), x))
        assert (output.top1_flips, output.top1_rows) == (2, 4)
    assert only(verify(constant({"tokens": logits}), constant({"tokens": flipped}), x)).top1_flips is None
    tie = torch.ones(4, 4) + 1e-6 * torch.eye(4)
    report = verify(constant(torch.ones(4, 4)), constant(tie), x)
    assert report
    assert only(report).top1_flips == 3


# --- structures ---

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Nested:
    pair: Pair
    rest: list
    nothing: object = None


def test_names_of_nested_outputs(x):
    found = verify(
        lambda x: Nested(Pair(x, (x,)), [{"deep": x}]), lambda x: Nested(Pair(x, (x,)), [{"deep": x}]), x
    ).outputs
    assert [output.name for output in found] == ["pair.left", "pair.right[0]", "rest[0].deep"]
    engine_like = vitfast.Output(tokens=x, embedding=x, logits=None)
    assert [o.name for o in verify(constant(engine_like), constant(engine_like), x).outputs] == ["tokens", "embedding"]


def test_a_transformers_model():
    import_transformers()
    model = transformers_model("ViTForImageClassification", VIT | {"num_labels": 5}).eval()
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    batch = {"pixel_values": make(2, 3, *[model.config.image_size] * 2).cpu(), "output_hidden_states": True}
    report = verify(model, other, batch)
    assert report
    assert report.outputs[0].name == "logits"
    assert report.outputs[0].top1_rows == 2
    assert report.outputs[1].name == "hidden_states[0]"
    assert len(report.layers) > 20
    with torch.no_grad():
        other.vit.layers[1].mlp.fc1.bias += 0.1
    assert verify(model, other, batch).blame.layer == "vit.layers.1.mlp.fc1"


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "dict", "list"])
def test_kinds_of_inputs(inputs, x):
    def function(x, scale=1.0):
        return x * scale

    given = {"tensor": x, "tuple": (x, 2.0), "dict": {"x": x, "scale": 3.0}, "list": [x, (x, 2.0), {"x": x}]}[inputs]
    assert verify(function, lambda *args, **kwargs: function(*args, **kwargs), given)
    assert verify(function, lambda *args, **kwargs: function(*args, **kwargs), given).batches == 1 + 2 * (
        inputs == "list"
    )
