"""What pyproject.toml cannot say: the package list, and the optional C++ extension vitfast._C.

The list is explicit because `vitfast.kernels` and `vitfast.benchmarks` are symbolic links to ../kernels
and ../benchmarks and have no `__init__.py` (a top-level package `kernels` would shadow Hugging Face's):
no finder gets that right.

VITFAST_BUILD=0 leaves the extension out, VITFAST_BUILD=1 insists on it. Unset, it is built when
torch can be imported (so: `pip install --no-build-isolation`, torch first) and there is a C++
compiler; otherwise the install is pure Python and a notice says why. Every op runs without it.
Its CUDA part is built where torch has CUDA and there is nvcc, for the GPUs found here or those named by
VITFAST_CUDA_ARCHS ("80;90"); otherwise it is left out, with a notice.
VITFAST_SANITIZE=1 builds it with the address and undefined-behaviour sanitizers: see `make sanitize`.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOMS = (
    "attention", "benchmarks", "cli", "diagnostics", "engine", "images", "integrations", "kernels", "kernels._compile",
    "kernels._parts", "models", "models.checkpoints", "ops", "pipeline", "pipeline.sources",
    "serving",
)  # fmt: skip
PACKAGES = ["vitfast", *(f"vitfast.{room}" for room in ROOMS)]
METADATA_ONLY = {"egg_info", "dist_info", "sdist"}


def locate_toolkit(default: Path = Path("/usr/local/cuda")) -> None:
    """Set CUDA_HOME where torch would be misled: by an nvcc on the path that is a mere script, far from its headers."""
    nvcc, header = shutil.which("nvcc"), Path("include", "cuda_runtime.h")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    if not (Path(nvcc).parents[1] / header).is_file() and (default / header).is_file():
        os.environ["CUDA_HOME"] = str(default)


def why_no_extension() -> str:
    """The reason why the extension cannot or shall not be built here, or "" if it can."""
    if os.environ.get("VITFAST_BUILD") == "0":
        return "VITFAST_BUILD=0"
    locate_toolkit()  # which torch looks for when the following is imported
    try:
        import torch.utils.cpp_extension
    except ImportError as error:
        return f"torch cannot be imported by this build ({error}); install torch, then use --no-build-isolation"
    compiler = shlex.split(torch.utils.cpp_extension.get_cxx_compiler())
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler {compiler[0]!r}; install one or set CXX"
    if subprocess.run([*compiler, "--version"], capture_output=True, check=False).returncode:
        return f"the C++ compiler {compiler[0]!r} does not even tell its version; install another or set CXX"
    return ""


def cuda_archs() -> list[str]:
    """Compute capabilities to build for, as nvcc writes them: "80", "90a", the form of Hopper that has wgmma."""
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    here = [f"{major}{minor}" for major, minor in sorted(found) if major >= 8]
    named = os.environ.get("VITFAST_CUDA_ARCHS")
    return ["90a" if arch == "90" else arch for arch in (named.split(";") if named else here)]


def why_no_cuda() -> str:
    """The reason why the CUDA part cannot be built here, or "" if it can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").is_file():
        return "there is no nvcc; install the CUDA toolkit or set CUDA_HOME"
    if not Path(CUDA_HOME, "include", "cuda_runtime.h").is_file():
        return f"there is no cuda_runtime.h below {CUDA_HOME}, where nvcc was found; set CUDA_HOME to the CUDA toolkit"
    if not cuda_archs():
        return "there is no GPU of compute capability 8.0 or later here; set VITFAST_CUDA_ARCHS, as in 80;90"
    return ""


def extension() -> dict:
    """The `ext_modules` and `cmdclass` arguments of `setup`; empty for a pure-Python install.

    Raises:
        SystemExit: if VITFAST_BUILD=1 and the extension cannot be built.
    """
    if METADATA_ONLY & set(sys.argv):
        return {}
    if reason := why_no_extension():
        if os.environ.get("VITFAST_BUILD") == "1":
            sys.exit(f"vitfast: VITFAST_BUILD=1, but the C++ extension cannot be built: {reason}")
        print(f"vitfast: NOTICE: installing without the C++ extension: {reason}", file=sys.stderr)
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cxx = ["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]  # as pybind11 wants it
    if platform.system() == "Linux":
        # Compile with OpenMP but do not link it: the symbols then come from the runtime that torch
        # has loaded, so both share one thread pool and torch.set_num_threads holds for both.
        cxx.append("-fopenmp")
    link = []
    if os.environ.get("VITFAST_SANITIZE") == "1":
        link = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        cxx += [*link, "-O1", "-g", "-fno-omit-frame-pointer"]

    kind, folders, nvcc, macros = CppExtension, ["cpu"], [], []
    if reason := why_no_cuda():
        print(f"vitfast: NOTICE: the C++ extension has no CUDA kernels: {reason}", file=sys.stderr)
        state = f"not built: {reason}"
    else:
        kind, folders, macros = CUDAExtension, ["cpu", "cuda"], [("VITFAST_CUDA", None)]
        nvcc = ["-O3", "-std=c++17", *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs())]
        state = ";".join(cuda_archs())
    sources = [path for folder in folders for path in Path("csrc", folder).iterdir() if path.suffix in (".cpp", ".cu")]
    module = kind(
        "vitfast._C",
        ["csrc/ops.cpp", *sorted(map(str, sources))],
        depends=sorted(str(path) for path in Path("csrc").rglob("*.*h")),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        define_macros=[
            ("VITFAST_CXX_FLAGS", json.dumps(" ".join(cxx))),
            ("VITFAST_CUDA_STATE", json.dumps(state)),
            *macros,
        ],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(
    packages=PACKAGES,
    package_data={
        "vitfast": ["py.typed"],
        "vitfast.kernels": ["configs/*.json"],
        "vitfast.benchmarks": ["published/*.json"],
        "vitfast.serving": ["page/*"],
    },
    include_package_data=False,
    **extension(),
)
