"""vitfast.verify: where a difference is said to begin, what is refused, and that nothing is left behind."""

import copy
import dataclasses
import io
import json

import pytest
import torch
from helpers import peers
from helpers.audits import Block, constant, only
from helpers.grids import thinned
from helpers.peers import timm_model, transformers_model
from helpers.scripts import python
from rich.console import Console
from torch import nn

import vitfast
from vitfast import testing
from vitfast.diagnostics.verify import DifferenceError, render, verify, verify_swap


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- blame ---


@pytest.mark.parametrize("layer", ["0.norm", "0.fc2", "1.fc1", "3"])
def test_a_perturbed_layer_is_blamed_by_name(model, x, layer):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(layer).weight.view(-1)[0] += 0.5
    report = verify(model, other, x)
    assert not report
    assert report.blame.layer == layer
    assert report.blame.output.relative_rms > 1e-4
    assert report.blame.input.ok
    with pytest.raises(DifferenceError, match=rf"first layer over its tolerance: {layer} .*begins in it"):
        report.raise_if_different()


def test_a_fault_between_layers_is_said_to_be_between_them(model, x):
    other = copy.deepcopy(model)
    other[1].activation = lambda x: nn.functional.gelu(x, approximate="tanh") * 1.01
    report = verify(model, other, x)
    assert report.blame.layer == "1.fc2"
    assert not report.blame.input.ok
    assert "begins before it, between the layers of 1" in str(report.blame)


def test_blame_looks_at_the_batch_that_differs(model, x):
    other = copy.deepcopy(model)
    other[1].fc1.register_forward_hook(lambda module, args, output: output + (len(args[0]) == 3))
    assert verify(model, other, x).blame is None
    assert verify(model, other, [x, x[:3]]).blame.layer == "1.fc1"


def test_a_layer_that_runs_twice_is_compared_run_by_run(x):
    class Twice(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.layer, self.second = nn.Identity(), second

        def forward(self, x):
            return self.layer(self.layer(x) * self.second)

    report = verify(Twice(1.0).eval(), Twice(1.5).eval(), x)
    assert [layer.name for layer in report.layers] == ["layer", "layer (call 2)"]
    assert [layer.ok for layer in report.layers] == [True, False]
    assert report.blame.output.name == "layer (call 2)"


def test_layers_that_run_on_one_side_only_are_named(model, x):
    other = copy.deepcopy(model)
    other[1].forward = lambda x: Block.forward(other[0], x)
    report = verify(model, other, x)
    assert "1.norm, 1.fc1, 1.fc2" in report.notes[0]
    assert report.blame.layer == "1"


# --- what is refused ---


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "empty list"),
        ((), "empty batch"),
        ({}, "empty batch"),
        (torch.ones(0, 16), r"empty batch \(shapes \[\(0, 16\)\]\)"),
        (3.0, "got float"),
        ([[1.0]], "got list"),
        (None, "got NoneType"),
    ],
)
def test_inputs_that_are_refused(inputs, message, model):
    with pytest.raises(ValueError, match=message):
        verify(model, copy.deepcopy(model), inputs)


def test_training_mode_is_refused_and_left_as_it_is(model, x):
    other = copy.deepcopy(model)
    other[2].train()
    for before, after, side in ((model, other, "after"), (other, model, "before"), (other.forward, model, "before")):
        with pytest.raises(ValueError, match=f"module '2' of {side} is in training mode"):
            verify(before, after, x)
    assert other[2].training
    assert not other[1].training
    with pytest.raises(ValueError, match="after is in training mode"):
        verify(model, copy.deepcopy(model).train(), x)


def test_other_arguments_that_are_refused(model, x):
    with pytest.raises(ValueError, match="the same object"):
        verify(model, model, x)
    with pytest.raises(ValueError, match="after must be callable, got int"):
        verify(model, 3, x)
    for tolerance in (-1, float("nan")):
        with pytest.raises(ValueError, match="at least 0"):
            verify(model, model.forward, x, tolerance=tolerance)
    with pytest.raises(ValueError, match="without an oracle"):
        verify(model, model.forward, x, tolerance=0.1, oracle=model)


# --- nothing is left behind ---


def test_hooks_seeds_inputs_and_gradients_are_left_alone(model, x):
    def spoils(x):
        return x.mul_(2)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    given = x.clone()
    assert verify(spoils, lambda x: x * 2, (x,))
    assert torch.equal(x, given)
    other = copy.deepcopy(model)
    assert verify(model, other, x.requires_grad_())
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(model) == hooks(other) == 0
    assert torch.is_grad_enabled()
    assert x.grad is None


