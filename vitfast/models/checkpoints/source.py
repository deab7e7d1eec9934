"""`Checkpoint`, and `Source`: a state dict on its way to canonical weights, with every key accounted for.

A translation names each tensor it wants. What it names must be there; what it does not name, and
is not on the family's short list of ignorable keys, is an error. So a checkpoint either is
understood entirely or is refused with the whole list of what does not fit. Shapes come first: no value is
read, and nothing is put together, of a checkpoint whose shapes or dtypes do not fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vitfast.images.preprocess import Preprocess
from vitfast.models import schema
from vitfast.models.config import ViTConfig
from vitfast.models.text import TextTower

STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that weights may be stored in."""

Settings = TypeVar("Settings")


class CheckpointError(ValueError):
    """A model that cannot be loaded: the message says which one and every reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A translated model.

    Attributes:
        config: the architecture.
        weights: canonical name (see `vitfast.models.config`) -> tensor, in the dtype they are stored in.
        preprocess: how its images are prepared; None where the source does not say.
        labels: the classes' names, one per row of the head; None where the source does not say.
        stem: what makes the patches' tokens [B, L, C] of images, where that is no patch convolution.
        own_blocks: blocks of a live module with hooks or patched forwards inside, by number: copies, to be run as they
            are.
        neck: what makes other tokens [B, ..., E] of the patches' [B, rows, columns, C], where a model has such a part.
        text: the text tower beside it, where the source has one that can be run (CLIP, SigLIP).
        problem_type: what the logits are for, in transformers' words: "single_label_classification",
            "multi_label_classification" or "regression"; None where the source does not say.
    """

    config: ViTConfig
    weights: Mapping[str, Tensor]
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    stem: nn.Module | None = None
    own_blocks: Mapping[int, nn.Module] = field(default_factory=dict)
    neck: nn.Module | None = None
    text: TextTower | None = None


def require(condition: bool, feature: str, where: str) -> None:
    """Refuse a model that does something the forward cannot.

    Raises:
        CheckpointError: if not `condition`; it names the feature and the module that has it.
    """
    if not condition:
        raise CheckpointError(f"{where}: {feature} is not supported")


def read_settings(kind: type[Settings], values: Mapping[str, Any], where: str, prefix: str = "") -> Settings:
    """Settings of a file as a dataclass; what is absent or null takes the field's default.

    Raises:
        CheckpointError: with each field that is out of its domain (see `vitfast.models.schema`), and its value.
    """
    given = {name: value for name, value in values.items() if isinstance(name, str) and value is not None}
    if problems := schema.problems(kind, given, prefix):
        raise CheckpointError("\n  ".join([f"{where} cannot be used:", *problems]))
    known = getattr(kind, "__dataclass_fields__", {})
    return kind(**{name: value for name, value in given.items() if name in known})


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


class _Part(NamedTuple):
    """A canonical weight that is still in its source's tensors."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Puts it together, which reads the values."""


