"""Are the outputs the same? The audit before one model, engine or function takes the place of another.

    report = vitfast.verify(model, fast_model, images)
    report.raise_if_different()

Outputs are flattened to named tensors and compared in float64 on the CPU. Two rules, whose numbers
all stand in `vitfast.testing`:

* Without an oracle, a floating output passes if its largest error is at most MODEL_TOLERANCES[dtype].error
  times the largest value, and the RMS of its error at most MODEL_TOLERANCES[dtype].rms times the RMS of its values.
* With an oracle (the same function at a higher precision), `after` passes if it is at most twice as
  far from the oracle as `before` is, plus a floor: the rule of `testing.assert_close`.

Either way NaN and infinity must stand in the same places, and integers and bools must be equal. Of an engine and
a model, what both have is compared (`vitfast.diagnostics.pairing`); a note says what is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitfast.diagnostics import pairing
from vitfast.diagnostics.differences import Tally, flatten
from vitfast.diagnostics.report import Blame, Difference, DifferenceError, Report, render

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Blame", "Difference", "DifferenceError", "Report", "render", "verify", "verify_model", "verify_swap"]

RANDOM_IMAGES, IMAGES_AT_ONCE = 4, 8
"""`verify_model`: how many random images it makes, and how many image files it runs in one batch."""


def verify(
    before: Callable[..., Any],
    after: Callable[..., Any],
    inputs: Any,
    *,
    oracle: Callable[..., Any] | None = None,
    tolerance: float | None = None,
    layers: bool = True,
) -> Report:
    """Compare what two callables give for the same inputs.

    Gradients are off; random seeds and training flags are left alone; each call gets its own copy of the
    inputs, and outputs are copied to the CPU at once. Cost: one forward of each per batch, and with
    `layers` one more of each on one batch, which holds that batch's layer outputs of `before` on the CPU
    in their own dtype (and two more, of one layer's inputs, if a layer is to blame). Hooks are there only
    during the extra forwards, so that the outputs judged are those of the unhooked models.

    Args:
        before, after: nn.Modules, engines or functions. Modules must be in eval mode.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments; or a list of such batches.
        oracle: a more exact version of the function; it selects the second rule of this module for fp32,
            fp16 and bf16 outputs.
        tolerance: in place of both numbers in MODEL_TOLERANCES, for floating outputs; 0 asks for equality.
        layers: where both are nn.Modules, also compare the outputs of submodules with the same name.

    Returns:
        A Report. Differences in structure, shape or dtype and outputs that are no tensors are findings in it.

    Raises:
        ValueError: if the inputs are empty or of another kind, a module is in training mode, before and
            after are one object, or the tolerance is negative or given beside an oracle.
    """
    if before is after:
        raise ValueError("before and after are the same object, which proves nothing; see verify_swap for swaps")
    return _audit(_Side("before", before), _Side("after", after), inputs, oracle, tolerance, layers)


def verify_swap(
    model: nn.Module,
    swap: Callable[[nn.Module], Any],
    inputs: Any,
    *,
    tolerance: float | None = None,
    layers: bool = True,
) -> Report:
    """Compare a model with itself after `swap(model)`, which changes it in place.

    `swap` returns a handle with `.restore()`, as `vitfast.replace_attention` does. The swap is made for
    each forward of the swapped model and undone right after it, also if that forward fails.

    Raises:
        ValueError: as `verify`; and if the handle has no restore, or its `replaced` is there and empty.
    """

    @contextlib.contextmanager
    def swapped() -> Iterator[None]:
        handle = swap(model)
        if not callable(getattr(handle, "restore", None)):
            raise ValueError(f"swap gave {type(handle).__name__}, which has no restore(): the model stays changed")
        try:
            if not getattr(handle, "replaced", True):
                left = dict(getattr(handle, "left", {}))
                raise ValueError(f"the swap replaced nothing, so there is nothing to verify; left: {left or 'nothing'}")
            yield
        finally:
            handle.restore()

    return _audit(_Side("before", model), _Side("after", model, swapped), inputs, None, tolerance, layers)


def verify_model(
    source: str | Path | nn.Module,
    *,
    against: str | Path | nn.Module = "torch",
    images: Sequence[str | Path] = (),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    allow_pickle: bool = False,
    weights_key: str | None = None,
) -> Report:
    """Compare a model as `vitfast.load` gives it with plain torch ops in fp32, on the same device.

    In fp16, bf16, fp8 and int8 torch's fp32 result is the oracle and torch's result in the same dtype stands
    beside it; the cosine is that to fp32, which is what quantisation costs.
    TF32, which torch allows in convolutions by default, is off meanwhile: its error would pass for the engine's.

    Args:
        source, device, dtype, backend, allow_pickle, weights_key: as for `vitfast.load`.
        against: "torch" for the same model, or another source that should give the same outputs.
        images: files, folders or patterns; each model preprocesses them its own way. Without any, four
            images of seeded normal noise of the model's size.

    Raises:
        ValueError: if a model or image cannot be used, or the forced backend cannot run it; with every reason.
    """
    from vitfast.engine.engine import Engine
    from vitfast.models.checkpoints import load
    from vitfast.ops import BackendError

    checkpoint = load(source, allow_pickle=allow_pickle, weights_key=weights_key)
    other = checkpoint if against == "torch" else load(against, allow_pickle=allow_pickle)
    try:
        engine = Engine(checkpoint, device=device, dtype=dtype, backend=backend)
    except BackendError as error:
        raise ValueError(str(error)) from error
    exact = Engine(other, device=engine.device, dtype=torch.float32, backend="torch")
    low = engine.dtype != torch.float32
    same = engine.precision if engine.plan.quantized else engine.dtype
    plain = Engine(other, device=engine.device, dtype=same, backend="torch") if low else exact
    sides: list[Any] = [plain, engine, exact if low else None]
    if images:
        inputs, shown = _image_batches(images)
        sides = [side and _on_pixels(side) for side in sides]
    else:
        shape = (RANDOM_IMAGES, engine.config.in_channels, *engine.config.image_size)
        inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(0))]
        shown = f"{RANDOM_IMAGES} images of normal noise"
    with _no_tf32():
        report = verify(sides[0], sides[1], inputs, oracle=sides[2], layers=False)
    about = {
        "model": source if isinstance(source, str) else str(engine.config.name or type(source).__name__),
        "against": "torch" if against == "torch" else str(against),
        "device": str(engine.device),
        "dtype": engine.precision,
        "backend": engine.backend,
        "rule": "at most twice torch's own error against fp32" if low else "the fp32 tolerance of whole models",
        "inputs": shown,
    }
    return replace(report, about=about)


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    kinds: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    kept = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, kept, strict=True):
            kind.fp32_precision = precision


def _image_batches(sources: Sequence[str | Path]) -> tuple[list[Any], str]:
    from vitfast.images.decode import open_image
    from vitfast.images.files import collect

    pixels = [open_image(path) for path in collect(sources)]
    batches: list[Any] = [(pixels[i : i + IMAGES_AT_ONCE],) for i in range(0, len(pixels), IMAGES_AT_ONCE)]
    return batches, f"{len(pixels)} image file{'s' * (len(pixels) != 1)}"


def _on_pixels(engine: Any) -> Callable[[list[Any]], Any]:
    """The engine as a function of a list of uint8 [H, W, 3] arrays of any size."""
    from vitfast.images.preprocess import resize_and_crop

    preprocess = engine.preprocess
    if preprocess is None:
        raise ValueError("the checkpoint does not say how its images are preprocessed: leave images out")

    def run(pixels: list[Any]) -> Any:
        ready = [torch.from_numpy(resize_and_crop(image, preprocess)) for image in pixels]
        return engine(torch.stack(ready), preprocessed=True)

    return run


class _Side:
    """One of the two callables, and how to run it.

    `context` is entered around each run; verify_swap makes its swap there.
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        if not callable(call):
            raise ValueError(f"{name} must be callable, got {type(call).__name__}")
        self.name, self.call, self.context = name, call, context
        owner = getattr(call, "__self__", None)  # of a bound method such as model.forward_features
        module = call if isinstance(call, nn.Module) else owner
        self.module = module if isinstance(module, nn.Module) else None
        self.is_engine = pairing.is_engine(call)
        self.check_mode()

    def check_mode(self) -> None:
        """Refuse training mode: with dropout a comparison means nothing, and the flags are the caller's."""
        for name, module in self.module.named_modules() if self.module is not None else ():
            if module.training:
                which = f"module {name!r} of {self.name}" if name else self.name
                raise ValueError(f"{which} is in training mode, where dropout would differ: call .eval() first")

    def layer_names(self) -> list[str]:
        """Names of all submodules, the root left out."""
        assert self.module is not None
        with self.context():
            return [name for name, _ in self.module.named_modules() if name]

    def run(
        self,
        batch: Any,
        record: Callable[[str, Any], None] | None = None,
        layers: Sequence[str] = (),
        *,
        of_inputs: bool = False,
    ) -> Any:
        """Call on a copy of the batch; `record` gets the name and output (or inputs) of the named layers."""
        args, kwargs = _arguments(_copy(batch))
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.context())
            self.check_mode()
            for name in layers:
                assert self.module is not None and record is not None  # layers are a module's, and recorded
                module = self.module.get_submodule(name)
                if of_inputs:
                    handle = module.register_forward_pre_hook(
                        lambda _, args, kwargs, name=name: record(name, {"args": args, **kwargs}), with_kwargs=True
                    )
                else:
                    handle = module.register_forward_hook(lambda _, __, output, name=name: record(name, output))
                stack.callback(handle.remove)
            if self.is_engine and set(kwargs) == {"pixel_values"}:  # transformers' word for the images
                args, kwargs = (kwargs["pixel_values"],), {}
            # Not inference mode: what a model caches at its first call could never be trained on after it.
            with torch.no_grad():
                return self.call(*args, **kwargs)