def test_hooks_are_removed_after_an_exception(model, x):
    class Fails(nn.Module):
        def forward(self, x):
            if hooks(self) or self._forward_hooks:
                raise RuntimeError("only with hooks")
            return x

    other = copy.deepcopy(model)
    model[2] = Fails().eval()
    with pytest.raises(RuntimeError, match="only with hooks"):
        verify(model, other, x)
    with pytest.raises(RuntimeError, match="only with hooks"):
        verify(other, model, x)
    assert hooks(model) == hooks(other) == 0


def test_outputs_are_judged_without_hooks(model, x):
    """A model that takes another path when hooked, as some native fast paths do."""

    class Sly(nn.Identity):
        def forward(self, x):
            return x + 1 if not self._forward_hooks else x

    other = copy.deepcopy(model)
    other[2] = Sly().eval()
    report = verify(model, other, x)
    assert not report
    assert report.blame is None


def test_static_output_buffers_do_not_hide_a_difference(x):
    buffer = torch.zeros_like(x)
    assert not verify(lambda x: buffer.copy_(x), lambda x: buffer.copy_(x + 1), x)


def test_a_model_that_caches_can_still_be_trained(x):
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.cache = nn.Linear(16, 16).to(testing.device()), None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.ones(16, device=x.device) * 2
            return self.layer(x) * self.cache

    first = Caches().eval()
    assert verify(first, copy.deepcopy(first), x)
    first.train()(x).sum().backward()
    assert first.layer.weight.grad is not None


def test_functions_have_no_layers(model, x):
    report = verify(model, lambda x: model(x), x)
    assert report
    assert report.layers == ()
    assert report.notes == ("no layers were compared: after is no nn.Module",)
    other = nn.Sequential(nn.Identity()).eval()
    wrapped = nn.ModuleDict({"inner": copy.deepcopy(model)}).eval()
    wrapped.forward = model.forward
    assert "no module names in common" in verify(wrapped, other, x).notes[0]
    assert len(verify(model.forward, copy.deepcopy(model), x).layers) == 10


# --- swaps ---


class Swap:
    def __init__(self, model, forward, replaced=("1",)):
        self.replaced, self.left, self.model = list(replaced), {"0": "too small"}, model
        model[1].forward = forward

    def restore(self):
        del self.model[1].forward


def test_verify_swap(model, x):
    good = verify_swap(model, lambda m: Swap(m, lambda x: Block.forward(m[1], x)), x)
    assert good
    assert len(good.layers) == 10
    bad = verify_swap(model, lambda m: Swap(m, lambda x: Block.forward(m[1], x) * 1.01), [x, x])
    assert not bad
    assert bad.blame.layer == "1"
    assert bad.blame.input.ok
    assert "forward" not in vars(model[1])
    assert hooks(model) == 0


def test_a_swap_is_undone_after_an_exception(model, x):
    def fails(x):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        verify_swap(model, lambda m: Swap(m, fails), x)
    assert "forward" not in vars(model[1])
    with pytest.raises(ValueError, match=r"replaced nothing.*too small"):
        verify_swap(model, lambda m: Swap(m, m[1].forward, replaced=()), x)
    assert "forward" not in vars(model[1])
    with pytest.raises(ValueError, match="no restore"):
        verify_swap(model, lambda m: None, x)


def test_a_timm_model_with_a_wrong_scale(x):
    """A swap of attention alone: the first wrong layer is the one behind it, and its input says so."""
    model = timm_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()

    def swap(model):
        model.blocks[1].attn.scale *= 1.5
        model.blocks[1].attn.fused_attn = False
        return Handle(model)

    class Handle:
        def __init__(self, model):
            self.model = model

        def restore(self):
            self.model.blocks[1].attn.scale /= 1.5
            self.model.blocks[1].attn.fused_attn = True

    report = verify_swap(model, swap, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert not report
    assert report.blame.layer.startswith("blocks.1.attn.")
    assert report.blame.layer != "blocks.1.attn.qkv"
    assert not report.blame.input.ok
    assert "between the layers of blocks.1.attn" in str(report.blame)


# --- the report ---


def test_json_and_table(model, x):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].fc1.bias += 0.1
    report = verify(model, other, x)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["ok"] is False
    assert found["blame"]["layer"] == "1.fc1"
    assert found["blame"]["input"]["ok"] is True
    assert found["outputs"][0]["shape"] == [6, 10]
    assert len(found["layers"]) == 10
    zero = verify(constant(torch.zeros(3)), constant(torch.ones(3)), x)
    assert json.loads(json.dumps(zero.to_dict(), allow_nan=False))["outputs"][0]["relative_error"] is None
    for width in (80, 160):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(render(report))
        text = console.export_text()
        assert "…" not in text
        assert "differs" in text
        assert "first layer over its tolerance: 1.fc1" in text
        assert f"{only(report).max_error:.1e}" in text


def test_long_names_are_shown_whole():
    report = verify(constant({"encoder_last_hidden_state": torch.ones(2, 197, 768)}), lambda x: {}, torch.ones(1))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render(report))
    text = console.export_text()
    assert "…" not in text
    assert "encoder_last_hidden_state" in "".join(line.split(" ")[1] for line in text.splitlines() if " " in line)


