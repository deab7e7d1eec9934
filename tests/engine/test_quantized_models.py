"""FP8 and INT8 models: whole forwards, what is kept in bf16, refusals, and what they cost in accuracy."""

import dataclasses
import functools
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import weights
from helpers.engines import FAMILIES, PREPROCESS, SMALL, engine
from helpers.grids import thinned
from PIL import Image
from typer.testing import CliRunner

import vitfast
from vitfast import ops, testing
from vitfast.cli.app import app
from vitfast.engine import plan_cache, planner, sites
from vitfast.engine.engine import Engine
from vitfast.models.plan import SITES
from vitfast.ops import registry

PRECISIONS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
WIDE = dataclasses.replace(SMALL, width=128, head_dim=64, mlp_dim=256, name="heads of 64")
COSINE = 0.995
"""Least mean cosine of the photos' embeddings to fp32. Measured: FP8 .9982, INT8 .9988 (bf16 .9999)."""


def images(config, batch=3):
    return testing.make(batch, 3, *config.image_size)


@pytest.mark.parametrize(("precision", "backend"), [("fp8", "torch"), ("int8", "torch"), ("int8", "native")])
@pytest.mark.parametrize("family", [*FAMILIES, WIDE.name])
def test_every_family_stays_near_bf16(family, precision, backend):
    """Random weights: tokens' mean cosine to bf16 is near 1, groups and heads with scales cost no more than a pass."""
    config, batch = vitfast.ViTConfig(**{**vars(SMALL), **FAMILIES.get(family, vars(WIDE))}), 16
    for op, dtype in (("quantized_linear", PRECISIONS[precision]), ("linear", torch.bfloat16)):
        if reasons := registry.backend(op, backend).why_not(ops.Spec(op, testing.device().type, dtype)):
            pytest.skip("; ".join(reasons))
    plain, quantized = engine(config, dtype="bf16", backend="torch"), engine(config, dtype=precision, backend=backend)
    assert (quantized.dtype, quantized.precision) == (torch.bfloat16, precision)
    want, got = plain(images(config, batch)), quantized(images(config, batch))
    assert got.tokens.dtype == got.embedding.dtype == torch.bfloat16
    assert not torch.equal(got.tokens, want.tokens)
    heads = {"attention_quantize", "proj_head_scales"}
    together = {"fc1_requantize", "fc2_group_scales"} | (heads if family == WIDE.name else set())
    assert together == {name for name, site in SITES.items() if site.quantized and site.optional} & set(
        quantized.plan.backends
    )
    quantized.runner.plan = dataclasses.replace(quantized.plan, fc1_requantize=None, attention_quantize=None)
    apart = quantized(images(config, batch))
    loss, loss_apart = (
        1 - torch.cosine_similarity(out.tokens.double(), want.tokens.double(), dim=-1).mean() for out in (got, apart)
    )
    assert loss < 1 - COSINE
    assert loss < 1.1 * loss_apart


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_are_quantised_and_the_rest_is_not(precision):
    made = engine(dtype=precision, backend="torch")
    for block in made.runner.weights.blocks:
        for dense in (block.qkv, block.proj, block.fc1, block.fc2):
            assert dense.weight.dtype == PRECISIONS[precision]
            assert dense.scale.shape == dense.weight.shape[:1]
    assert made.runner.weights.head.weight.dtype == made.runner.weights.embed_float.weight.dtype == torch.bfloat16
    assert not {"qkv", "proj", "fc1", "fc2", "mlp", "row_stats"} & set(made.plan.backends)


