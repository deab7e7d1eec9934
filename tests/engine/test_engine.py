"""The engine: whole forwards against float64, refusals, sizes, empty batches, graphs' bookkeeping."""

import dataclasses
import threading

import pytest
import torch
from helpers.engines import FAMILIES, PREPROCESS, SMALL, engine
from helpers.forwards import changed, check, oracle
from helpers.grids import thinned

import vitfast
from vitfast import testing
from vitfast.engine import plan_cache, planner
from vitfast.engine.engine import Engine
from vitfast.images.preprocess import preprocess_batch
from vitfast.models import positions
from vitfast.models.plan import SITES
from vitfast.models.weights import prepare_weights
from vitfast.ops import accuracy, mkldnn, registry

TINY = vitfast.ViTConfig((224, 224), (16, 16), width=192, depth=12, heads=3, mlp_dim=768, num_classes=1000)


@pytest.mark.parametrize("family", thinned(FAMILIES, 3))
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_triton_forward_of_every_family(family, dtype):
    config = dataclasses.replace(SMALL, **FAMILIES[family])
    check(config, testing.make(2, 3, 32, 48), dtype, "triton")


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_forward_of_vit_tiny(dtype):
    """A real ViT-Ti/16 at 224, from uint8 pixels, twelve blocks, norms folded: five launches a block."""
    pixels = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8, device=testing.device())
    check(TINY, pixels, dtype, "triton", fold_norm=True)


