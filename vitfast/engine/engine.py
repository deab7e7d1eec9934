"""Engine: a runner with CUDA graphs and streams around it, ready to run on batches of images."""

from __future__ import annotations

import functools
import html
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.engine import planner, streaming
from vitfast.engine.calibration import Calibration
from vitfast.engine.cuda_graphs import Graphs
from vitfast.engine.fingerprint import fingerprint
from vitfast.engine.isolation import isolated
from vitfast.engine.runner import Runner
from vitfast.engine.text import TEMPLATES, TextRunner, ZeroShot
from vitfast.images import inputs
from vitfast.models.checkpoints import Checkpoint, saved
from vitfast.models.output import Output
from vitfast.models.plan import Plan

Images: TypeAlias = "Tensor | Sequence[Tensor] | inputs.Picture | Sequence[inputs.Picture]"
"""What an engine takes (see `Engine.__call__`)."""

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes for which a CUDA graph is captured; a batch runs in the smallest that holds it."""


class Engine:
    """A Vision Transformer ready to run. Make one with `vitfast.load`.

    Attributes:
        config: the architecture. preprocess: the model's own preprocessing, or None if unknown.
        labels: class names, or None. problem_type: what the logits are for (see `vitfast.Checkpoint`).
        device, dtype: where and in what the model computes.
        precision: the dtype's name, or "fp8" or "int8" where products are quantised; dtype is then bf16.
        plan: which backend runs each part (see `vitfast.engine.planner`). runner: what runs the forward.
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
        skip_quantize: tuple[str, ...] = (),
        deterministic: bool = False,
    ) -> None:
        """Arguments and errors: as for `vitfast.load`.

        Args:
            graphs: on a GPU, run batches through CUDA graphs. buckets: the batch sizes to capture them for.
        """
        options: dict[str, Any] = {
            "backend": backend, "skip_quantize": skip_quantize, "deterministic": deterministic,
        }  # fmt: skip
        self._made_of = (checkpoint, {**options, "graphs": graphs, "buckets": buckets})
        self.runner = Runner(checkpoint, device=device, dtype=dtype, **options)
        self.config, self.preprocess, self.labels = checkpoint.config, checkpoint.preprocess, checkpoint.labels
        self.problem_type = checkpoint.problem_type
        self.device, self.dtype, self.precision = self.runner.device, self.runner.dtype, self.runner.precision
        self.calibration: Calibration | None = None
        graphs = graphs and not checkpoint.own_blocks  # whose Python a graph would not run again
        self._graphs = Graphs(self.runner, buckets) if graphs and self.device.type == "cuda" else None
        self._lanes: weakref.WeakSet[streaming.GpuLane] = weakref.WeakSet()
        self._lanes_lock = threading.Lock()

    def __repr__(self) -> str:
        weights = f"{self.runner.nbytes() / 2**20:.1f} MiB of weights"
        return f"Engine({self.config.name or 'ViT'}, {self.device}, {self.precision}, {self.backend}, {weights})"

    def _repr_html_(self) -> str:
        return f"<b>{html.escape(repr(self))}</b><br>{self.plan._repr_html_()}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as what it was made of, the checkpoint's weights: the copy plans and packs anew."""
        checkpoint, options = self._made_of
        made = {"device": str(self.device), "dtype": self.precision, **options}
        return _remade, (checkpoint, made), {"calibration": self.calibration}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of architecture and weights (see `vitfast.engine.fingerprint`); the first use is a pass over them."""
        checkpoint, _ = self._made_of
        return fingerprint(checkpoint)

    def text(self, texts: Sequence[str] | Tensor, *, normalize: bool = False) -> Tensor:
        """Embed texts beside images, by the text tower of a CLIP or SigLIP.

        Args:
            texts: a list of texts, for the tokenizer in the model's folder (read by transformers); or token numbers,
                int64 [T, L].
            normalize: scale embeddings to unit length.

        Returns:
            [T, E] in the engine's dtype, on its device.

        Raises:
            ValueError: if the model has no text tower or no tokenizer, or the texts do not fit.
        """
        if isinstance(texts, Tensor):
            made = self._text(texts)
        elif isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
            made = self._text(self._text.ids(texts) if texts else torch.empty(0, 1, dtype=torch.int64))
        else:
            raise ValueError(f"texts must be a list of texts or token numbers, got {type(texts).__name__}")
        return F.normalize(made.float(), dim=-1).to(made.dtype) if normalize else made

    def zero_shot(
        self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES, embeddings: Tensor | None = None
    ) -> ZeroShot:
        """A classifier of labels, made of their texts: `engine.zero_shot(["a cat", "a dog"])(output.embedding)`.

        Args:
            labels: what images may show. templates: texts that a label is put into at `{}`; embeddings of several
                are averaged.
            embeddings: of those texts, where they are there already: [labels, templates, E].

        Raises:
            ValueError: as `text` does; or if there are no labels, a template has no place for one, or `embeddings` have
                another shape.
        """
        return self._text.zero_shot(labels, templates, embeddings)

    @functools.cached_property
    def _text(self) -> TextRunner:
        checkpoint, options = self._made_of
        if checkpoint.text is None:
            raise ValueError(
                f"{self.config.name or 'this model'} has no text tower: one comes with the folder or hub id of a whole "
                "CLIP or SigLIP of transformers or open_clip"
            )
        return TextRunner(
            checkpoint.text,
            device=self.device,
            dtype=self.dtype,
            backend=options["backend"],
            deterministic=options["deterministic"],
        )

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the model into a folder from which `vitfast.load(directory)` makes it again, whatever it came from.

        Architecture, preprocessing, labels and the plan are in vitfast_config.json; the weights are in
        model.safetensors, in the dtype they came in. The plan serves where device, dtype and versions are the same;
        elsewhere it is made anew. A text tower is saved, too, with its tokenizer's files.

        Raises:
            CheckpointError: if the package safetensors is absent. OSError: if the folder cannot be written.
        """
        checkpoint, options = self._made_of
        planned = options["backend"] == "auto" and not options["deterministic"]
        plan = planner.record(self.plan, self.config, device=self.device, dtype=self.dtype) if planned else None
        saved.write(checkpoint, Path(directory), plan)

    @property
    def plan(self) -> Plan:
        """Which backend runs each part."""
        return self.runner.plan

    @property
    def backend(self) -> str:
        """The backends at work, e.g. "triton" or "torch+triton"."""
        return "+".join(sorted(set(self.plan.backends.values())))

    @isolated
    def __call__(
        self,
        images: Images,
        *,
        preprocessed: bool = False,
        normalize: bool = False,
        layers: Sequence[int] = (),
        norm: bool = True,
        reshape: bool = False,
        attention_maps: Sequence[int] = (),
    ) -> Output:
        """Run the model.

        Args:
            images: pictures: a Pillow image, a path, an http(s) URL or a uint8 array [H, W, 3], or a list of such, of
                any sizes, prepared as the model's own processor does it. Files are turned upright by EXIF. Or a
                tensor: uint8 [B, H, W, 3], any size: preprocessed as the model's own processor does it
                (resize, crop, normalise); or floating point [B, 3, H, W], already normalised, of the model's size
                or any other size if the model allows it: multiples of the patch size, and what is no multiple is
                cropped or padded where the model's family does so. Moved to the engine's device if elsewhere. Or a list
                of tensors, each one image of its own size, float [3, H, W] or, with `preprocessed`, uint8 [H, W, 3]:
                they run in one pass, packed by tokens, and none is padded (see `vitfast.models.packed`).
            preprocessed: uint8 images have been resized and cropped already, and are only normalised.
            normalize: scale embeddings to unit length.
            layers: numbers of blocks, from 0, or from -1 backwards, whose outputs are wanted, too.
            norm: give layers after the model's final norm. reshape: give their patches only, as [B, C, rows, columns].
            attention_maps: numbers of blocks whose attention is wanted: computed by the reference, 4 B H N² bytes each
                and about four times that in the making. These and layers run without CUDA graphs.

        Returns:
            Output with tokens, embedding and logits in the engine's dtype, on its device. An empty
            batch gives empty outputs. They are ordinary tensors without gradients, whatever autograd, inference or
            autocast mode the caller is in.

        Raises:
            ValueError: for a wrong number of axes, channel count, dtype or size, or a block that there is not.
            ImageError: for a file or URL that cannot be read as a picture.
        """
        wanted, maps = self._blocks(layers, "layers"), self._blocks(attention_maps, "attention_maps")
        if _are_tensors(images):
            if wanted or maps:
                raise ValueError("layers and attention_maps are of images of one size: pass them as one tensor")
            return self._packed(images, preprocessed, normalize)
        if not isinstance(images, Tensor):
            images, preprocessed = self._read(images, preprocessed), True
        runner = self.runner
        runner.check(images.shape, images.dtype)
        images = runner.prepare(images.to(self.device, non_blocking=True), preprocessed)
        size = runner.size(images)
        if wanted or maps:
            output = runner.observe(images, runner.position(size), wanted, maps)
            kept = tuple(runner.features(x, size, norm=norm, reshape=reshape) for x in output.layers or ())
            output = replace(output, layers=kept or None)
        elif self._graphs is not None or images.shape[0] == 0:
            output = runner.outputs(images.shape[0], size)
            if self._graphs is not None and images.shape[0]:
                self._graphs(images, output)
        else:
            output = runner.forward(images, runner.position(size))
        return _unit(output) if normalize else output

    def _packed(self, images: Sequence[Tensor], preprocessed: bool, normalize: bool) -> Output:
        """Images of different sizes in one pass."""
        runner, prepared = self.runner, []
        for i, image in enumerate(images):
            try:
                runner.check((1, *image.shape), image.dtype)
                moved = image[None].to(self.device, non_blocking=True)
                prepared.append(runner.prepare(moved, preprocessed))
                runner.size(prepared[-1])
            except ValueError as error:
                raise ValueError(f"image {i}: {error}") from error
        outputs, members = runner.forward_packed(prepared)
        order = [i for group in members for i in group]
        places = sorted(range(len(order)), key=order.__getitem__)

        def rows(parts: list[Tensor]) -> Tensor:
            # Taken by slices: an index would have to be copied to the device.
            each = torch.cat(parts).split(1)
            return torch.cat([each[place] for place in places])

        tokens = [one for output in outputs if output.tokens is not None for one in output.tokens]
        logits = [output.logits for output in outputs if output.logits is not None]
        output = Output(
            tokens=None,
            embedding=rows([output.embedding for output in outputs]),
            logits=rows(logits) if logits else None,
            image_tokens=tuple(tokens[place] for place in places),
        )
        return _unit(output) if normalize else output

    def _blocks(self, numbers: Sequence[int], name: str) -> list[int]:
        """Numbers of blocks from 0."""
        depth = self.config.depth
        if not isinstance(numbers, (list, tuple, range)):
            raise ValueError(f"{name} must be a list of block numbers, got {numbers!r}")
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not -depth <= number < depth:
                raise ValueError(f"{name} must be block numbers from {-depth} to {depth - 1}, got {number!r}")
        return [number % depth for number in numbers]

    def _read(self, images: Any, preprocessed: bool) -> Tensor:
        """Pictures as the model's own processor prepares them."""
        if not inputs.is_picture(images) and not isinstance(images, (list, tuple)):
            raise ValueError(
                "images must be a torch.Tensor, a Pillow image, a path, a URL, a uint8 array [H, W, 3] or a list of "
                f"such, got {type(images).__name__}"
            )
        if preprocessed:
            raise ValueError(f"preprocessed=True goes with tensors, got {type(images).__name__}")
        if self.preprocess is None or self.config.in_channels != 3:
            raise ValueError(
                f"the checkpoint does not say how pictures are prepared for its {self.config.in_channels} channels: "
                "load it with preprocess=, or pass normalised float tensors [B, C, H, W]"
            )
        return inputs.read_pictures([images] if inputs.is_picture(images) else images, self.preprocess)

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
        if self.device.type == "cpu":
            call = functools.partial(self, preprocessed=preprocessed)
            return streaming.run([streaming.CpuLane(call, tokens=tokens)], batches)
        upload, download = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        lanes = [
            streaming.GpuLane(self.runner, self.run_into, upload, download, preprocessed=preprocessed, tokens=tokens)
            for _ in range(streaming.LANES)
        ]
        with self._lanes_lock:
            self._lanes.update(lanes)
        return streaming.run(lanes, batches)

    def memory(self) -> dict[str, int]:
        """Bytes that the engine holds now.

        Returns:
            weights: on its device, position embeddings resized for other image sizes included;
            graphs: of the CUDA graphs' inputs, outputs and what is between (see `vitfast.engine.cuda_graphs`);
            idle: on a CPU, what a forward has left to the next; it goes with the engine;
            staging: on the device, of the runs of `stream` that there are; pinned: theirs in pinned host memory.
        """
        with self._lanes_lock:
            lanes = [lane.memory() for lane in self._lanes]
        return {
            "weights": self.runner.nbytes(),
            "graphs": self._graphs.memory() if self._graphs is not None else 0,
            "idle": self.runner.idle_bytes(),
            "staging": sum(device for device, _ in lanes),
            "pinned": sum(pinned for _, pinned in lanes),
        }

    def run(self, images: Tensor) -> Output:
        """The forward itself on checked images of the model's size, without graphs or chunks."""
        return self.runner.forward(images, self.runner.position(self.runner.size(images)))

    def run_into(self, images: Tensor, output: Output) -> None:
        """Run prepared images (see `Runner.prepare`), and write the outputs where the caller wants them."""
        if self._graphs is not None:
            self._graphs(images, output)
        elif images.shape[0]:
            output.copy_(self.run(images))


def _are_tensors(images: Any) -> TypeGuard[Sequence[Tensor]]:
    return isinstance(images, (list, tuple)) and len(images) > 0 and all(isinstance(i, Tensor) for i in images)


def _unit(output: Output) -> Output:
    """With embeddings of unit length."""
    embedding = output.embedding
    return replace(output, embedding=F.normalize(embedding.float(), dim=-1).to(embedding.dtype))


def _remade(checkpoint: Checkpoint, options: dict[str, Any]) -> Engine:
    return Engine(checkpoint, **options)
