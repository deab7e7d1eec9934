"""The engines that the whole-model benchmark compares with, each optional and named.

A peer is a function of (timm model in eval mode, example images) that gives a function of images, or
raises `Absent` with the reason. To add one, write that function and name it in PEERS.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitfast

Run = Callable[[Tensor], Tensor]


class Absent(RuntimeError):
    """A peer cannot run here; the message says why."""


def engine(model: nn.Module, images: Tensor) -> Run:
    """vitfast's engine, on the images' device and dtype."""
    built = vitfast.load(model, device=images.device, dtype=images.dtype)
    return lambda x: built(x).logits


def eager(model: nn.Module, images: Tensor) -> Run:
    """timm's own forward, in the images' dtype."""
    return copy.deepcopy(model).to(images.device, images.dtype)


def compiled(model: nn.Module, images: Tensor) -> Run:
    """torch.compile, "max-autotune" on a GPU and the default mode elsewhere."""
    return torch.compile(eager(model, images), mode="max-autotune" if images.is_cuda else "default")


def onnxruntime(model: nn.Module, images: Tensor) -> Run:
    """ONNX Runtime on the CPU, fp32, all graph optimisations, as many threads as torch."""
    _cpu_fp32_only(images)
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Absent(str(error)) from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _export(model, images, path)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(model: nn.Module, images: Tensor) -> Run:
    """OpenVINO on the CPU, in fp32 (its default there may be lower), as many threads as torch."""
    _cpu_fp32_only(images)
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    try:
        import openvino as ov
    except ImportError as error:
        raise Absent(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _export(model, images, path)
        core = ov.Core()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        network = core.compile_model(core.read_model(str(path)), "CPU", settings)
    return lambda x: torch.from_numpy(network(x.numpy())[0].copy())


def _cpu_fp32_only(images: Tensor) -> None:
    if images.device.type != "cpu" or images.dtype != torch.float32:
        raise Absent(f"compared on the CPU in fp32 only, not on {images.device} in {images.dtype}")


def _export(model: nn.Module, images: Tensor, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Absent(f"torch.onnx.export needs it: {error}") from None
    torch.onnx.export(copy.deepcopy(model), (images,), str(path), dynamo=True, verbose=False, external_data=False)


PEERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vitfast": engine,
    "timm eager": eager,
    "torch.compile": compiled,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
}