@pytest.mark.parametrize("side", [112, pytest.param(224, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
def test_triton_forward_of_vit_tiny_in_two_launches_a_block(dtype, side):
    """Two blocks of a ViT-Ti/16, held to the same as unfused."""
    config = dataclasses.replace(TINY, image_size=(side, side), depth=2)
    pixels = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8, device=testing.device())
    check(config, pixels, dtype, "triton", fused=("attention_block", "mlp"), fold_norm=True)


@pytest.mark.parametrize(
    ("fused", "dtype", "block"),
    [
        ([], "fp32", ["qkv", "attention", "proj", "fc1", "fc2"]),
        (["mlp"], "bf16", ["qkv", "attention", "proj", "mlp"]),
        (["attention_block"], "bf16", ["attention_block", "fc1", "fc2"]),
        (["attention_block", "mlp"], "bf16", ["attention_block", "mlp"]),
    ],
)
def test_a_folded_block_is_five_launches_or_two(fused, dtype, block):
    small, launches = engine(backend="triton", dtype=dtype), []

    def counted(site, call):
        return lambda *args, **kwargs: (launches.append(site), call(*args, **kwargs))[1]

    plan = changed(small.plan, fused, fold_norm=True)
    calls = {site: getattr(plan, site) for site in SITES if not SITES[site].quantized}
    calls = {site: counted(site, call) for site, call in calls.items() if call is not None}
    small.runner.plan = dataclasses.replace(plan, **calls)
    checkpoint = testing.random_weights(SMALL)
    small.runner.weights = prepare_weights(SMALL, checkpoint, small.plan, device=small.device, dtype=small.dtype)
    small.run(testing.make(1, 3, 32, 48))
    before = ["patch_embed", "row_stats"] if "attention_block" not in fused else ["patch_embed"]
    assert launches == [*before, *block * SMALL.depth, "layer_norm", "head"]


@pytest.mark.parametrize(("fold_norm", "fuse_mlp"), [(False, False), (True, False), (False, True), (True, True)])
def test_plan_variants_agree(fold_norm, fuse_mlp):
    for dtype in (torch.float32, torch.bfloat16):
        fused = ("mlp",) if fuse_mlp else ()
        check(SMALL, testing.make(2, 3, 32, 48), dtype, "triton", fold_norm=fold_norm, fused=fused)


@pytest.mark.parametrize(("fold_norm", "fuse_mlp"), [(False, False), (True, False), (False, True), (True, True)])
def test_plan_variants_with_fused_attention_agree(fold_norm, fuse_mlp):
    config = dataclasses.replace(SMALL, layer_scale=True)
    fused = ("attention_block", *(["mlp"] if fuse_mlp else []))
    check(config, testing.make(2, 3, 32, 48), torch.bfloat16, "triton", fold_norm=fold_norm, fused=fused)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_cpu_forward_of_every_family(family, backend, tmp_path, monkeypatch):
    """The CPU's plan with each backend that has a packed linear; native has a packed patch_embed, too."""
    entry = vitfast.ops.registry.backend("linear", backend)
    packed = planner.packed_op(entry, vitfast.ops.Spec("linear", "cpu", torch.float32))
    if entry.missing or not packed:
        pytest.skip(entry.missing or "this torch has no oneDNN")
    monkeypatch.setattr(plan_cache, "plans_dir", lambda: tmp_path / "plans")
    monkeypatch.setattr(
        planner,
        "measure",
        lambda case, able, device, timed: (
            next((e for e in able if e.name == backend), able[0]),
            {"ms": dict.fromkeys(("torch", "native"), 1.0), "refused": {}},
        ),
    )
    config = dataclasses.replace(SMALL, **FAMILIES[family])
    checkpoint = vitfast.Checkpoint(config, testing.random_weights(config), PREPROCESS)
    small = Engine(checkpoint, device="cpu", dtype="fp32")
    linear = [name for name, site in SITES.items() if site.op == "linear" and name != "head"]
    assert {getattr(small.plan, site) for site in linear} == {packed[1]}
    narrow = backend == "torch" and max(config.num_classes, config.projection_dim, 1) < mkldnn.NARROW
    assert small.plan.head is (entry.call if narrow else packed[1])
    assert ("patch_embed" in small.plan.packs) == (backend == "native")
    got = small(testing.make(2, 3, 32, 48).cpu())
    want = oracle(config, testing.make(2, 3, 32, 48))
    torch.testing.assert_close(got.embedding.double(), want.embedding.cpu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.tokens.double(), want.tokens.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_bf16_forward_of_every_family_on_torch(family, tmp_path, monkeypatch):
    """Products packed by oneDNN, quick_gelu as it is: a factor would round the weights once more."""
    if reasons := mkldnn.why_not(vitfast.ops.Spec("linear", "cpu", torch.bfloat16)):
        pytest.skip("; ".join(reasons))
    config = dataclasses.replace(SMALL, **{"num_classes": 16, **FAMILIES[family]})
    checkpoint = vitfast.Checkpoint(config, testing.random_weights(config), PREPROCESS)
    plain = Engine(checkpoint, device="cpu", dtype="bf16", backend="torch")
    monkeypatch.setattr(plan_cache, "plans_dir", lambda: tmp_path / "plans")
    with registry.without([(op, "native") for op in registry.OPS], "torch alone"):
        packed = Engine(checkpoint, device="cpu", dtype="bf16")
    assert {getattr(packed.plan, site) for site in ("qkv", "proj", "fc1", "fc2", "head")} == {mkldnn.linear}
    assert not packed.plan.quick_gelu_as_silu and plain.plan.qkv is not mkldnn.linear
    images = testing.make(2, 3, 32, 48)
    got, base, want = packed(images.cpu()), plain(images.cpu()), oracle(config, images)
    for field in ("tokens", "embedding", "logits"):
        values = [getattr(output, field) for output in (got, want, base)]
        if values[1] is not None:
            accuracy.assert_close(values[0], values[1].cpu(), values[2], what=field)
    assert packed(images[:0].cpu()).tokens.shape == (0, config.tokens(), config.width)


def test_uint8_equals_normalised_float():
    small = engine(dtype="fp32")
    pixels = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    mean, std = torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std)
    floats = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(small(pixels).logits, small(floats).logits, rtol=1e-4, atol=1e-4)


def test_uint8_of_another_size_is_preprocessed():
    small = engine(dtype="fp32")
    assert small(torch.zeros(2, 50, 70, 3, dtype=torch.uint8)).tokens.shape == (2, 7, 64)


def test_preprocessed_pixels_are_only_normalised():
    crop = dataclasses.replace(PREPROCESS, resize=(40, 60), center_crop=True)
    small = engine(preprocess=crop, dtype="fp32")
    raw = torch.randint(0, 256, (1, 32, 48, 3), dtype=torch.uint8, device=testing.device())
    ready = preprocess_batch(raw, crop)
    assert not torch.equal(raw, ready)
    assert torch.equal(small(raw).logits, small(ready, preprocessed=True).logits)
    with pytest.raises(ValueError, match="image size 40x60: this model takes 32x48 only"):
        small(torch.zeros(1, 40, 60, 3, dtype=torch.uint8), preprocessed=True)


def test_dynamic_size_resizes_the_position_embedding():
    config = dataclasses.replace(SMALL, dynamic_size=True, position_antialias=False)
    dynamic = engine(config, dtype="fp32")
    assert dynamic(testing.make(1, 3, 64, 16)).tokens.shape == (1, 1 + 4, 64)
    grid = testing.random_weights(config)["position"].to(testing.device())
    same = positions.resize_position(grid, (2, 3), (2, 3), antialias=False)
    assert torch.equal(same, grid)
    want = torch.nn.functional.interpolate(grid.view(1, 2, 3, 64).permute(0, 3, 1, 2), size=(4, 1), mode="bicubic")
    got = positions.resize_position(grid, (2, 3), (4, 1), antialias=False)
    torch.testing.assert_close(got, want.permute(0, 2, 3, 1).reshape(4, 64))
    smooth = positions.resize_position(grid, (2, 3), (1, 1), antialias=True)
    assert not torch.allclose(smooth, positions.resize_position(grid, (2, 3), (1, 1), antialias=False))


@pytest.mark.parametrize(("shape", "dtype"), [((0, 32, 48, 3), torch.uint8), ((0, 3, 32, 48), torch.float32)])
def test_empty_batch_gives_empty_outputs(shape, dtype):
    output = engine(dtype="fp32")(torch.zeros(shape, dtype=dtype))
    assert output.tokens.shape == (0, 7, 64)
    assert output.embedding.shape == (0, 64)
    assert output.logits.shape == (0, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 32, 48, 4, dtype=torch.uint8), "got 4 channels"),
        (torch.zeros(2, 1, 32, 48), "got 1 channels"),
        (torch.zeros(2, 3, 32, 32), "image size 32x32: this model takes 32x48 only"),
        (torch.zeros(3, 32, 48), r"got shape \(3, 32, 48\)"),
        (torch.zeros(2, 3, 32, 48, dtype=torch.int32), "got torch.int32"),
        (torch.zeros(2, 0, 48, 3, dtype=torch.uint8), "no pixels"),
        ([[1, 2]], "got list"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        engine(dtype="fp32")(images)


def test_size_not_a_multiple_of_the_patch_is_refused():
    dynamic = engine(dataclasses.replace(SMALL, dynamic_size=True), dtype="fp32")
    with pytest.raises(ValueError, match="33x48 is not a positive multiple of the patch size 16x16"):
        dynamic(torch.zeros(1, 3, 33, 48))


def test_uint8_without_known_normalisation_is_refused():
    with pytest.raises(ValueError, match="does not say how its images are normalised"):
        engine(preprocess=None, dtype="fp32")(torch.zeros(1, 32, 48, 3, dtype=torch.uint8))


def test_nan_stays_in_its_own_image():
    images = testing.make(3, 3, 32, 48)
    images[1, 0, 0, 0] = float("nan")
    output = engine(dtype="fp32")(images)
    assert output.embedding.isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "int4"}, "'int4'"),
        ({"dtype": torch.float64}, "float64"),
        ({"backend": "cudnn"}, "'cudnn'"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        engine(**kwargs)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99"])
def test_bad_devices_are_refused(device):
    checkpoint = vitfast.Checkpoint(SMALL, testing.random_weights(SMALL), PREPROCESS)
    with pytest.raises(ValueError, match=device):
        Engine(checkpoint, device=device)


def test_forced_backend_that_is_missing_gives_its_reason(monkeypatch):
    entry = vitfast.ops.Backend("native", "linear", print, missing="the C++ extension is not built: no compiler")
    monkeypatch.setattr("vitfast.ops.registry.backend", lambda op, name: entry)
    with pytest.raises(vitfast.BackendError, match="not built: no compiler"):
        engine(backend="native")


def test_engine_is_thread_safe():
    small, images = engine(dataclasses.replace(SMALL, dynamic_size=True), dtype="fp32"), testing.make(2, 3, 32, 48)
    want = small(images).embedding
    results = [None] * 8

    def run(i):
        small(testing.make(1, 3, 16 * (1 + i), 48))
        results[i] = small(images).embedding

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, want) for result in results)


@pytest.mark.gpu
@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
@pytest.mark.parametrize("batch", [1, 3, 8, 21])
def test_graphs_equal_eager(batch):
    graphed, eager = engine(buckets=(1, 4, 8)), engine(graphs=False)
    images = testing.make(batch, 3, 32, 48)
    for _ in range(2):
        torch.testing.assert_close(graphed(images).logits, eager(images).logits, rtol=0.02, atol=0.02)
    first = graphed(images)
    kept = first.embedding.clone()
    graphed(images * 2)
    assert torch.equal(first.embedding, kept)