@pytest.mark.parametrize(("skip", "mlp"), [
    ((), ["quantize", "fc1_requantize", "fc2_group_scales"]),
    (("fc2",), ["quantize", "quantized_fc1", "fc2"]),
    (("fc1",), ["layer_norm", "fc1", "quantize", "quantized_fc2"]),
    (("proj",), ["quantize", "fc1_requantize", "fc2_group_scales"]),
])  # fmt: skip
@pytest.mark.parametrize("head_dim", [64, 32])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantised_block_is_seven_launches(precision, head_dim, skip, mlp):
    """Neither the hidden rows nor what attention gives are read by a pass of their own; these where heads allow it."""
    config = {64: WIDE, 32: SMALL}[head_dim]
    small, launches = engine(config, dtype=precision, skip_quantize=skip, backend="torch" if skip else "triton"), []

    def counted(site, call):
        return lambda *args, **kwargs: (launches.append(site), call(*args, **kwargs))[1]

    calls = {site: counted(site, getattr(small.plan, site)) for site in small.plan.backends}
    small.runner.plan = dataclasses.replace(small.plan, **calls)
    small.run(images(SMALL, 1).bfloat16())
    heads = {64: ["attention_quantize", "proj_head_scales"], 32: ["attention", "quantize", "quantized_proj"]}[head_dim]
    block = ["quantize", "quantized_qkv", *(["attention", "proj"] if skip == ("proj",) else heads), *mlp]
    assert len(block) == {64: 7, 32: 8}[head_dim] or skip
    assert launches == ["patch_embed", *block * config.depth, "layer_norm", "head"]


