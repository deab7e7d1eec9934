"""Engine: a checkpoint, a plan and packed weights, ready to run on batches of images."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitfast import model, planner
from vitfast.checkpoints import Checkpoint
from vitfast.checkpoints import load as load_checkpoint
from vitfast.images import preprocess_batch
from vitfast.model import Output

if TYPE_CHECKING:
    from os import PathLike

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

QUANTIZED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""8-bit products; everything around them is bf16."""

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes for which a CUDA graph is captured; a batch runs in the smallest that holds it."""


class Engine:
    """A Vision Transformer ready to run. Make one with `vitfast.load`.

    Attributes:
        config: the architecture. preprocess: the model's own preprocessing, or None if unknown.
        labels: class names, or None. device, dtype: where and in what the model computes.
        precision: the dtype's name, or "fp8" or "int8" where products are quantised; dtype is then bf16.
        plan: which backend runs each part (see `vitfast.planner`).

    A NaN or infinity in an image is not looked for (that would cost a pass over it, and on a GPU a
    wait): it makes that image's outputs NaN, and no other image's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        graphs: bool = True,
        buckets: tuple[int, ...] = BUCKETS,
        keep: tuple[str, ...] = (),
    ) -> None:
        self.config = checkpoint.config
        self.preprocess = checkpoint.preprocess
        self.labels = checkpoint.labels
        self.device = resolve_device(device)
        quantized = QUANTIZED.get(dtype) if isinstance(dtype, str) else None
        self.dtype = torch.bfloat16 if quantized else resolve_dtype(dtype, self.device)
        self.precision = str(dtype) if quantized else str(self.dtype).removeprefix("torch.")
        self.plan = planner.build(
            self.config,
            device=self.device,
            dtype=self.dtype,
            backend=backend,
            quantized=quantized,
            keep=_kept(self.config.depth, keep, quantized),
        )
        mean, std = (self.preprocess.mean, self.preprocess.std) if self.preprocess else (None, None)
        self._weights = model.arrange(
            self.config, checkpoint.weights, self.plan, device=self.device, dtype=self.dtype, mean=mean, std=std
        )
        self._positions: OrderedDict[tuple[int, int], Tensor | None] = OrderedDict()
        self._graphs = _Graphs(self, buckets) if graphs and self.device.type == "cuda" else None

    def __repr__(self) -> str:
        return f"Engine({self.config.name or 'ViT'}, {self.device}, {self.precision}, {self.backend})"

    @property
    def backend(self) -> str:
        """The backends at work, e.g. "triton" or "torch+triton"."""
        return "+".join(sorted(set(self.plan.backends.values())))

    @torch.inference_mode()
    def __call__(self, images: Tensor, *, preprocessed: bool = False) -> Output:
        """Run the model.

        Args:
            images: uint8 [B, H, W, 3], any size: preprocessed as the model's own processor does it
                (resize, crop, normalise); or floating point [B, 3, H, W], already normalised, of the model's size
                (or any multiple of the patch size, if the model allows it). Moved to the engine's
                device if elsewhere.
            preprocessed: uint8 images have been resized and cropped already, and are only normalised.

        Returns:
            Output with tokens, embedding and logits in the engine's dtype, on its device. An empty
            batch gives empty outputs.

        Raises:
            ValueError: for a wrong number of axes, channel count, dtype or size.
        """
        images = self._check(images, preprocessed)
        size = self._size(images)
        if images.shape[0] == 0:
            return self._empty(size)
        if self._graphs is not None:
            return self._graphs(images)
        return self.run(images)

    def run(self, images: Tensor) -> Output:
        """The forward itself on checked images of the model's size, without graphs or chunks."""
        return model.forward(self.config, self._weights, self._position(self._size(images)), images, self.plan)

    def _check(self, images: Tensor, preprocessed: bool) -> Tensor:
        channels = self.config.in_channels
        if not isinstance(images, Tensor):
            raise ValueError(f"images must be a torch.Tensor, got {type(images).__name__}")
        if images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [B, H, W, {channels}] or float [B, {channels}, H, W], "
                f"got shape {tuple(images.shape)}"
            )
        if images.dtype == torch.uint8:
            if images.shape[3] != channels:
                raise ValueError(
                    f"uint8 images must be [B, H, W, {channels}], got {images.shape[3]} channels "
                    f"in shape {tuple(images.shape)}"
                )
            if self.preprocess is None:
                raise ValueError(
                    "the checkpoint does not say how its images are normalised, so uint8 images cannot be "
                    "preprocessed; pass normalised float images [B, C, H, W]"
                )
            if images.shape[0] and 0 in images.shape[1:3]:
                raise ValueError(f"images have no pixels: shape {tuple(images.shape)}")
            images = images.to(self.device, non_blocking=True)
            if preprocessed:
                return images
            if not images.shape[0]:
                return images.new_empty(0, *self.preprocess.size, channels)
            return preprocess_batch(images, self.preprocess)
        if not images.is_floating_point():
            raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
        if images.shape[1] != channels:
            raise ValueError(
                f"float images must be [B, {channels}, H, W], got {images.shape[1]} channels "
                f"in shape {tuple(images.shape)}"
            )
        return images.to(self.device, self.dtype, non_blocking=True)

    def _size(self, images: Tensor) -> tuple[int, int]:
        """(height, width) of the images, checked against what the model takes."""
        height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:4]
        size, native = (height, width), self.config.image_size
        if size != native and not self.config.dynamic_size:
            raise ValueError(f"image size {height}x{width}: this model takes {native[0]}x{native[1]} only")
        self.config.grid(size)
        return size

    def _position(self, size: tuple[int, int]) -> Tensor | None:
        """The position embedding for an image size; the last few sizes are kept."""
        if self._weights.position is None or size == self.config.image_size:
            return self._weights.position
        if size not in self._positions:
            self._positions[size] = model.resize_position(
                self._weights.position,
                self.config.grid(self.config.image_size),
                self.config.grid(size),
                antialias=self.config.position_antialias,
                offset=self.config.position_offset,
            )
            while len(self._positions) > 8:
                self._positions.popitem(last=False)
        return self._positions[size]

    def _empty(self, size: tuple[int, int]) -> Output:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(0, *shape, dtype=self.dtype, device=self.device)

        config = self.config
        return Output(
            tokens=zeros(config.tokens(size), config.width),
            embedding=zeros(config.projection_dim or config.width),
            logits=zeros(config.num_classes) if config.num_classes else None,
        )


