"""Engine: a checkpoint, a plan and packed weights, ready to run on batches of images."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.engine import planner, streaming
from vitfast.engine.cuda_graphs import Graphs
from vitfast.engine.dtypes import QUANTIZED, resolve_device, resolve_dtype
from vitfast.engine.fingerprint import fingerprint
from vitfast.engine.isolation import isolated
from vitfast.engine.sites import kept_products
from vitfast.images.preprocess import normalize, preprocess_batch
from vitfast.models import vit
from vitfast.models.checkpoints import Checkpoint
from vitfast.models.output import Output
from vitfast.models.weights import prepare_weights, resize_position

if TYPE_CHECKING:
    from vitfast.engine.calibration import Calibration

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes for which a CUDA graph is captured; a batch runs in the smallest that holds it."""


class Engine:
    """A Vision Transformer ready to run. Make one with `vitfast.load`.

    Attributes:
        config: the architecture. preprocess: the model's own preprocessing, or None if unknown.
        labels: class names, or None. problem_type: what the logits are for (see `vitfast.Checkpoint`).
        device, dtype: where and in what the model computes.
        precision: the dtype's name, or "fp8" or "int8" where products are quantised; dtype is then bf16.
        plan: which backend runs each part (see `vitfast.engine.planner`).
        fingerprint: a hash of architecture and weights (see `vitfast.engine.fingerprint`).
        calibration: what `load(..., calibration=images)` measured, else None (see `vitfast.engine.calibrate`).

    A NaN or infinity in an image is not looked for (that would cost a pass over it, and on a GPU a
    wait): it makes that image's outputs NaN, and no other image's.
    """

    @isolated
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
        self.calibration: Calibration | None = None
        self._made_of = (checkpoint, {"backend": backend, "graphs": graphs, "buckets": buckets, "keep": keep})
        self.config = checkpoint.config
        self.preprocess = checkpoint.preprocess
        self.labels = checkpoint.labels
        self.problem_type = checkpoint.problem_type
        self.fingerprint = fingerprint(checkpoint.config, checkpoint.weights)
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
            keep=kept_products(self.config.depth, keep, quantized),
        )
        mean, std = (self.preprocess.mean, self.preprocess.std) if self.preprocess else (None, None)
        self._weights = prepare_weights(
            self.config, checkpoint.weights, self.plan, device=self.device, dtype=self.dtype, mean=mean, std=std
        )
        self._positions: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._graphs = Graphs(self, buckets) if graphs and self.device.type == "cuda" else None
        self._lanes: weakref.WeakSet[streaming.GpuLane] = weakref.WeakSet()
        self._lanes_lock = threading.Lock()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the weights are there, whichever stream runs first

    def __repr__(self) -> str:
        weights = f"{self._weight_bytes() / 2**20:.1f} MiB of weights"
        return f"Engine({self.config.name or 'ViT'}, {self.device}, {self.precision}, {self.backend}, {weights})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as what it was made of, the checkpoint's weights: the copy plans and packs anew."""
        checkpoint, options = self._made_of
        made = {"device": str(self.device), "dtype": self.precision, **options}
        return _remade, (checkpoint, made), {"calibration": self.calibration}

    @property
    def backend(self) -> str:
        """The backends at work, e.g. "triton" or "torch+triton"."""
        return "+".join(sorted(set(self.plan.backends.values())))

    @isolated
    def __call__(self, images: Tensor, *, preprocessed: bool = False) -> Output:
        """Run the model.

        Args:
            images: uint8 [B, H, W, 3], any size: preprocessed as the model's own processor does it
                (resize, crop, normalise); or floating point [B, 3, H, W], already normalised, of the model's size
                or any other size if the model allows it: multiples of the patch size, and what is no multiple is
                cropped or padded where the model's family does so. Moved to the engine's device if elsewhere.
            preprocessed: uint8 images have been resized and cropped already, and are only normalised.

        Returns:
            Output with tokens, embedding and logits in the engine's dtype, on its device. An empty
            batch gives empty outputs. They are ordinary tensors without gradients, whatever autograd, inference or
            autocast mode the caller is in.

        Raises:
            ValueError: for a wrong number of axes, channel count, dtype or size.
        """
        if not isinstance(images, Tensor):
            raise ValueError(f"images must be a torch.Tensor, got {type(images).__name__}")
        self._check(images.shape, images.dtype)
        images = self._prepare(images.to(self.device, non_blocking=True), preprocessed)
        size = self._size(images)
        if images.shape[0] == 0:
            return self._outputs(0, size)
        if self._graphs is not None:
            output = self._outputs(images.shape[0], size)
            self._graphs(images, output)
            return output
        return self.run(images)

    def stream(
        self, batches: Iterable[streaming.Batch], *, preprocessed: bool = False, tokens: bool = False
    ) -> Iterator[Output]:
        """Run batch after batch; outputs come on the CPU, in order.

            for output in engine.stream(batches):
                save(output.embedding)

        On a GPU the next batch is taken, uploaded and computed while the output of the one before is on its
        way and is used, and the host waits for nothing but the output that it is given. On the CPU a batch is
        computed when it is taken.

        Args:
            batches: each as `__call__` takes it, or a list of uint8 arrays [H, W, C] of one size. Batches of
                one size after another reuse all memory. A pinned tensor is uploaded from where it is, and
                must not be changed until its output has come.
            preprocessed: as in `__call__`.
            tokens: give the tokens, too; they are many, and take time to come back from a GPU.

        Returns:
            An iterator over Output, whose tensors the caller may keep. Several may be at work at once, in as many
            threads. Breaking off waits for the batches under way.

        Raises:
            ValueError: as `__call__` does, with the number of the batch before the message. This, and what
                `batches` raises, comes after the outputs of the batches before.
        """
        options = {"preprocessed": preprocessed, "tokens": tokens}
        if self.device.type == "cpu":
            return streaming.run([streaming.CpuLane(self, **options)], batches)
        upload, download = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        lanes = [streaming.GpuLane(self, upload, download, **options) for _ in range(streaming.LANES)]
        with self._lanes_lock:
            self._lanes.update(lanes)
        return streaming.run(lanes, batches)

    def memory(self) -> dict[str, int]:
        """Bytes that the engine holds now.

        Returns:
            weights: on its device, position embeddings resized for other image sizes included;
            graphs: of the CUDA graphs' inputs, outputs and what is between (see `vitfast.engine.cuda_graphs`);
            staging: on the device, of the runs of `stream` that there are; pinned: theirs in pinned host memory.
        """
        with self._lanes_lock:
            lanes = [lane.memory() for lane in self._lanes]
        return {
            "weights": self._weight_bytes(),
            "graphs": self._graphs.memory() if self._graphs is not None else 0,
            "staging": sum(device for device, _ in lanes),
            "pinned": sum(pinned for _, pinned in lanes),
        }

    def _weight_bytes(self) -> int:
        tensors = {id(t): t.numel() * t.element_size() for t in _tensors((self._weights, *self._positions.values()))}
        return sum(tensors.values())

    def run(self, images: Tensor) -> Output:
        """The forward itself on checked images of the model's size, without graphs or chunks."""
        return self._forward(images, self._position(self._size(images)))

    def _forward(self, images: Tensor, position: Tensor | None) -> Output:
        return vit.forward(self.config, self._weights, position, images, self.plan)

    def _run_into(self, images: Tensor, output: Output) -> None:
        """Run, and write the outputs where the caller wants them."""
        if self._graphs is not None:
            self._graphs(images, output)
        elif images.shape[0]:
            output.copy_(self.run(images))

    def _check(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raise ValueError for images that no model of this kind could take."""
        shape, channels = tuple(shape), self.config.in_channels
        if len(shape) != 4:
            raise ValueError(
                f"images must be uint8 [B, H, W, {channels}] or float [B, {channels}, H, W], got shape {shape}"
            )
        if dtype == torch.uint8:
            if shape[3] != channels:
                raise ValueError(
                    f"uint8 images must be [B, H, W, {channels}], got {shape[3]} channels in shape {shape}"
                )
            if self.preprocess is None:
                raise ValueError(
                    "the checkpoint does not say how its images are normalised, so uint8 images cannot be "
                    "preprocessed; pass normalised float images [B, C, H, W]"
                )
            if shape[0] and 0 in shape[1:3]:
                raise ValueError(f"images have no pixels: shape {shape}")
            return
        if not dtype.is_floating_point:
            raise ValueError(f"images must be uint8 or floating point, got {dtype}")
        if shape[1] != channels:
            raise ValueError(f"float images must be [B, {channels}, H, W], got {shape[1]} channels in shape {shape}")

    def _prepare(self, images: Tensor, preprocessed: bool) -> Tensor:
        """Checked images, on the device, as the forward takes them: resized and cropped, or in the model's dtype."""
        if images.dtype != torch.uint8:
            return self._on_grid(images.to(self.dtype))
        if preprocessed:
            return self._on_grid(images)
        assert self.preprocess is not None
        if not images.shape[0]:
            return self._on_grid(images.new_empty(0, *self.preprocess.size, self.config.in_channels))
        return self._on_grid(preprocess_batch(images, self.preprocess))

    def _on_grid(self, images: Tensor) -> Tensor:
        """Images whose sides are whole patches: cropped or padded where the model's family does so."""
        channels_last = images.dtype == torch.uint8
        height, width = images.shape[1:3] if channels_last else images.shape[2:4]
        if self.config.off_grid == "refuse":
            return images
        rows, columns = self.config.fit((height, width))
        if (rows, columns) == (height, width):
            return images
        if self.config.off_grid == "crop":
            return images[:, :rows, :columns] if channels_last else images[:, :, :rows, :columns]
        if channels_last:  # padded with zeros, which uint8 has none of once mean and std are applied
            assert self.preprocess is not None
            images = normalize(images, self.preprocess, self.dtype)
        return F.pad(images, (0, columns - width, 0, rows - height))

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
        weights = self._weights
        if weights.position is None or size == self.config.image_size:
            return weights.position
        position = self._positions.get(size)
        if position is None:
            position = resize_position(
                weights.position,
                self.config.grid(self.config.image_size),
                self.config.grid(size),
                antialias=self.config.position_antialias,
                offset=self.config.position_offset,
            )
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # other streams will read it
            self._positions[size] = position
            while len(self._positions) > 8:
                self._positions.popitem(last=False)
        return position

    def _outputs(self, batch: int, size: tuple[int, int], *, tokens: bool = True, pinned: bool = False) -> Output:
        """Uninitialised outputs, on the engine's device or in pinned host memory."""
        config = self.config

        def empty(*shape: int) -> Tensor:
            device = "cpu" if pinned else self.device
            return torch.empty(batch, *shape, dtype=self.dtype, device=device, pin_memory=pinned)

        return Output(
            tokens=empty(config.tokens(size), config.width) if tokens else None,
            embedding=empty(config.projection_dim or config.width),
            logits=empty(config.num_classes) if config.num_classes else None,
        )


def _remade(checkpoint: Checkpoint, options: dict[str, Any]) -> Engine:
    return Engine(checkpoint, **options)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in a tree of dataclasses and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif is_dataclass(tree):
        yield from _tensors(tuple(getattr(tree, field.name) for field in fields(tree)))
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from _tensors(branch)