@pytest.mark.parametrize(
    "first",
    thinned(
        ["import vitfast.diagnostics.verify", "from vitfast import verify", "import vitfast.diagnostics.doctor"], 3
    ),
)
def test_verify_is_the_function_whatever_is_imported_first(first):
    check = "assert vitfast.verify.__module__ == 'vitfast.diagnostics.verify'\n"
    use = "import torch\nassert vitfast.verify(torch.sin, lambda x: x.sin(), torch.ones(2))\n"
    assert python(f"{first}\nimport vitfast\n{check}{use}{check}") == ""


# --- an engine beside a model ---


def families():
    """name -> (model, the outputs that it and an engine have in common)."""
    small = peers.TIMM | {"num_classes": 0}
    return {
        "timm": (lambda: timm_model(**peers.TIMM), ["output"]),
        "timm, pooled": (lambda: timm_model(**small), ["output"]),
        "timm, tokens": (lambda: timm_model(**small, global_pool=""), ["output"]),
        "torchvision": (peers.torchvision_model, ["output"]),
        "ViTModel": (lambda: transformers_model("ViTModel", peers.VIT), ["last_hidden_state"]),
        "Dinov2Model": (
            lambda: transformers_model("Dinov2Model", peers.DINO),
            ["last_hidden_state", "pooler_output"],
        ),
        "ViTForImageClassification": (
            lambda: transformers_model("ViTForImageClassification", peers.VIT | {"num_labels": 5}),
            ["logits"],
        ),
        "CLIPVisionModelWithProjection": (
            lambda: transformers_model("CLIPVisionModelWithProjection", peers.VIT | {"projection_dim": 24}),
            ["image_embeds"],
        ),
    }


@pytest.mark.parametrize("name", families())
def test_an_engine_and_its_model_are_compared_in_what_both_have(name):
    make_model, names = families()[name]
    model = make_model().to(testing.device())
    engine = vitfast.load(model, device=testing.device(), dtype="fp32", backend="torch")
    images = testing.make(2, 3, *engine.config.image_size)
    for before, after in ((model, engine), (engine, model)):
        report = verify(before, after, images)
        assert report, report
        assert sorted(item.name for item in report.outputs) == names
        assert any("what both have" in note for note in report.notes) == (name != "Dinov2Model")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "patch" in n or "conv_proj" in n).mul_(1.5)
    assert not verify(model, engine, images)


def test_an_engine_takes_pixel_values_by_transformers_name():
    model = transformers_model("ViTModel", peers.VIT)
    engine = vitfast.load(model, device="cpu", backend="torch")
    assert verify(model, engine, {"pixel_values": torch.zeros(1, 3, 32, 32)})


def test_an_engine_and_a_model_with_nothing_in_common_differ():
    model = timm_model(**peers.TIMM)
    engine = vitfast.load(model, device="cpu", backend="torch")
    report = verify(lambda images: {"other": model(images)}, engine, torch.zeros(1, 3, 32, 32))
    assert not report
    assert "has no such output" in report.findings()[0]


def test_two_engines_are_compared_in_full():
    model = timm_model(**peers.TIMM)
    first, second = (vitfast.load(model, device="cpu", backend="torch") for _ in range(2))
    report = verify(first, second, torch.zeros(1, 3, 32, 32))
    assert report
    assert [item.name for item in report.outputs] == ["tokens", "embedding", "logits"]


# --- how a report prints ---


@pytest.mark.parametrize("wrong", [0, 1, 300])
def test_a_report_prints_as_a_table_of_at_most_40_lines(x, wrong):
    before = {f"output.{i}": torch.randn(3, 4) for i in range(300)}
    after = {name: value + (i < wrong) for i, (name, value) in enumerate(before.items())}
    report = verify(constant(before), constant(after), x)
    report = dataclasses.replace(report, notes=("a note\nof two lines",) * 50, about={"key": 1})
    for text in (repr(report), str(report)):
        assert 18 <= len(text.splitlines()) <= 40
        assert max(map(len, text.splitlines())) <= 240
        assert text.startswith("different" if wrong else "same")
        assert "300 outputs" in text
        assert ("output.0" in text) or not wrong
    shown = report._repr_html_()
    assert shown.count("<tr>") == 17
    assert "<table>" in shown


def test_the_layers_and_outputs_of_a_report_stay_whole(model, x):
    other = copy.deepcopy(model)
    report = verify(model, other, x)
    assert len(report.layers) > 5
    assert len(repr(report).splitlines()) < 10


def test_html_is_escaped(x):
    report = verify(constant({"<b>": x}), constant({"<b>": x + 1}), x)
    assert "<b>" not in report._repr_html_()