def _audit(
    before: _Side,
    after: _Side,
    inputs: Any,
    oracle: Callable[..., Any] | None,
    tolerance: float | None,
    layers: bool,
) -> Report:
    if tolerance is not None and (oracle is not None or not tolerance >= 0):
        raise ValueError(f"tolerance must be at least 0 and stand without an oracle, got {tolerance}")
    exact = None if oracle is None else _Side("oracle", oracle)
    batches = _batches(inputs)
    tallies: dict[str, Tally] = {}
    differing: list[Any] = []
    notes: list[str] = []
    for batch in batches:
        want, got = flatten(before.run(batch)), flatten(after.run(batch))
        sides = [(before, want), (after, got), *([(exact, flatten(exact.run(batch)))] if exact else [])]
        (want, got, *ideals), note = pairing.common(sides)
        ideal = ideals[0] if ideals else {}
        notes += [note] if note and note not in notes else []
        fine = True
        for name in {**want, **got}:
            tally = tallies.setdefault(name, Tally(name, tolerance, with_oracle=oracle is not None))
            fine &= tally.add(want.get(name), got.get(name), ideal.get(name))
        if not fine:
            differing.append(batch)
    report = Report(tuple(tally.result() for tally in tallies.values()), len(batches), notes=tuple(notes))
    if not layers:
        return report
    if before.module is None or after.module is None:
        side = before.name if before.module is None else after.name
        return replace(report, notes=(*notes, f"no layers were compared: {side} is no nn.Module"))
    return _compare_layers(report, before, after, (differing or batches)[0], tolerance)


