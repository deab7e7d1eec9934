"""Runner: one model on one device, and its forward. Engine, CUDA graphs, streams and calibration stand on it."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.engine import planner
from vitfast.engine.dtypes import QUANTIZED, resolve_device, resolve_dtype
from vitfast.engine.sites import skipped_products
from vitfast.images.preprocess import normalize, preprocess_batch
from vitfast.models import observe, packed, vit
from vitfast.models.checkpoints import Checkpoint
from vitfast.models.output import Output
from vitfast.models.positions import Positions, positions_for
from vitfast.models.weights import prepare_weights
from vitfast.ops import native
from vitfast.ops.registry import Spec, choose, device_capability

POSITIONS = 8
"""Image sizes whose positions are kept."""


class Runner:
    """A model's config, plan and weights, and what runs them on images: check, prepare, size, position, forward.

    Attributes:
        config, preprocess: of the checkpoint. device, dtype: where and in what the model computes.
        precision: the dtype's name, or "fp8" or "int8" where products are quantised; dtype is then bf16.
        plan: which backend runs each part. weights: as the plan reads them; they share no memory with the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        skip_quantize: tuple[str, ...] = (),
        deterministic: bool = False,
    ) -> None:
        """Arguments and errors: as for `vitfast.load`."""
        self.config, self.preprocess = checkpoint.config, checkpoint.preprocess
        self.device = resolve_device(device)
        quantized = QUANTIZED.get(dtype) if isinstance(dtype, str) else None
        self.dtype = torch.bfloat16 if quantized else resolve_dtype(dtype, self.device, besides=tuple(QUANTIZED))
        self.precision = str(dtype) if quantized else str(self.dtype).removeprefix("torch.")
        self.plan = planner.build(
            self.config,
            device=self.device,
            dtype=self.dtype,
            backend=backend,
            quantized=quantized,
            skip_quantize=skipped_products(self.config.depth, skip_quantize, quantized),
            deterministic=deterministic,
        )
        # Before the forward, and of images whose size no plan knows: by the default order, not by a measurement.
        pixels = Spec("resample", self.device.type, torch.uint8, device_capability(self.device))
        self._resample = choose(pixels, backend).call
        mean, std = (self.preprocess.mean, self.preprocess.std) if self.preprocess else (None, None)
        self.weights = prepare_weights(
            self.config, checkpoint.weights, self.plan, device=self.device, dtype=self.dtype, mean=mean, std=std,
            stem=checkpoint.stem, neck=checkpoint.neck, own_blocks=checkpoint.own_blocks,
        )  # fmt: skip
        self.positions: OrderedDict[tuple[int, int], Positions] = OrderedDict()
        self.ends: OrderedDict[tuple[tuple[int, int], ...], Tensor] = OrderedDict()
        """Of packed images of these numbers and sizes, where each begins (see `vitfast.models.packed.lengths`)."""
        self._pool = native.memory_pool() if self.device.type == "cpu" else contextlib.nullcontext()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the weights are there, whichever stream runs first

    def check(self, shape: Sequence[int], dtype: torch.dtype) -> None:
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

    def prepare(self, images: Tensor, preprocessed: bool) -> Tensor:
        """Checked images, on the device, as the forward takes them: resized and cropped, or in the model's dtype."""
        if images.dtype != torch.uint8:
            return self._on_grid(images.to(self.dtype))
        if preprocessed:
            return self._on_grid(images)
        assert self.preprocess is not None
        if not images.shape[0]:
            return self._on_grid(images.new_empty(0, *self.preprocess.size, self.config.in_channels))
        return self._on_grid(preprocess_batch(images, self.preprocess, resample=self._resample))

    def _on_grid(self, images: Tensor) -> Tensor:
        """Images whose sides are whole patches: cropped or padded where the model's family does so."""
        if self.config.stem and images.dtype == torch.uint8:
            assert self.preprocess is not None
            images = normalize(images, self.preprocess, self.dtype)
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

    def size(self, images: Tensor) -> tuple[int, int]:
        """(height, width) of prepared images.

        Raises:
            ValueError: if the model does not take it.
        """
        height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:4]
        size, native = (height, width), self.config.image_size
        if size != native and not self.config.dynamic_size:
            raise ValueError(f"image size {height}x{width}: this model takes {native[0]}x{native[1]} only")
        grid, unit = self.config.grid(size), self.config.neck_patches
        if self.config.neck_whole and (grid[0] % unit[0] or grid[1] % unit[1]):
            raise ValueError(
                f"image size {height}x{width}: its {grid[0]}x{grid[1]} patches are no multiple of the "
                f"{unit[0]}x{unit[1]} that this model joins ({self.config.neck})"
            )
        return size

    def position(self, size: tuple[int, int]) -> Positions:
        """The positions for an image size; those of the last few sizes are kept."""
        weights = self.weights
        if size == self.config.image_size or not weights.exact_positions:
            return weights.positions
        positions = self.positions.get(size)
        if positions is None:
            positions = positions_for(self.config, weights.exact_positions, size, self.dtype, self.device)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # other streams will read them
            self.positions[size] = positions
            while len(self.positions) > POSITIONS:
                self.positions.popitem(last=False)
        return positions

    def forward(self, images: Tensor, positions: Positions) -> Output:
        """The forward on prepared images, with the positions for their size."""
        with self._pool:
            return vit.forward(self.config, self.weights, positions, images, self.plan)

    def observe(self, images: Tensor, positions: Positions, layers: Sequence[int], maps: Sequence[int]) -> Output:
        """The forward with the outputs of some blocks, and the attention of some, kept.

        Raises:
            ValueError: if attention maps are asked for where a fused block computes attention, or blocks have code of
                their own.
        """
        own = [i for i, block in enumerate(self.weights.blocks) if isinstance(block, nn.Module)]
        if maps and own:
            raise ValueError(f"attention maps: blocks {own} have code of their own, and run as the modules they are")
        plan, seen = self.plan, observe.Attention(self.plan.attention, maps)
        if maps:
            if self.config.differential or self.config.window:
                raise ValueError("attention maps: this model has no one map of all tokens in each block")
            if plan.attention_block is not None:
                raise ValueError("attention maps: this plan computes attention inside a fused block")
            plan = replace(plan, attention=seen, attention_quantize=None)
        with self._pool:
            output = vit.forward(self.config, self.weights, positions, images, plan, layers)
        return replace(output, attention_maps=seen.maps()) if maps else output

    def features(self, layer: Tensor, size: tuple[int, int], *, norm: bool, reshape: bool) -> Tensor:
        """A block's output [B, N, C] after the final norm, if asked for; or its patches as [B, C, rows, columns]."""
        if norm:
            layer = vit.final_norm(self.config, self.weights, layer, self.plan)
        if not reshape:
            return layer
        patches = layer[:, self.config.prefix_tokens :].transpose(1, 2)
        return patches.unflatten(2, self.config.grid(size)).contiguous()

    def forward_packed(self, images: Sequence[Tensor]) -> tuple[list[Output], list[list[int]]]:
        """The forward on prepared images [1, ...] of different sizes, packed by tokens.

        Returns:
            An output for each size, and which of the images are in it.
        """
        members: dict[tuple[tuple[int, int], torch.dtype], list[int]] = {}
        for i, image in enumerate(images):
            members.setdefault((self.size(image), image.dtype), []).append(i)
        groups = [
            packed.Group(torch.cat([images[i] for i in group]), self.position(size))
            for (size, _), group in members.items()
        ]
        shapes = tuple((len(group), self.config.tokens(size)) for (size, _), group in members.items())
        ends = self.ends.get(shapes)
        if ends is None:
            ends = self.ends[shapes] = packed.lengths(shapes, self.device)
            while len(self.ends) > POSITIONS:
                self.ends.popitem(last=False)
        with self._pool:
            return packed.forward(self.config, self.weights, groups, self.plan, ends), list(members.values())

    def outputs(self, batch: int, size: tuple[int, int], *, tokens: bool = True, pinned: bool = False) -> Output:
        """Uninitialised outputs of images of a size, on the device or in pinned host memory."""
        config = self.config

        def empty(*shape: int) -> Tensor:
            device = "cpu" if pinned else self.device
            return torch.empty(batch, *shape, dtype=self.dtype, device=device, pin_memory=pinned)

        return Output(
            tokens=empty(config.tokens(size), config.width) if tokens else None,
            embedding=empty(config.embedding_dim),
            logits=empty(config.num_classes) if config.num_classes else None,
            neck=empty(config.neck_tokens(size), config.pooled_dim) if config.neck and tokens else None,
        )

    def idle_bytes(self) -> int:
        """Bytes that the last forward on a CPU has left to the next."""
        return getattr(self._pool, "idle_bytes", 0)

    def nbytes(self) -> int:
        """Bytes of the weights and of the position embeddings that are kept."""
        tensors = {id(t): t.numel() * t.element_size() for t in _tensors((self.weights, *self.positions.values()))}
        return sum(tensors.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in a tree of dataclasses, tuples, mappings and modules."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, nn.Module):
        yield from (*tree.parameters(), *tree.buffers())
    elif isinstance(tree, Mapping):
        yield from _tensors(tuple(tree.values()))
    elif is_dataclass(tree):
        yield from _tensors(tuple(getattr(tree, field.name) for field in fields(tree)))
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from _tensors(branch)
