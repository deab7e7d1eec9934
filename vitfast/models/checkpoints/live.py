"""Live modules: wrappers come off, and what makes a module other than its class is refused by name.

A module's class says what it computes only as long as nobody has changed the instance. Hooks, patched methods,
parametrizations, exchanged parts and wrapped layers (LoRA, quantised linear layers) all change the result, and none of
them shows in the class of the whole.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from vitfast.models.checkpoints.source import CheckpointError, require

_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEma": "ema",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}
"""What computes what the module inside it does -> where it has that."""

_REFUSED = {
    "torch.distributed.fsdp": "its weights are sharded; gather a full state dict and load that",
    "torch.jit": "a scripted or traced module; pass the one it was made from",
    "torch.fx": "a traced module; pass the one it was made from",
    "peft": "adapters; merge them and pass the model: model.merge_and_unload()",
}
"""Package of a wrapper's class -> why it is refused."""

_DROPOUTS = ("Dropout", "Dropout1d", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout")
"""Classes of torch.nn that do nothing in evaluation mode."""

_HARMLESS = ("vitfast.", "transformers.utils.output_capturing")
"""Modules whose hooks and patched methods do not change what a model computes: swaps of attention; recorders."""

Anatomy: TypeAlias = Mapping[str, Mapping[str, Sequence[str]]]
"""Class -> child -> classes that it may be of (see `composed`)."""

_DYNAMO = "_compiled_call_impl"


_OWN_CODE: ContextVar[bool] = ContextVar("own code", default=False)


@contextlib.contextmanager
def own_code() -> Iterator[None]:
    """Let hooks and patched forwards of instances pass: the caller sees to it that those modules run themselves."""
    token = _OWN_CODE.set(True)
    try:
        yield
    finally:
        _OWN_CODE.reset(token)


def full_name(kind: type) -> str:
    """Of a class, with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def kind_of(module: nn.Module) -> type:
    """A module's class, or the one it had before vitfast swapped its attention, which changes no result."""
    kind = type(module)
    return getattr(kind, "_vitfast_original", kind)


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and like wrappers.

    Raises:
        CheckpointError: for a wrapper that cannot be taken off, or one that has hooks.
    """
    while True:
        name = full_name(type(module))
        reason = next((why for start, why in _REFUSED.items() if name.startswith(f"{start}.")), None)
        require(reason is None, f"{name} ({reason})", "the model")
        if name not in _WRAPPERS:
            return module
        _unhooked(module, name)
        module = getattr(module, _WRAPPERS[name])


def unchanged(
    module: nn.Module, name: str, skip: Sequence[str] = (), blocks: nn.Module | None = None
) -> dict[int, nn.Module]:
    """Check that each part of a module computes what its class does.

    Args:
        name: of the model, for messages. skip: names of parts that have no say in the result.
        blocks: a container in it whose blocks take the tokens [B, N, C] of the one before, and nothing else: a forward
            hook or a patched forward inside one of them passes, but for those of torch.nn.utils, which make weights.

    Returns:
        Copies of the blocks in which something passed, by number: they are to be run as the modules they are.

    Raises:
        CheckpointError: for a hook, a patched method, a parametrization, a replaced class method; it names the part.
    """
    own = {}
    if blocks is not None and not _OWN_CODE.get():
        own = {i: b for i, b in enumerate(blocks.children()) if any(_has_own_code(part) for part in b.modules())}
    passing = {id(part) for block in own.values() for part in block.modules() if _has_own_code(part)}
    for kind in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        hooks = getattr(torch_module, kind)
        require(not hooks, f"a hook on every module ({_listed(hooks)})", name)
    for path, part in parts(module, skip):
        where = f"{name}: {path}" if path else name
        if parametrize.is_parametrized(part):
            tensors = ", ".join(
                f"{tensor} by {', '.join(type(step).__name__ for step in steps)}"
                for tensor, steps in part.parametrizations.items()  # type: ignore[union-attr, operator]
            )
            hint = "torch.nn.utils.parametrize.remove_parametrizations makes it a plain weight"
            require(False, f"a parametrization ({tensors}; {hint})", where)
        with own_code() if id(part) in passing else contextlib.nullcontext():
            _unhooked(part, where)
            _unpatched(part, where)
    return {i: copy.deepcopy(block).eval().requires_grad_(False) for i, block in own.items()}


def _has_own_code(part: nn.Module) -> bool:
    """Whether a part has forward hooks or a patched forward, and these make no weights."""
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    if any(_from(hook, "torch.nn.utils.") for hook in hooks):
        return False
    patched = "forward" in vars(part) and not _is_own(part, "forward", vars(part)["forward"])
    return patched or not all(_from(hook, *_HARMLESS) for hook in hooks)


def parts(module: nn.Module, skip: Sequence[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a module and of all in it, shared ones at each of their places, but for some children."""
    yield "", module
    for child, part in module._modules.items():
        if part is not None and child not in skip:
            yield from ((f"{child}.{path}".rstrip("."), inner) for path, inner in parts(part))


def _unhooked(part: nn.Module, where: str) -> None:
    for kind, hooks in (("hook", part._forward_hooks), ("pre-hook", part._forward_pre_hooks)):
        acting = {key: hook for key, hook in hooks.items() if not _from(hook, *_HARMLESS)}
        hint = "; vitfast.accelerate leaves hooks their work"
        require(not acting or _OWN_CODE.get(), f"a forward {kind} ({_listed(acting)}{hint})", where)


def _unpatched(part: nn.Module, where: str) -> None:
    kind = kind_of(part)
    for name, value in vars(part).items():
        own = inspect.getattr_static(kind, name, None)
        if name == _DYNAMO or not callable(value) or not (inspect.isfunction(own) or isinstance(own, staticmethod)):
            continue
        passes = _is_own(part, name, value) or (name == "forward" and _OWN_CODE.get())
        require(passes, f"a patched {name} ({_described(value)})", where)
    defining = next(base for base in kind.__mro__ if "forward" in vars(base))
    forward = vars(defining)["forward"]
    own = getattr(forward, "__module__", None)
    require(own == defining.__module__, f"{defining.__name__}.forward replaced by {_described(forward)}", where)


def _is_own(part: nn.Module, name: str, method: Any) -> bool:
    """Whether an instance's method is its class's, or a swap's, which computes the same."""
    own = inspect.getattr_static(kind_of(part), name, None)
    same = getattr(method, "__func__", None) is own and getattr(method, "__self__", None) is part
    return same or _from(method, *_HARMLESS)


def _from(function: Any, *starts: str) -> bool:
    """Whether a callable is defined in a module whose name starts so; of a partial, what it calls."""
    while hasattr(function, "func"):
        function = function.func
    module = getattr(function, "__module__", None) or type(function).__module__
    return str(module).startswith(starts)


def _described(function: Any) -> str:
    while hasattr(function, "func"):
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or type(function).__module__}.{name}"


