"""TorchScript archives, as OpenAI's CLIP is given out: their tensors, read without running any of their code."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def is_archive(path: Path) -> bool:
    """Whether a file is one: a zip with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())


def read(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers by their names, on the CPU, and what other tensors the modules hold.

    Raises:
        zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError: for a damaged file, or one that names
            anything but modules and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name.partition("/")[0] for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(f"{root}/data.pkl") as content:
            return dict(_tensors(_Reader(content, archive, root).load()))


class _Module:
    """An object of the archive's own code: what it holds, and nothing that it does."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Makes modules and tensors, and refuses to import anything else."""

    def __init__(self, content: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(content)
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # lists of one type, which are attributes and not tensors
            return list
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"a TorchScript archive of modules and tensors has no {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    del rest  # whether a gradient is wanted, and hooks
    return storage.as_strided(size, stride, offset)


def _tensors(module: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, Tensor):
        yield path, module
    elif isinstance(module, _Module) and isinstance(module.state, dict):
        for name, value in module.state.items():
            yield from _tensors(value, f"{path}.{name}".lstrip("."))
