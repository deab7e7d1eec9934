"""The engines that whole models are compared with, each optional and named.

A provider is a function of (timm model in eval mode, example images) that gives a function of images, or raises
`Absent` with the reason; a missing package or an error of the library's becomes the reason in its cell. To add one,
write that function and name it in PROVIDERS.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfast.benchmarks.providers import INTERPRETED, Absent
from vitfast.engine import planner
from vitfast.engine.dtypes import QUANTIZED
from vitfast.engine.engine import Engine
from vitfast.engine.load import load
from vitfast.integrations.accelerate import accelerate
from vitfast.ops import mkldnn, registry

Run = Callable[[Tensor], Tensor]
BASELINE = "timm eager"


@dataclass(frozen=True)
class Classifier:
    """An engine as a function of images that gives what timm's forward does."""

    engine: Engine

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images; of a model without a classifier the embedding [B, width]."""
        output = self.engine(images)
        return output.embedding if output.logits is None else output.logits

    def facts(self) -> dict[str, Any]:
        """For the row: plan, the backend of each site; plan_s, how long its measurements took when they were made."""
        plan = self.engine.plan
        return {"plan": dict(plan.backends)} | ({"plan_s": planner.seconds(plan)} if plan.measured else {})


def engine(model: Any, images: Tensor) -> Run:
    """vitfast's engine as it is planned, on the images' device and dtype."""
    return Classifier(load(model, device=images.device, dtype=images.dtype))


def engine_triton(model: Any, images: Tensor) -> Run:
    """vitfast's engine on Triton kernels alone."""
    if not images.is_cuda:
        raise Absent(INTERPRETED)
    return Classifier(load(model, device=images.device, dtype=images.dtype, backend="triton"))


NATIVE_OPS = ("patch_embed", "linear", "attention")


def engine_native(model: Any, images: Tensor) -> Run:
    """vitfast's engine with the C++ extension for the ops of a block that it has; on a GPU norms are then folded.

    Triton finds the first row statistics there, and norms what stands outside of the blocks.
    """
    others = [(op, name) for op in NATIVE_OPS for name in ("torch", "triton")]
    others += [(op, "triton") for op in ("mlp", "attention_block")]
    if images.is_cuda:
        others += [("layer_norm", "torch"), ("row_stats", "torch")]
    with registry.without(others, "not a part of vitfast native"):
        # Deterministic, for a plan that is measured would be kept, and taken for that of the whole engine.
        return Classifier(load(model, device=images.device, dtype=images.dtype, deterministic=True))


def engine_in_8_bits(precision: str, model: Any, images: Tensor) -> Run:
    """vitfast's engine with the products of the blocks in 8 bits."""
    spec = registry.Spec("quantized_linear", "cpu", QUANTIZED[precision])
    reasons, onednn = registry.backend(spec.op, "native").why_not(spec), mkldnn.why_not(spec)
    if not images.is_cuda and reasons and onednn:
        why = "; ".join([*reasons, *onednn])
        raise Absent(f"on this CPU it is an emulation, there to see what it costs in accuracy: {why}")
    return Classifier(load(model, device=images.device, dtype=precision))


def eager(model: Any, images: Tensor) -> torch.nn.Module:
    """timm's own forward, in the images' dtype."""
    return copy.deepcopy(model).to(images.device, images.dtype)


def eager_accelerated(model: Any, images: Tensor) -> Run:
    """timm's forward, its blocks run by `vitfast.accelerate`."""
    return accelerate(eager(model, images), strict=True)


