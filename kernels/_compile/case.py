"""One specialisation of a kernel as data, and how a kernel's description becomes one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitfast.kernels._parts.launch import Config

SHARED_MEMORY_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory one block may use, by architecture (CUDA C++ programming guide, table of
compute capabilities). Triton does not check it when compiling for another chip."""

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class CompileCase:
    """One specialisation to compile without a GPU, as `vitfast inspect` and the tests do.

    `signature` maps run-time argument names to Triton types ("*bf16", "i32", "fp32",
    "tensordesc<bf16[128,64]>", ..., or a tuple of such) in the kernel's argument order; `constexprs` holds the rest.
    `aligned` names the arguments divisible by 16 (pointers and, where true of the models, sizes). An entry of a tuple
    is named "name.index", in `constexprs` too, where its type in the signature is "constexpr".
    """

    kernel: str
    config: str
    fn: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    archs: tuple[int, ...] = ARCHS
    tile: dict[str, int] = field(default_factory=dict)
    """Axis letter (M, N, ...) -> tile side, for tile efficiency at real shapes."""

    def path(self, name: str) -> tuple[int, ...]:
        """Where an argument, or an entry of a tuple, stands among the kernel's arguments."""
        name, _, entry = name.partition(".")
        return (list(self.fn.arg_names).index(name), *([int(entry)] if entry else []))


def archs_of(config: Config) -> tuple[int, ...]:
    """The architectures that a config is made for."""
    return tuple(arch for arch in ARCHS if divmod(arch, 10) >= config.min_capability)


def compile_case(
    fn: Any,
    config: Config,
    *,
    kernel: str,
    name: str,
    types: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    unaligned: Iterable[str] | None = None,
    aligned: Iterable[str] | None = None,
    archs: tuple[int, ...],
    tile: dict[str, int],
) -> CompileCase:
    """A kernel's case: arguments that are neither in `types` nor constants are i32.

    Exactly one of `aligned` and `unaligned` is given; the latter means all others.
    """
    constants = {**config.blocks, **constexprs}
    signature = {arg: types.get(arg, "i32") for arg in fn.arg_names if arg not in constants}
    if aligned is None:
        left_out = set(unaligned or ())
        aligned = [arg for arg in _entries(signature) if arg not in left_out and arg.partition(".")[0] not in left_out]
    return CompileCase(
        kernel=kernel,
        config=name,
        fn=fn,
        signature=signature,
        constexprs=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(aligned),
        archs=archs,
        tile=tile,
    )


def _entries(signature: Mapping[str, Any]) -> Iterable[str]:
    """Names of all run-time arguments, those in tuples one by one."""
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            yield from (f"{name}.{i}" for i, entry in enumerate(kind) if entry != "constexpr")
        else:
            yield name