def _listed(hooks: Mapping[Any, Any]) -> str:
    return ", ".join(_described(hook) for hook in hooks.values())


def composed(
    module: nn.Module,
    anatomy: Anatomy,
    packages: tuple[str, ...],
    name: str,
    skip: Sequence[str] = (),
) -> None:
    """Check that a module is put together of the parts that it is known to have, each in its place.

    Args:
        anatomy: class -> child -> classes that it may be of, "*" standing for every child; a container's entry is under
            "class.child" of where it stands. Classes without an entry have no children.
        packages: what the names of the classes' modules begin with.
        name: of the model, for messages. skip: children of the module that are not looked at.

    Raises:
        CheckpointError: naming the part and its class.
    """

    def visit(part: nn.Module, path: str, slot: str, skip: Sequence[str] = ()) -> None:
        kind = kind_of(part).__name__
        known = anatomy.get(slot) or anatomy.get(kind) or {}
        for child, inner in part._modules.items():
            if inner is None or child in skip:
                continue
            what, there = kind_of(inner), f"{path}.{child}".lstrip(".")
            fits = what.__name__ in known.get(child, known.get("*", ())) and what.__module__.startswith(packages)
            require(fits, f"{full_name(what)} as {child} of {kind}", f"{name}: {there}")
            visit(inner, there, f"{kind}.{child}")

    visit(module, "", "", skip)


def patches(conv: nn.Module, where: str) -> None:
    """Check that a convolution cuts an image into patches that neither overlap nor leave gaps.

    Raises:
        CheckpointError: naming what it does instead.
    """
    require(type(conv) is nn.Conv2d, f"{full_name(type(conv))} as patch projection", where)
    assert isinstance(conv, nn.Conv2d)
    require(conv.stride == conv.kernel_size, f"stride {conv.stride} for patches of {conv.kernel_size}", where)
    require(conv.padding in ((0, 0), 0, "valid"), f"padding {conv.padding}", where)
    require(conv.dilation == (1, 1) and conv.groups == 1, f"dilation {conv.dilation}, groups {conv.groups}", where)


def linear_head(head: nn.Module | None, where: str) -> tuple[nn.Linear | None, str]:
    """The classifier's linear layer, on its own or with dropout around it, and where in `head` it is.

    Returns:
        (layer, "1."): None where there is none, and what stands before "weight" in names beneath `head`'s.

    Raises:
        CheckpointError: for any other head, naming its parts.
    """
    if head is None or does_nothing(head):
        return None, ""
    if type(head) is nn.Linear:
        return head, ""
    acting = [(n, part) for n, part in head.named_children() if not does_nothing(part)]
    if type(head) is nn.Sequential and len(acting) <= 1:
        if not acting:
            return None, ""
        layer, inner = linear_head(acting[0][1], where)
        return layer, f"{acting[0][0]}.{inner}"
    listed = ", ".join(full_name(type(part)) for _, part in acting)
    inside = f" of {listed}" if type(head) is nn.Sequential else ""
    raise CheckpointError(f"{where}: {full_name(type(head))}{inside} as head is not supported, only a Linear layer")


def does_nothing(part: nn.Module) -> bool:
    """Whether a part is Identity, or a dropout, which is one in evaluation mode."""
    return type(part).__name__ in ("Identity", *_DROPOUTS) and type(part).__module__.startswith("torch.nn.")


def loadable_parts(module: nn.Module, matches: Any) -> list[str]:
    """Paths of the parts of a module that could be loaded on their own, outermost only."""
    paths: list[str] = []
    for path, part in parts(module):
        if path and matches(part) and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    return paths
