"""The C++ extension built for another machine: `make gpu-package` describes it, `make gpu` there takes it over.

As a program it looks at a folder that was just built, and writes what it is for: `python benchmarks/carried.py FOLDER`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import sysconfig
from pathlib import Path

LARGEST = 64 * 2**20
"""Bytes: more than this cannot be expected to travel."""


def describe(folder: Path) -> dict[str, object]:
    """Import the extension that `folder` has, check it, and write package.json: what it is for, and what is in it.

    Raises:
        SystemExit: if it does not import, has no CUDA op, or is too large.
    """
    import torch

    (path,) = (folder / "vitfast").glob("_C*.so")
    spec = importlib.util.spec_from_file_location("vitfast._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cuda = sorted(op for op, entry in module.ops().items() if "cuda" in entry["devices"])
    names = {op: f"vitfast_native::{op}_packed" if op == "linear" else f"vitfast_native::{op}" for op in on_cuda}
    if missing := [op for op, name in names.items() if not has(name, "CUDA")]:
        sys.exit(f"{path} says that {', '.join(missing)} run on CUDA, but registers nothing there")
    if not on_cuda:
        sys.exit(f"{path} has no CUDA op: {module.build_info()['cuda']}")
    if (size := path.stat().st_size) > LARGEST:
        sys.exit(f"{path} has {size} bytes, more than {LARGEST}")
    made = {
        "torch": torch.__version__, "suffix": sysconfig.get_config_var("EXT_SUFFIX"), "bytes": size,
        "cuda": module.build_info()["cuda"], "cuda_ops": on_cuda,
    }  # fmt: skip
    (folder / "package.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


def use(folder: Path, package: Path) -> str:
    """Copy the extension of `folder` into the package `vitfast` at `package`, where it fits this Python and torch.

    Returns:
        What was done, or why not, in a sentence. An extension that is there already stays.
    """
    import torch

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if there := sorted(package.glob("_C*.so")):
        return f"the C++ extension is there already: {there[0].name}"
    if not (folder / "package.json").is_file():
        return f"no C++ extension: there is none to use in {folder} (make gpu-package builds one)"
    made = json.loads((folder / "package.json").read_text())
    if (made["torch"], made["suffix"]) != (torch.__version__, suffix):
        return (
            f"no C++ extension: that of {folder} is for torch {made['torch']} and {made['suffix']}, here are torch "
            f"{torch.__version__} and {suffix}"
        )
    shutil.copyfile(folder / "vitfast" / f"_C{suffix}", package / f"_C{suffix}")
    return f"the C++ extension of {folder}, with CUDA kernels for {made['cuda']}: {', '.join(made['cuda_ops'])}"


if __name__ == "__main__":
    print(json.dumps(describe(Path(sys.argv[1]))))