def _compare_layers(report: Report, before: _Side, after: _Side, batch: Any, tolerance: float | None) -> Report:
    """The report with layers, blame and notes."""
    there = set(after.layer_names())
    names = [name for name in before.layer_names() if name in there]
    if not names:
        return replace(report, notes=(*report.notes, "no layers were compared: they have no module names in common"))
    compared, uneven = _layer_differences(before, after, batch, names, tolerance)
    notes = [*report.notes, *([f"not the same number of runs on both sides: {', '.join(uneven)}"] if uneven else [])]
    blame = None
    guilty = next(((layer, difference) for layer, difference in compared if not difference.ok), None)
    if guilty is not None:
        layer, difference = guilty
        entering, _ = _layer_differences(before, after, batch, [layer], tolerance, of_inputs=True)
        worst = max((item for _, item in entering), key=lambda item: (not item.ok, item.relative_rms), default=None)
        blame = Blame(layer, difference, worst)
    return replace(report, layers=tuple(item for _, item in compared), blame=blame, notes=tuple(notes))


def _layer_differences(
    before: _Side,
    after: _Side,
    batch: Any,
    names: Sequence[str],
    tolerance: float | None,
    *,
    of_inputs: bool = False,
) -> tuple[list[tuple[str, Difference]], list[str]]:
    """(layer, difference) of each tensor in the order of after's run, and the layers that ran more often on one side.

    A layer that runs several times is compared run by run. Only tensors that both sides have are looked at:
    one attention may return its weights and the other not.
    """
    held: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    compared: list[tuple[str, Difference]] = []
    runs = dict.fromkeys(names, 0)

    def keep(name: str, value: Any) -> None:
        held[name].append(_tensors(value, name))

    def compare(name: str, value: Any) -> None:
        runs[name] += 1
        if not held[name]:
            return
        want, got = held[name].pop(0), _tensors(value, name)
        for leaf in [leaf for leaf in want if leaf in got]:
            call = f" (call {runs[name]})" if runs[name] > 1 else ""
            tally = Tally(leaf + call, tolerance)
            tally.add(want[leaf], got[leaf])
            compared.append((name, tally.result()))

    before.run(batch, keep, names, of_inputs=of_inputs)
    ran = {name: len(kept) for name, kept in held.items()}
    after.run(batch, compare, names, of_inputs=of_inputs)
    return compared, [name for name in names if ran[name] != runs[name]]


def _tensors(value: Any, name: str) -> dict[str, Tensor]:
    return {leaf: item for leaf, item in flatten(value, name).items() if isinstance(item, Tensor)}


def _batches(inputs: Any) -> list[Any]:
    """The batches in inputs, checked."""
    batches = inputs if isinstance(inputs, list) else [inputs]
    if not batches:
        raise ValueError("inputs is an empty list: there is nothing to compare")
    for batch in batches:
        if not isinstance(batch, Tensor | tuple | Mapping):
            raise ValueError(
                "inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, or a list of such "
                f"batches; got {type(batch).__name__}"
            )
        tensors = [item for item in flatten(batch).values() if isinstance(item, Tensor)]
        if (not isinstance(batch, Tensor) and not batch) or (tensors and not any(item.numel() for item in tensors)):
            shapes = [tuple(item.shape) for item in tensors]
            raise ValueError(f"inputs hold an empty batch (shapes {shapes}): there is nothing to compare")
    return batches


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    return (batch, {}) if isinstance(batch, tuple) else ((), dict(batch))


def _copy(value: Any) -> Any:
    """Tensors in tuples, lists and mappings cloned, so that one side cannot change the other's inputs."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copy, value))
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value
