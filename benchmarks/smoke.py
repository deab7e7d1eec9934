"""Every op on one backend, once, at small shapes and against the reference: what does harm shows before it costs time.

And the same launches at a model's shapes without a comparison, which fills the cache of Triton's compiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch

from vitfast.benchmarks import kernels, sweep
from vitfast.benchmarks.cases import Case, Dims
from vitfast.benchmarks.device import Device
from vitfast.benchmarks.providers import BACKEND_NAMES, BASELINE, PROVIDERS, Absent, Provider, providers_of
from vitfast.benchmarks.watch import LAUNCH_LIMIT_S, LIMIT_S, Watch
from vitfast.engine.dtypes import QUANTIZED

_HEADS: Dims = {"batch": 2, "tokens": 197, "heads": 2, "head_dim": 64}
_ROWS: Dims = {"M": 131, "K": 192, "N": 256}

SMALL: dict[str, tuple[Dims, ...]] = {
    "patch_embed": tuple({"batch": 3, "image": 64, "patch": 16, "width": 192, "pixels": p} for p in ("uint8", "float")),
    "layer_norm": ({"rows": 131, "width": 192},),
    "add_layer_norm": ({"rows": 131, "width": 192},),
    "row_stats": ({"rows": 131, "width": 192},),
    "linear": (
        *({**_ROWS, "epilogue": e} for e in ("plain", "bias", "residual stats", "norm", "norm gelu", "norm swiglu")),
        {"M": 7, "K": 100, "N": 36, "epilogue": "gelu"},
    ),
    "attention": (
        *({**_HEADS, "variant": v} for v in ("", "bias", "mask", "causal", "qk-norm rope", "to fp8", "to int8")),
        {**_HEADS, "tokens": 50, "head_dim": 72},
        {**_HEADS, "tokens": 577},
    ),
    "attention_backward": (_HEADS,),
    "attention_block": ({**_HEADS, "width": 128},),
    "mlp": tuple({"rows": 131, "width": 192, "hidden": 256, "activation": a} for a in ("gelu", "swiglu")),
    "quantize": tuple({"rows": 131, "width": 192, "norm": n, "precision": p} for n in ("norm", "") for p in QUANTIZED),
    "quantized_linear": tuple(
        {**_ROWS, "K": 256, "epilogue": e, "precision": p}
        for e in ("bias", "gelu requantize", "groups residual", "heads residual")
        for p in QUANTIZED
    ),
    "resample": tuple({"batch": 3, "height": 83, "width": 61, "axis": a, "out": 32} for a in ("rows", "columns")),
    "block": ({**_HEADS, "width": 128, "hidden": 256},),
}
"""Of every op: as few shapes as reach its forms, real and awkward."""


def pairs() -> list[tuple[str, str]]:
    """(op, backend) of all that there is to try; "torch" is what the others are compared with."""
    ours = [(op, name) for op in SMALL for name in ("triton", "native")]
    return [(op, name) for op, name in ours if name == "triton" or op not in ("attention_backward", "block")]


def cases(op: str, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The small cases of an op."""
    return [Case(op, dims, device, dtype) for dims in SMALL[op]]


def launches(todo: Iterable[Case], backend: str, device: Device, *, swept: bool = False) -> list[tuple[Case, Provider]]:
    """What is there to launch of cases on a backend.

    Args:
        swept: every config that `benchmarks/sweep.py` would try, not the one that a call takes.
    """
    if swept:
        return [(case, one) for case in todo for name, one in sweep.providers(case, device).items() if name != BASELINE]
    name = BACKEND_NAMES[backend]
    found = [(case, providers_of(case).get(name) or PROVIDERS[case.op].get(name)) for case in todo]
    return [(case, one) for case, one in found if one is not None]


def smoke(
    todo: Iterable[tuple[Case, Provider]], device: Device, *, compare: bool = True,
    finished: Container[tuple[str, str]] = (), watch: Watch | None = None,
    on_rows: Callable[[list[dict[str, Any]]], None],
) -> None:  # fmt: skip
    """Make every launch once; `on_rows` gets its row: case, op, provider, correct, seconds, error.

    Args:
        compare: with the reference; without, `correct` says that it was launched.
        finished: (case, provider) of those to leave alone. watch: told what is about to run.

    Raises:
        ContextLost: if the device cannot go on; its `row` names what that is due to.
    """
    watch = watch or Watch()
    for case, provider in todo:
        if (case.name, provider.name) in finished:
            continue
        row: dict[str, Any] = {"case": case.name, "op": case.op, "provider": provider.name, "correct": False}
        # Without a comparison it is compiled for the first time, several kernels at once.
        watch.begin(case.name, provider.name, "being launched", LAUNCH_LIMIT_S if compare else LIMIT_S)
        start = time.perf_counter()
        try:
            with torch.no_grad(), kernels.quiet():
                call = case.inputs()
                run = provider.build(call)
                if compare:
                    row |= kernels.Gate(case, call).judge(run, provider)
                else:
                    run()
                    row["correct"] = True
            device.synchronize()
        except Exception as error:  # whatever a backend raises is the reason in its row
            row |= {"correct": False, "error": kernels.reason(error), "absent": isinstance(error, Absent)}
            kernels.check(device, row)
        row["seconds"] = time.perf_counter() - start
        on_rows([row])
    watch.end()