@pytest.mark.parametrize("pair", [("fc1_requantize", "fc2_group_scales"), ("attention_quantize", "proj_head_scales")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_sites_that_pass_8_bits_on_are_left_out_where_a_plan_measures_them_slower(
    precision, pair, monkeypatch, tmp_path
):
    milliseconds = {"quantize": 1.0, "quantized_linear": 2.0}

    def measure(case, entries, device, slow, timed):
        groups = {"fc1_requantize": "scale groups", "attention_quantize": "scale groups of 64"}[pair[0]]
        milli = 9.0 if slow and groups in case.spec.features else milliseconds.get(case.op, 1.0)
        return entries[0], {"ms": {"torch": milli}, "refused": {}}

    monkeypatch.setattr(planner, "candidates", lambda spec: ([registry.backend(spec.op, "torch")] * 2, {}))
    together = {name for name, site in SITES.items() if site.quantized and site.optional}
    for slow in (False, True):
        monkeypatch.setattr(planner, "measure", functools.partial(measure, slow=slow))
        options = {"device": testing.device(), "dtype": torch.bfloat16, "quantized": PRECISIONS[precision]}
        monkeypatch.setattr(plan_cache, "plans_dir", lambda folder=tmp_path / str(slow): folder)
        chosen = planner.build(WIDE, batch=1, **options).backends
        assert together & set(chosen) == together - (set(pair) if slow else set())


@pytest.mark.parametrize("slow", [False, True])
def test_int8_on_a_cpu_without_the_extension_leaves_a_pair_of_emulations_out(slow, monkeypatch, tmp_path):
    """torch alone is measured, too: oneDNN has the products that do without a pair, not those with scales of groups."""

    def measure(case, entries, device, timed):
        assert [entry.name for entry in entries] == ["torch"] or case.spec.op in ("patch_embed", "attention")
        return entries[0], {
            "ms": {"torch": 9.0 if slow and "scale groups" in case.spec.features else 1.0},
            "refused": {},
        }

    monkeypatch.setattr(planner, "measure", measure)
    monkeypatch.setattr(plan_cache, "plans_dir", lambda: tmp_path)
    with ops.registry.without([(op, "native") for op in ops.registry.OPS], "no extension"):
        options = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "quantized": torch.int8}
        chosen = planner.build(WIDE, batch=1, **options).backends
    assert ({"fc1_requantize", "fc2_group_scales"} <= chosen.keys()) == (not slow)
    assert chosen["quantized_fc2"] == chosen["quantized_qkv"] == "torch"


def test_fp8_weights_are_widened_once_on_the_cpu():
    """A planned model keeps them in fp32, which gives the same bits; forced, PyTorch widens them at every call."""
    checkpoint = vitfast.Checkpoint(SMALL, testing.random_weights(SMALL), PREPROCESS)
    kept, plain = (Engine(checkpoint, device="cpu", dtype="fp8", backend=name) for name in ("auto", "torch"))
    for block, its in zip(kept.runner.weights.blocks, plain.runner.weights.blocks, strict=True):
        assert its.fc2.weight.dtype == torch.float8_e4m3fn and block.fc2.weight.dtype == torch.float32
        x = ops.quantize(testing.make(5, SMALL.mlp_dim).cpu(), dtype=torch.float8_e4m3fn)
        run, again = (made.plan.quantized_fc2 for made in (kept, plain))
        assert torch.equal(run(*x, block.fc2.weight, block.fc2.scale), again(*x, its.fc2.weight, its.fc2.scale))
    cpu, fp8 = torch.device("cpu"), torch.float8_e4m3fn
    case = sites.site_case(SMALL, SITES["quantized_fc2"], 1, cpu, torch.bfloat16, fp8)
    timed = planner.planned_call(registry.backend("quantized_linear", "torch"), case.spec, case.inputs())
    assert [t.dtype for t in timed.args[:4]] == [torch.float8_e4m3fn, *3 * [torch.float32]], "timed as it will run"


def test_skipped_products_stay_as_they_are():
    skip = ("fc2", "blocks.1.qkv")
    made, plain = (
        engine(dtype=name, backend="torch", **kwargs)
        for name, kwargs in (("fp8", {"skip_quantize": skip}), ("bf16", {}))
    )
    first, second = made.runner.weights.blocks
    assert first.qkv.scale is not None and second.qkv.scale is None
    assert first.fc2.scale is None and second.fc2.scale is None
    assert torch.equal(first.fc2.weight, plain.runner.weights.blocks[0].fc2.weight)
    everything = engine(dtype="fp8", skip_quantize=("qkv", "proj", "fc1", "fc2"), backend="torch")
    assert torch.equal(everything(images(SMALL)).tokens, plain(images(SMALL)).tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8", "skip_quantize": ("fc3",)}, "got 'fc3'"),
        ({"dtype": "fp8", "skip_quantize": ("blocks.2.fc2",)}, "blocks.0 to 1, got 'blocks.2.fc2'"),
        ({"dtype": "int8", "skip_quantize": "fc2"}, "skip_quantize is a tuple"),
        ({"dtype": "bf16", "skip_quantize": ("fc2",)}, "'fp8' or 'int8'"),
        ({"dtype": "fp4"}, "fp8, int8, got 'fp4'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        engine(**options)


@pytest.mark.parametrize("level", ["avx2"], indirect=True)
def test_a_cpu_of_avx2_multiplies_in_int8(level):
    """By the extension's products, whatever else such a CPU has."""
    plain = engine(WIDE, dtype="bf16", backend="torch")
    others = [("quantized_linear", "torch"), ("linear", "native")]
    with ops.registry.without(others, "not for this test"):
        quantized = engine(WIDE, dtype="int8", deterministic=True)
    used = {site: uses for site, uses in quantized.plan.backends.items() if SITES[site].op == "quantized_linear"}
    assert {f"quantized_{site}" for site in ("qkv", "proj", "fc1", "fc2")} <= used.keys()
    assert set(used.values()) == {"native"}
    want, got = plain(images(WIDE, 16)).tokens.double(), quantized(images(WIDE, 16)).tokens.double()
    assert torch.cosine_similarity(got, want, dim=-1).mean() > COSINE


def test_native_has_no_fp8_products():
    with pytest.raises(ops.BackendError, match="native"):
        engine(dtype="fp8", backend="native")


@pytest.mark.parametrize(("precision", "capability"), [("fp8", (8, 6)), ("int8", (7, 5))])
def test_gpus_without_such_products_refuse(precision, capability):
    spec = ops.Spec("quantized_linear", "cuda", PRECISIONS[precision], capability, {})
    reasons = registry.backend("quantized_linear", "triton").why_not(spec)
    assert any("compute capability" in reason for reason in reasons)


@pytest.mark.parametrize("precision", thinned(PRECISIONS))
def test_every_site_is_measured_on_arguments_of_its_own(precision):
    """What the planner would do on a GPU: check both backends at every quantised site, and time them."""
    quantized = PRECISIONS[precision]
    for site in filter(lambda site: site.quantized, SITES.values()):
        case = sites.site_case(WIDE, site, 1, testing.device(), torch.bfloat16, quantized)
        entries = [registry.backend(case.op, name) for name in ("torch", "triton")]
        _, record = planner.measure(case, entries, testing.device())
        assert set(record["ms"]) == {"torch", "triton"}, record


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gated_fc1_asks_for_swiglu(activation):
    config = dataclasses.replace(SMALL, activation=activation)
    for site in filter(lambda site: site.quantized, SITES.values()):
        spec = sites.site_spec(config, site, 1, testing.device(), torch.bfloat16, torch.int8)
        assert ("swiglu" in spec.features) == (activation == "swiglu" and site.product == "fc1"), site


def test_a_nan_stays_in_its_image():
    for precision in PRECISIONS:
        batch = images(SMALL)
        batch[1, 0, 3, 3] = float("nan")
        tokens = engine(dtype=precision)(batch).tokens
        assert tokens[1].isnan().all()
        assert tokens[[0, 2]].isfinite().all()


@pytest.fixture(scope="module")
def exact():
    """CLIP's embeddings of the photos in fp32."""
    return photo_embeddings("fp32", backend="torch")


def photo_embeddings(dtype, **options):
    made = vitfast.load(weights.clip_vit_b16(), device=testing.device(), dtype=dtype, **options)
    return torch.cat([made(torch.from_numpy(photo)[None]).embedding.float() for photo in weights.photos()])


@pytest.mark.full
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_clips_embeddings_of_photos(precision, exact):
    cosine = torch.cosine_similarity(photo_embeddings(precision), exact)
    assert cosine.mean() >= COSINE, cosine.tolist()
    assert cosine.max() < 0.9999, "bf16 alone is as near as this: is anything quantised?"


FASHION = Path("/usr/share/datasets/fashion-mnist")
TRAIN, HELD_OUT, CHUNK, POINTS = 1000, 3000, 50, 0.5
"""Two probes that disagree on 4 % of n images differ in accuracy by sqrt(0.04 / n) from chance alone: 0.63 points
for 1000 images, which would make a bound of 0.5 a matter of luck, and 0.37 for 3000."""


def fashion(part, count):
    """Images uint8 [count, 28, 28] and labels of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017)."""
    if not FASHION.is_dir():
        pytest.skip(f"no {FASHION}: it comes with the Debian package dataset-fashion-mnist")
    pixels = np.frombuffer(
        gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return pixels.reshape(-1, 28, 28)[:count], labels[:count]


@pytest.mark.full  # 12000 images at a quarter of a second on two idle cores
@pytest.mark.timeout(4 * 3600)
def test_linear_probe_keeps_its_accuracy():
    """On held-out images, in points: fp32's own probe on each precision's embeddings, and a probe trained on those."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the probe is scikit-learn's")
    (train, train_labels), (test, test_labels) = fashion("train", TRAIN), fashion("t10k", HELD_OUT)
    accuracy, right, probes = {}, {}, {}
    for precision in ("fp32", *PRECISIONS):
        made = vitfast.load(weights.clip_vit_b16(), device=testing.device(), dtype=precision)

        def embed(pixels, made=made):
            parts = []
            for chunk in np.array_split(pixels, len(pixels) // CHUNK):
                big = [np.asarray(Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC)) for p in chunk]
                batch = torch.from_numpy(np.stack(big))[..., None].expand(-1, -1, -1, 3).contiguous()
                parts.append(made(batch, preprocessed=True).embedding.float())
            return torch.nn.functional.normalize(torch.cat(parts), dim=-1).cpu().numpy()

        features = embed(test)
        probes[precision] = linear_model.LogisticRegression(C=10.0, max_iter=2000).fit(embed(train), train_labels)
        for trained in {"fp32": None, precision: None}:
            right[precision, trained] = probes[trained].predict(features) == test_labels
            accuracy[precision, trained] = 100 * right[precision, trained].mean()
    for run, correct in right.items():
        lost, won = (right["fp32", "fp32"] & ~correct).sum(), (correct & ~right["fp32", "fp32"]).sum()
        print(f"{run[0]}, probe of {run[1]}: {accuracy[run]:.2f} %; {lost} images lost and {won} won of {len(correct)}")
    for run, score in accuracy.items():
        assert score >= accuracy["fp32", "fp32"] - POINTS, (run, accuracy)


def test_verify_shows_the_cosine(tmp_path):
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    from helpers.peers import import_transformers, transformers_model

    import_transformers()
    transformers_model("ViTModel", {"image_size": 32, "patch_size": 16, **config}).save_pretrained(tmp_path)
    for precision in PRECISIONS:
        result = CliRunner().invoke(app, ["verify", str(tmp_path), "--dtype", precision], env={"COLUMNS": "100"})
        assert result.exit_code == 0, result.output
        assert f"dtype: {precision}" in result.output
        assert "cosine" in result.output
