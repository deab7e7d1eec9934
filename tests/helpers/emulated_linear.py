"""The CUDA linear kernel under emulation, as a function of tensors: 16-bit operands, or e4m3 ones with scales."""

import ctypes
import shutil

import torch
from helpers.emulated import ROOT, library

from vitfast.testing import guarded

FP16, BF16, E4M3 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
TYPES = {FP16: "fp16", BF16: "bf16", E4M3: "e4m3"}
ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu")


class Call(ctypes.Structure):
    """LinearCall of csrc/cuda/linear.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "weight", "y", "residual", "bias", "layer_scale")]
        + [(name, ctypes.c_void_p) for name in ("row_stats", "weight_sum", "y_stats")]
        + [(name, ctypes.c_void_p) for name in ("x_scale", "weight_scale", "y_scale")]
        + [(f"{name}_stride", ctypes.c_int64) for name in ("x", "weight", "residual")]
        + [(name, ctypes.c_int) for name in ("m", "n", "k", "x_groups", "activation")]
        + [("eps", ctypes.c_float)]
    )


def compiled(folder, cases, include=ROOT / "csrc"):
    """`cases`: types of x and of the rest, and columns of a tile, of each instance."""
    listed = " ".join(f"CASE({x},{y},{columns})" for x, y, columns in cases)
    found = library("linear", folder, [f"CASES={listed}"], include)
    found.linear.restype = ctypes.c_char_p
    return found


def compiled_with_fault(folder, cases, fault):
    """With a change in one file: the file in csrc, what is there, and what shall be."""
    file, old, new = fault
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = (folder / "csrc" / file).read_text()
    assert source.count(old) >= 1, f"{file} no longer contains {old!r}"
    (folder / "csrc" / file).write_text(source.replace(old, new))
    return compiled(folder, cases, folder / "csrc")


def launch(kernels, x, weight, dtype, *, columns, blocks, seed, requantize=False, stats=False, activation=None,
           residual=None, eps=1e-6, **vectors):  # fmt: skip
    """The kernel's outputs, complete and within bounds: y, and its scales or statistics. x is [M, K].

    `dtype` is that of what is not e4m3, `vectors` the other tensors by their names in `Call`.
    """
    (m, k), n = x.shape, weight.shape[0]

    def output(*shape, of):
        return guarded(torch.full(shape, float("nan"), dtype=torch.float32).to(of))

    outputs = {"y": output(m, n, of=E4M3 if requantize else dtype)}
    if requantize:
        outputs["y_scale"] = output(m, -(-n // 128), of=torch.float32)
    if stats:
        outputs["y_stats"] = output(m, -(-n // 128), 2, of=torch.float32)
    given = {"x": x, "weight": weight, "residual": residual, **vectors}
    inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
    x_scale = inputs.get("x_scale")
    call = Call(
        **{name: tensor.data_ptr() for name, tensor in (inputs | outputs).items()},
        **{f"{name}_stride": inputs[name].stride(0) for name in ("x", "weight", "residual") if name in inputs},
        m=m, n=n, k=k, x_groups=1 if x_scale is None or x_scale.ndim == 1 else x_scale.shape[1],
        activation=ACTIVATIONS.index(activation), eps=eps,
    )  # fmt: skip
    memory = [*inputs.values(), *outputs.values()]
    sizes = [
        t.element_size() * (1 + sum((a - 1) * b for a, b in zip(t.shape, t.stride(), strict=True))) for t in memory
    ]
    conflicts = ctypes.c_int64()
    error = kernels.linear(
        f"{TYPES[x.dtype]} {TYPES[dtype]}".encode(), columns, ctypes.byref(call), blocks,
        (ctypes.c_void_p * len(memory))(*(t.data_ptr() for t in memory)), (ctypes.c_int64 * len(memory))(*sizes),
        len(memory), len(outputs), ctypes.c_uint64(seed), ctypes.byref(conflicts),
    ).decode()  # fmt: skip
    if error:
        raise RuntimeError(error)
    assert conflicts.value == 0
    found = tuple(outputs.values())
    return found if len(found) > 1 else found[0]