class _Graphs:
    """CUDA graphs of the forward, one per (batch bucket, image size and dtype), in one memory pool.

    A batch is copied into its bucket's static input and the graph replayed; outputs are copied out,
    since the next replay of any graph in the pool may overwrite them. Larger batches run in chunks.
    """

    KEEP = 16
    """Graphs kept; the least recently used goes first."""

    def __init__(self, engine: Engine, buckets: tuple[int, ...]) -> None:
        if not buckets or any(b < 1 for b in buckets):
            raise ValueError(f"buckets must be positive batch sizes, got {buckets}")
        self._engine = engine
        self._buckets = sorted(buckets)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._captured: OrderedDict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, Output]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> Output:
        largest = self._buckets[-1]
        with self._lock, torch.cuda.device(self._engine.device):
            parts = [self._replay(chunk) for chunk in images.split(largest)]
        return parts[0] if len(parts) == 1 else _concatenate(parts)

    def _replay(self, images: Tensor) -> Output:
        batch = images.shape[0]
        bucket = next(b for b in self._buckets if b >= batch)
        key = (bucket, images.shape[1:], images.dtype)
        if key not in self._captured:
            self._captured[key] = self._capture(images, bucket)
            while len(self._captured) > self.KEEP:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        graph, static, output = self._captured[key]
        static[:batch].copy_(images, non_blocking=True)
        graph.replay()
        return Output(*(None if t is None else t[:batch].clone() for t in _tensors(output)))

    def _capture(self, images: Tensor, bucket: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Output]:
        static = images.new_zeros(bucket, *images.shape[1:])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._engine.run(static)  # compiles kernels and fills caches outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._engine.run(static)
        return graph, static, output