def eager_graph(model: Any, images: Tensor) -> Run:
    """timm's forward captured as one CUDA graph: its kernels without Python between them."""
    if not images.is_cuda:
        raise Absent("CUDA graphs need a GPU")
    run = eager(model, images)
    static, stream = images.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(static)

    def replay(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return output.clone()

    return replay


def compiled(model: Any, images: Tensor) -> Run:
    """torch.compile in its default mode."""
    return torch.compile(eager(model, images))


def compiled_tuned(model: Any, images: Tensor) -> Run:
    """torch.compile in the mode max-autotune, which on a GPU brings CUDA graphs."""
    return torch.compile(eager(model, images), mode="max-autotune")


def torchao_fp8(model: Any, images: Tensor) -> Run:
    """torchao's FP8, scales per row and channel as ours, compiled as its documentation has it."""
    if not images.is_cuda:
        raise Absent("runs on a GPU only")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    module = eager(model, images)
    quantize_(module, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return torch.compile(module, mode="max-autotune")


def transformers(model: Any, images: Tensor) -> _HasLogits:
    """transformers' ViTForImageClassification with the same weights and SDPA."""
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTForImageClassification

    weights = model.state_dict()
    if missing := {"cls_token", "pos_embed", "head.weight", "blocks.0.attn.qkv.bias"} - weights.keys():
        raise Absent(f"has no equal of a timm model without {', '.join(sorted(missing))}")
    if others := {name for name in weights if ".ls1." in name or "norm_pre" in name or "reg_token" in name}:
        raise Absent(f"its plain ViT has no {sorted(others)[0]}")
    blocks = model.blocks
    config = ViTConfig(
        hidden_size=weights["cls_token"].shape[-1], num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads, intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        image_size=images.shape[-1], patch_size=model.patch_embed.patch_size[0], layer_norm_eps=model.norm.eps,
        num_labels=model.num_classes,  # type: ignore[call-arg]
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # the names on disk are those of every version
        (Path(folder) / "config.json").write_text(json.dumps(config.to_dict() | {"model_type": "vit"}))
        save_file(_transformers_names(weights), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        theirs = ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    theirs = theirs.eval().to(images.device, images.dtype)
    return _HasLogits(theirs)


class _HasLogits(torch.nn.Module):
    """A model of transformers as a function of images that gives logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def transformers_accelerated(model: Any, images: Tensor) -> Run:
    """The same model of transformers, its blocks run by `vitfast.accelerate`."""
    run = transformers(model, images)
    accelerate(run.model, strict=True)
    return run


def _transformers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights under the names of transformers' ViT on disk."""
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    parts = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if name in names:
            renamed[names[name]] = value
        elif module in names:
            renamed[f"{names[module]}.{kind}"] = value
        else:
            _, index, part = module.split(".", 2)
            layer = f"vit.encoder.layer.{index}"
            if part == "attn.qkv":
                for which, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[f"{layer}.attention.attention.{which}.{kind}"] = third
            else:
                renamed[f"{layer}.{parts[part]}.{kind}"] = value
    return {name: value.cpu().contiguous().clone() for name, value in renamed.items()}


def tensorrt(model: Any, images: Tensor) -> Run:
    """TensorRT by way of torch_tensorrt."""
    if not images.is_cuda:
        raise Absent("runs on a GPU only")
    import torch_tensorrt

    module = eager(model, images)
    return torch_tensorrt.compile(module, ir="dynamo", arg_inputs=[images], use_explicit_typing=True)


def onnxruntime(model: Any, images: Tensor) -> Run:
    """ONNX Runtime on the CPU, fp32, all graph optimisations, as many threads as torch."""
    _on_cpu_in(images, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _export(model, images, path)
        return _onnx_session(path)


def onnxruntime_int8(model: Any, images: Tensor) -> Run:
    """ONNX Runtime's dynamic quantisation: weights in int8 by channel, activations measured at every call."""
    _on_cpu_in(images, torch.float32, torch.bfloat16)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        plain, path = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        _export(model, images.float(), plain)
        products = {"op_types_to_quantize": ["MatMul", "Gemm"], "extra_options": {"MatMulConstBOnly": True}}
        quantize_dynamic(str(plain), str(path), per_channel=True, weight_type=QuantType.QInt8, **products)
        return _onnx_session(path)


def onnxruntime_int8_static(model: Any, images: Tensor) -> Run:
    """ONNX Runtime's static quantisation in QDQ form: weights in int8 by channel, activations as calibrated.

    Products hand on fp32: their outputs in 8 bits as well, its default, cost accuracy and time.
    """
    _on_cpu_in(images, torch.float32, torch.bfloat16)
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static, shape_inference

    with tempfile.TemporaryDirectory() as folder:
        plain, ready, path = (Path(folder) / name for name in ("model.onnx", "ready.onnx", "int8.onnx"))
        _export(model, images.float(), plain)
        shape_inference.quant_pre_process(str(plain), str(ready))
        products = ["MatMul", "Gemm"]
        quantize_static(
            str(ready), str(path), _OnnxCalibration(ready, images), op_types_to_quantize=products, per_channel=True,
            quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": products},
        )  # fmt: skip
        return _onnx_session(path)


class _OnnxCalibration:
    """The calibration images in batches of the exported model's size, as ONNX Runtime asks for them."""

    def __init__(self, path: Path, images: Tensor) -> None:
        import onnx

        self._name = onnx.load(str(path), load_external_data=False).graph.input[0].name
        others, batch = _calibration_images(images), len(images)
        whole = -(-len(others) // batch) * batch  # begun again where the last batch would not be full
        self._batches = iter(others[torch.arange(whole) % len(others)].split(batch))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.numpy()}


def _calibration_images(images: Tensor) -> Tensor:
    """32 images [32, 3, H, W] for quantisations to look at: of the same size and kind as these, but others."""
    return torch.randn(32, *images.shape[1:], generator=torch.Generator().manual_seed(2))


def _onnx_session(path: Path) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.float().numpy()})[0])


def openvino(model: Any, images: Tensor) -> Run:
    """OpenVINO on the CPU, in the images' dtype (its default there may be lower), as many threads as torch."""
    _on_cpu_in(images, torch.float32, torch.bfloat16)
    return _openvino_network(
        _openvino_model(model, images), {torch.float32: "f32", torch.bfloat16: "bf16"}[images.dtype]
    )


def openvino_int8(model: Any, images: Tensor) -> Run:
    """OpenVINO with NNCF's post-training quantisation for transformers, calibrated on other images than these."""
    _on_cpu_in(images, torch.float32, torch.bfloat16)
    import nncf

    others = [image[None].numpy() for image in _calibration_images(images)]
    options = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(others)}
    single = _openvino_model(model, images, batch=-1)
    return _openvino_network(nncf.quantize(single, nncf.Dataset(others), **options), "bf16")


def _openvino_model(model: Any, images: Tensor, batch: int | None = None) -> Any:
    """The exported network, for batches of the images' size, or of any with -1."""
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    import openvino as ov

    made = ov.convert_model(copy.deepcopy(model).float(), example_input=images.float())
    made.reshape([images.shape[0] if batch is None else batch, *images.shape[1:]])
    return made


def _openvino_network(made: Any, precision: str) -> Run:
    """The compiled network; `precision`: of what is not quantised."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    network = ov.Core().compile_model(made, "CPU", settings)
    return lambda x: torch.from_numpy(network(x.float().numpy())[0].copy())


def _on_cpu_in(images: Tensor, *dtypes: torch.dtype) -> None:
    if images.device.type != "cpu" or images.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise Absent(f"compared on the CPU in {names} only, not on {images.device} in {images.dtype}")


def _export(model: Any, images: Tensor, path: Path) -> None:
    import onnx  # noqa: F401
    import onnxscript  # noqa: F401

    torch.onnx.export(copy.deepcopy(model), (images,), str(path), dynamo=True, verbose=False, external_data=False)


PROVIDERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "vitfast": engine,
    "vitfast triton": engine_triton,
    "vitfast native": engine_native,
    "vitfast fp8": functools.partial(engine_in_8_bits, "fp8"),
    "vitfast int8": functools.partial(engine_in_8_bits, "int8"),
    "timm eager": eager,
    "timm accelerated": eager_accelerated,
    "timm CUDA graph": eager_graph,
    "torch.compile": compiled,
    "torch.compile max-autotune": compiled_tuned,
    "transformers": transformers,
    "transformers accelerated": transformers_accelerated,
    "torchao FP8": torchao_fp8,
    "TensorRT": tensorrt,
    "ONNX Runtime": onnxruntime,
    "ONNX Runtime int8": onnxruntime_int8,
    "ONNX Runtime int8 static": onnxruntime_int8_static,
    "OpenVINO": openvino,
    "OpenVINO int8": openvino_int8,
}

EIGHT_BIT = {
    **{"vitfast fp8": "float8_e4m3fn", "torchao FP8": "float8_e4m3fn"},
    **dict.fromkeys(("vitfast int8", "ONNX Runtime int8", "ONNX Runtime int8 static", "OpenVINO int8"), "int8"),
}
"""Those that multiply in 8 bits, and in which."""

DEFAULTS = {
    "cpu": (
        "vitfast", "vitfast int8", "timm eager", "torch.compile", "ONNX Runtime", "ONNX Runtime int8",
        "ONNX Runtime int8 static", "OpenVINO", "OpenVINO int8",
    ),
    "cuda": (
        "vitfast", "vitfast triton", "vitfast native", "vitfast fp8", "timm eager", "timm CUDA graph", "transformers",
        "torch.compile", "TensorRT",
    ),
}  # fmt: skip
"""Who takes part unless told otherwise, those that compile last; max-autotune takes minutes."""


def defaults(device: str, quantized: torch.dtype | None) -> list[str]:
    """Who takes part on a kind of device; of those only who multiplies in 8 bits of that dtype, if one is given."""
    named = str(quantized).removeprefix("torch.")
    return [name for name in DEFAULTS[device] if quantized is None or EIGHT_BIT.get(name) == named]
