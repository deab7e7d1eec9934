"""What pyproject.toml cannot say: the package list, and the optional C++ extension vitfast._C.

The list is explicit because `vitfast.kernels` is a symbolic link to ../kernels and has no
`__init__.py` (a top-level package `kernels` would shadow Hugging Face's): no finder gets that right.

VITFAST_BUILD=0 leaves the extension out, VITFAST_BUILD=1 insists on it. Unset, it is built when
torch can be imported (so: `pip install --no-build-isolation`, torch first) and there is a C++
compiler; otherwise the install is pure Python and a notice says why. Every op runs without it.
VITFAST_SANITIZE=1 builds it with the address and undefined-behaviour sanitizers: see `make sanitize`.
"""

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

PACKAGES = ["vitfast", "vitfast.checkpoints", "vitfast.integrations", "vitfast.kernels", "vitfast.ops"]
METADATA_ONLY = {"egg_info", "dist_info", "sdist"}


def why_no_extension() -> str:
    """The reason why the extension cannot or shall not be built here, or "" if it can."""
    if os.environ.get("VITFAST_BUILD") == "0":
        return "VITFAST_BUILD=0"
    try:
        import torch.utils.cpp_extension
    except ImportError as error:
        return f"torch cannot be imported by this build ({error}); install torch, then use --no-build-isolation"
    compiler = shlex.split(torch.utils.cpp_extension.get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}; install one or set CXX"
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

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    if platform.system() == "Linux":
        # Compile with OpenMP but do not link it: the symbols then come from the runtime that torch
        # has loaded, so both share one thread pool and torch.set_num_threads holds for both.
        flags.append("-fopenmp")
    link_flags = []
    if os.environ.get("VITFAST_SANITIZE") == "1":
        link_flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags += [*link_flags, "-O1", "-g", "-fno-omit-frame-pointer"]
    sources = ["csrc/ops.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
    module = CppExtension(
        "vitfast._C",
        sources,
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        extra_compile_args={"cxx": flags},
        extra_link_args=link_flags,
        define_macros=[("VITFAST_CXX_FLAGS", '"' + " ".join(flags) + '"')],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(
    packages=PACKAGES,
    package_data={"vitfast": ["py.typed"], "vitfast.kernels": ["configs/*.json"]},
    include_package_data=False,
    **extension(),
)