def _tensors(output: Output) -> list[Tensor | None]:
    return [getattr(output, field.name) for field in fields(output)]


def _concatenate(parts: list[Output]) -> Output:
    columns = zip(*map(_tensors, parts), strict=True)
    return Output(*(None if column[0] is None else torch.cat(column) for column in columns))


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU if there is one, else the CPU.

    Raises:
        ValueError: for a device that is not there or not supported.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}: {error}") from None
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device!r} was asked for, but this torch sees no CUDA device")
        index = torch.cuda.current_device() if resolved.index is None else resolved.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device {device!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", index)
    if resolved.type != "cpu":
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    return resolved


def _kept(depth: int, keep: tuple[str, ...], quantized: torch.dtype | None) -> frozenset[str]:
    """The products that are not quantised, by full name; "fc2" stands for that of every block.

    Raises:
        ValueError: for a name that no product has, or if nothing is quantised.
    """
    if not isinstance(keep, tuple) or (keep and not quantized):
        raise ValueError(f"keep is a tuple of products that dtype 'fp8' or 'int8' leaves alone, got {keep!r}")
    products = {f"blocks.{i}.{site}" for i in range(depth) for site in model.PRODUCTS}
    names: set[str] = set()
    for asked in keep:
        found = {name for name in products if asked in (name, name.rpartition(".")[2])}
        if not found:
            sites = ", ".join(model.PRODUCTS)
            raise ValueError(f"keep names are {sites}, or one in a block from blocks.0 to {depth - 1}, got {asked!r}")
        names |= found
    return frozenset(names)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or bf16 on a GPU and fp32 on the CPU.

    Raises:
        ValueError: for a dtype other than fp32, fp16, bf16.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in set(DTYPES.values()):
        raise ValueError(f"dtype must be one of {', '.join((*DTYPES, *QUANTIZED))}, got {dtype!r}")
    return resolved


def load(
    source: str | PathLike[str] | torch.nn.Module,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    keep: tuple[str, ...] = (),
    allow_pickle: bool = False,
    revision: str | None = None,
) -> Engine:
    """Load a Vision Transformer and make it ready to run.

    Args:
        source: a live timm, transformers or torchvision model; a directory or .safetensors file;
            or a Hugging Face hub id.
        device: "cpu", "cuda", "cuda:1"...; the GPU if there is one by default.
        dtype: "fp32", "fp16", "bf16" or a torch dtype; bf16 on a GPU and fp32 on the CPU by default. "fp8" and
            "int8" compute the products of the blocks on quantised operands and all else in bf16; on the CPU
            that is an emulation, for accuracy and not for speed (docs/numerics.md).
        backend: "auto", or "torch", "triton" or "native" to force one. A forced "torch" runs PyTorch's
            plain ops; on the CPU that gives the bits of the model's own library, at its speed.
        keep: products that "fp8" and "int8" leave in bf16: "fc2" for every block's, "blocks.3.fc2" for one.
        allow_pickle: read .bin and .pth files too (weights only, but still a pickle).
        revision: of a hub id.

    Raises:
        ValueError, CheckpointError: if the source, device or dtype does not fit; with the reason.
        BackendError: if a forced backend cannot run this model here; with every reason.
    """
    checkpoint = load_checkpoint(source, allow_pickle=allow_pickle, revision=revision)
    return Engine(checkpoint, device=device, dtype=dtype, backend=backend, keep=keep)