class Source:
    """Collects canonical weights from a state dict.

    Dense and norm parts are named by everything that stands before "weight" and "bias", separator
    included: "attn.qkv." or "self_attention.in_proj_".

    Args:
        state: the source's own names and tensors. what: whose they are, for messages.
    """

    def __init__(self, state: Mapping[str, Tensor], what: str) -> None:
        self.state = state
        self.what = what
        self._parts: dict[str, _Part] = {}
        self._origins: dict[str, tuple[str, ...]] = {}
        self._missing: dict[str, str] = {}  # source name -> canonical name
        self._misshapen: list[str] = []
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def copy(self, canonical: str, *names: str) -> None:
        """Take one tensor, or several stacked along their first axis (q, k and v; gate and up)."""
        parts = [self._fetch(canonical, name) for name in names]
        present = [part for part in parts if part is not None]
        if len(present) < len(names):
            return
        if len(present) == 1:
            self._parts[canonical] = _Part(tuple(present[0].shape), lambda: present[0])
        elif len({(part.shape[1:], part.dtype) for part in present}) == 1 and present[0].ndim:
            rows = sum(part.shape[0] for part in present)
            self._parts[canonical] = _Part((rows, *present[0].shape[1:]), lambda: torch.cat(present))
        else:
            listed = ", ".join(f"{n} {_shape(p)} {p.dtype}" for n, p in zip(names, present, strict=True))
            self._misshapen.append(f"{listed}: parts of {canonical} that do not fit together")
        self._origins[canonical] = names

    def missing(self, name: str) -> None:
        """Note that a tensor which is no canonical weight is not there."""
        self._missing[name] = name

    def norm(self, canonical: str, name: str) -> None:
        """Take weight and bias of a LayerNorm."""
        self.copy(f"{canonical}.weight", f"{name}weight")
        self.copy(f"{canonical}.bias", f"{name}bias")

    def dense(self, canonical: str, *names: str, bias: bool = True) -> None:
        """Take weight and, if `bias`, bias of a dense layer that the source may keep in several parts."""
        self.copy(f"{canonical}.weight", *(f"{name}weight" for name in names))
        if bias:
            self.copy(f"{canonical}.bias", *(f"{name}bias" for name in names))

    def derive(
        self, canonical: str, shape: tuple[int, ...], make: Callable[..., Tensor], names: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Compute a weight of this shape from tensors of the source, or from none.

        Args:
            make: gets the tensors in order, in fp32 at least, once all shapes are known to be right.
            names: the source's own -> the shape that it must have.
        """
        found = [self._fetch(canonical, name) for name in names]
        for (name, want), part in zip(names.items(), found, strict=True):
            if part is not None and tuple(part.shape) != tuple(want):
                self._misshapen.append(f"{name} {_shape(part)}, expected {list(want)} (for {canonical})")
        tensors = [part for part in found if part is not None]
        self._origins[canonical] = tuple(names)
        if len(tensors) == len(found):
            self._parts[canonical] = _Part(tuple(shape), lambda: make(*map(_widened, tensors)))

    def join_biases(self, canonical: str, names: Sequence[str | None], width: int) -> None:
        """Take one bias of several [width] each; None stands for zeros."""

        def join(*given: Tensor) -> Tensor:
            parts = iter(given)
            return torch.cat([next(parts) if name else given[0].new_zeros(width) for name in names])

        self.derive(canonical, (len(names) * width,), join, {name: (width,) for name in names if name})

    def transposed(self, canonical: str, name: str) -> None:
        """Take a matrix that the source keeps the other way round, [in, out]."""
        tensor = self._fetch(canonical, name)
        if tensor is not None:
            self._parts[canonical] = _Part(tuple(reversed(tensor.shape)), lambda: tensor.mT.contiguous())
            self._origins[canonical] = (name,)

    def swap_halves(self, canonical: str) -> None:
        """Exchange the two halves of a dense layer's rows (a gate that the source keeps last)."""
        for name in (f"{canonical}.weight", f"{canonical}.bias"):
            if name in self._parts:
                self._parts[name] = _Part(self._parts[name].shape, _rolled(self._parts[name].make))

    def tokens(self, config: ViTConfig, prefix: Sequence[str], position: str | None, covered: int) -> None:
        """Take prefix tokens and position embedding; the first `covered` positions belong to prefix tokens.

        Args:
            prefix: names of [1, n, C] or [C] tensors, in token order. position: name of [1, covered + L, C]
                or [covered + L, C].
        """
        rows = [self._rows("prefix", name, config.width) for name in prefix]
        if prefix:
            self._origins["prefix"] = (*prefix, *([position] if position and covered else []))
        head = None
        if position is not None:
            table = self._rows("position", position, config.width)
            if table is not None:
                head, patches = table[:covered], table[covered:]
                self._parts["position"] = _Part(tuple(patches.shape), lambda: patches)
                self._origins["position"] = (position,)
        present = [part for part in rows if part is not None]
        if not prefix or len(present) < len(rows) or (covered and head is None):
            return

        def tokens() -> Tensor:
            made = torch.cat(present)
            if not covered or head is None or len(head) > len(made):
                return made
            # In fp32 at least: a sum rounded to the stored dtype would be rounded again to that of the model.
            made = made.to(torch.promote_types(made.dtype, torch.float32))
            return torch.cat([made[: len(head)] + head, made[len(head) :]])

        self._parts["prefix"] = _Part((sum(len(part) for part in present), config.width), tokens)

    def finish(self, config: ViTConfig, ignorable: Sequence[str] = ()) -> dict[str, Tensor]:
        """Compare with `config.weight_shapes()` and return the canonical weights.

        Args:
            ignorable: regular expressions; keys of the source that match one entirely may be left over.

        Raises:
            CheckpointError: with every missing, unexpected, wrongly shaped or non-finite tensor, by its
                source name.
        """
        shapes = config.weight_shapes()
        problems = []
        for name, canonical in self._missing.items():
            shape = f" {list(shapes[canonical][0])}" if canonical in shapes else ""
            problems.append(f"missing: {name} (for {canonical}{shape})")
        for canonical, (size, required) in shapes.items():
            if required and canonical not in self._origins and canonical not in self._missing.values():
                problems.append(f"missing: nothing gives {canonical} {list(size)}")
        problems += [f"wrong shape: {line}" for line in self._misshapen]
        for canonical, part in self._parts.items():
            parts = ", ".join(f"{name} {_shape(self.state[name])}" for name in self._origins[canonical])
            if canonical not in shapes:
                problems.append(f"unexpected: {parts} (the architecture has no {canonical})")
            elif part.shape != shapes[canonical][0]:
                wanted = list(shapes[canonical][0])
                problems.append(f"wrong shape: {parts} gives {canonical} {list(part.shape)}, expected {wanted}")
        ignored = re.compile("|".join(f"(?:{pattern})" for pattern in ignorable)) if ignorable else None
        for name in self.state.keys() - self._used:
            if ignored is None or not ignored.fullmatch(name):
                problems.append(f"unexpected: {name} {_shape(self.state[name])}")
        for unusable in (_unreadable, _not_finite):  # the values last, and only of weights that fit
            if not problems:
                reasons = {name: unusable(self.state[name]) for name in sorted(self._used)}
                problems += [f"unusable: {name} {reason}" for name, reason in reasons.items() if reason]
        if problems:
            listed = "\n  ".join(sorted(problems))
            raise CheckpointError(f"{self.what} does not fit its architecture, {len(problems)} problem(s):\n  {listed}")
        return {canonical: self._parts[canonical].make() for canonical in shapes if canonical in self._parts}

    def _fetch(self, canonical: str, name: str) -> Tensor | None:
        tensor = self.state.get(name)
        if tensor is None:
            self._missing[name] = canonical
            return None
        self._used.add(name)
        return tensor.detach()

    def _rows(self, canonical: str, name: str, width: int) -> Tensor | None:
        tensor = self._fetch(canonical, name)
        if tensor is None:
            return None
        if tensor.ndim == 3 and tensor.shape[0] == 1:
            tensor = tensor[0]
        elif tensor.ndim == 1:
            tensor = tensor[None]
        if tensor.ndim != 2 or tensor.shape[1] != width:
            self._misshapen.append(f"{name} {_shape(self.state[name])}, expected rows of width {width}")
            self._origins[canonical] = (name,)
            return None
        return tensor


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rolled(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def rolled() -> Tensor:
        rows = make()
        return rows.roll(len(rows) // 2, dims=0)

    return rolled


def _unreadable(tensor: Tensor) -> str:
    """Why a tensor cannot be a weight, judged without its values."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"is a {type(tensor).__name__}, a plain tensor is needed"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}, a dense one is needed"
    if tensor.device.type == "meta":
        return "is on the meta device, without data"
    if tensor.dtype not in STORED:
        return f"has dtype {tensor.dtype}, one of {', '.join(map(str, STORED))} is needed"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"repeats its memory: {_shape(tensor)} with strides {list(tensor.stride())} (clone it)"
    return ""


def _not_finite(tensor: Tensor) -> str:
    tensor = tensor.detach()
    # The edges are NaN if any value is: one pass that writes nothing, where the count below takes three.
    if tensor.numel() and tensor.itemsize >= 2 and all(bool(edge.isfinite()) for edge in tensor.aminmax()):
        return ""
    finite = torch.isfinite(tensor).sum().item()
    return "" if finite == tensor.numel() else f"holds {tensor.numel() - finite} NaN or infinite value(s)"
