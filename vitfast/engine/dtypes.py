"""The devices and dtypes that a model can be asked to run on and in."""

from __future__ import annotations

import torch

from vitfast.ops.names import did_you_mean

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


SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def dtype_name(dtype: str) -> str:
    """The short name, "fp32", of what may also be called "float32"; of "fp8" and "int8" themselves.

    Raises:
        ValueError: for a name that is not known.
    """
    if dtype not in DTYPES and dtype not in QUANTIZED:
        raise ValueError(_unknown(dtype, (*DTYPES, *QUANTIZED)))
    return SHORT.get(dtype, dtype)


def _unknown(dtype: object, names: tuple[str, ...]) -> str:
    return f"dtype must be one of {', '.join(names)}, got {dtype!r}{did_you_mean(dtype, names)}"


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
        near = did_you_mean(device, ("cpu", "cuda", "cuda:0"))
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}: {error}{near}") from None
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


def resolve_dtype(
    dtype: str | torch.dtype | None, device: torch.device, *, besides: tuple[str, ...] = ()
) -> torch.dtype:
    """The dtype asked for, or bf16 on a GPU and fp32 on the CPU.

    Args:
        besides: names that the caller takes, too, and has looked for before; the error names them.

    Raises:
        ValueError: for a dtype other than fp32, fp16, bf16.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in set(DTYPES.values()):
        raise ValueError(_unknown(dtype, (*DTYPES, *besides)))
    return resolved
