"""Kernels made wrong on purpose: a check that lets one of these pass checks nothing."""

import importlib.util
import sys
from pathlib import Path


def mutant(module, old, new, folder):
    """A copy of a kernel module in which `old` is replaced by `new` everywhere."""
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} no longer contains {old!r}"
    path = folder / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("vitfast.kernels.mutant", path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy  # dataclasses look their module up
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules[spec.name]
    return copy
