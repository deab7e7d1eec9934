"""What is built and installed: sdist, wheel, editable install and bare checkout, all offline."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

import vitfast

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
LINKED = ("benchmarks", "kernels")
FOLDERS = ("vitfast", "kernels", "csrc", "tests", "benchmarks", "examples")


def _why_no_build() -> str:
    # Asked of the metadata: looking for the module pip makes setuptools change how distutils is found.
    installed = {name: next(distributions(name=name), None) for name in ("pip", "setuptools")}
    if installed["pip"] is None:
        return "pip is not installed"
    if installed["setuptools"] is None or int(installed["setuptools"].version.split(".")[0]) < 77:
        return "setuptools >= 77 is not installed"
    return ""


needs_build = pytest.mark.skipif(bool(_why_no_build()), reason=_why_no_build())


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command, offline and without the extension; its stdout and stderr."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "VITFAST_BUILD": "0", "PIP_NO_INDEX": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def modules() -> set[str]:
    """Every Python file of the package as a wheel names it, the linked folders among them."""
    tops = (ROOT / "vitfast", *(ROOT / "vitfast" / name for name in LINKED))
    return {str(path.relative_to(ROOT)) for top in tops for path in top.rglob("*.py")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout, so that building leaves nothing in it; with a tuning table to be packed."""
    root = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        shutil.copy(ROOT / name, root)
    skip = shutil.ignore_patterns("__pycache__", "*.so")  # results of benchmarks are copied: no wheel may hold them
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=skip)
    (root / "kernels" / "configs").mkdir(exist_ok=True)
    (root / "kernels" / "configs" / "some-gpu.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out), str(tree), cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(out)!r})", cwd=tree)
    (built,) = out.glob("*.tar.gz")
    return built


def test_linked_folders_have_no_init():
    for name in LINKED:
        assert (ROOT / "vitfast" / name).is_symlink()
        assert os.readlink(ROOT / "vitfast" / name) == f"../{name}"
        assert not list((ROOT / name).rglob("__init__.py"))
    assert not (ROOT / "tests" / "__init__.py").exists()


@needs_build
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = ("kernels/configs", "benchmarks/published")
    tables = {str(path.relative_to(ROOT)) for folder in data for path in (ROOT / "vitfast" / folder).glob("*.json")}
    page = {str(path.relative_to(ROOT)) for path in (ROOT / "vitfast" / "serving" / "page").iterdir()}
    assert names == modules() | tables | page | {"vitfast/py.typed", "vitfast/kernels/configs/some-gpu.json"}
    assert {
        "vitfast/kernels/_parts/launch.py",
        "vitfast/kernels/_compile/linear.py",
        "vitfast/benchmarks/cases.py",
    } <= names
    assert wheel.name == f"vitfast-{vitfast.__version__}-py3-none-any.whl"


@needs_build
def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"vitfast-{vitfast.__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["Version"] == vitfast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = {re.split(r"[ ;<>=\[]", line)[0]: line for line in metadata.get_all("Requires-Dist")}
    assert required["torch"] == "torch>=2.11"
    assert re.fullmatch(r"triton>=3\.6; platform_system == .Linux.", required["triton"])
    assert "vitfast = vitfast.cli.app:app" in archive.read(f"{info}/entry_points.txt").decode()
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


@needs_build
def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert not {name for name in files if name.startswith(("kernels/", "tests/", "benchmarks/", "examples/"))}
    csrc = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert modules() | csrc | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= files
    run(sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('.')", cwd=source)
    (again,) = source.glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


IMPORT = (
    "import vitfast, vitfast.kernels._parts.launch as c, vitfast.benchmarks.cases as b, vitfast.ops;"
    "print(vitfast.__file__); print(c.__file__); print(b.__file__)"
)
WHERE = ("vitfast/__init__.py", "vitfast/kernels/_parts/launch.py", "vitfast/benchmarks/cases.py")


@needs_build
def test_installed_wheel_imports(wheel, tmp_path):
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip")
    run(*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    assert not any((target / name).exists() for name in LINKED)
    assert (target / "bin" / "vitfast").is_file()
    where = run(sys.executable, "-c", IMPORT, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert where == [str(target / path) for path in WHERE]
    command = (sys.executable, "-m", "vitfast", "bench", "kernels", "--help")
    assert "--provider" in run(*command, cwd=tmp_path, PYTHONPATH=str(target), COLUMNS="120")


@needs_build
def test_editable_install_imports(tree, tmp_path):
    build = f"from setuptools import build_meta as b; b.build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    (built,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(built).extractall(site)
    # -S: an editable install of the environment that runs the tests must not answer instead.
    others = [entry for entry in sys.path if entry and Path(entry) != ROOT]
    code = f"import site, sys; site.addsitedir({str(site)!r}); sys.path.extend({others}); {IMPORT}"
    where = run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH="").split()
    assert [Path(path).resolve() for path in where] == [(tree / path).resolve() for path in WHERE]
    code = f"import site; site.addsitedir({str(site)!r}); import importlib.util as u; print(u.find_spec('kernels'))"
    assert run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH="").strip() == "None"


def test_bare_checkout_imports():
    where = run(sys.executable, "-c", IMPORT, cwd=ROOT, PYTHONPATH=str(ROOT)).split()
    assert where == [str(ROOT / path) for path in WHERE]


def test_a_real_kernels_package_is_not_shadowed(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("real = True")
    code = "import sys; assert sys.path[0] == ''; import kernels; print(kernels.real, kernels.__file__)"
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path)).split() == [
        "True",
        str(package / "__init__.py"),
    ]


def transformers_sees_kernels(*folders: Path) -> list[str]:
    """Whether transformers takes `kernels` for installed in a process at the root of the checkout, and its file.

    `folders` stand for the environment's site-packages, which may have the real package or not.
    """
    paths = [str(folder) for folder in folders]
    standard = [path for path in sys.path if path and "site-packages" not in path and not path.startswith(str(ROOT))]
    code = (
        f"import sys; assert sys.path[0] == ''; sys.path[1:] = {standard + paths}\n"
        "import importlib.util as u, transformers.utils.import_utils as t\n"
        "print(t.is_kernels_available(), u.find_spec('kernels').origin)"
    )
    return run(sys.executable, "-S", "-c", code, cwd=ROOT, PYTHONPATH="").split()[-2:]


def test_transformers_does_not_take_the_folder_for_a_package(tmp_path):
    """Whether Hugging Face's package of that name is installed or not: links to all else stand for an environment."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.utils import import_utils

    others = tmp_path / "site-packages"
    others.mkdir()
    for path in (path for folder in reversed(sys.path) if "site-packages" in folder for path in Path(folder).iterdir()):
        if path.name != "kernels" and not path.name.startswith(("kernels-", "__editable__")):
            (others / path.name).unlink(missing_ok=True)
            (others / path.name).symlink_to(path)
    assert transformers_sees_kernels(others) == ["False", "None"]  # a folder of no package
    real, version = tmp_path / "real", import_utils.KERNELS_MIN_VERSION
    (real / "kernels").mkdir(parents=True)
    (real / "kernels" / "__init__.py").write_text(f"__version__ = {version!r}")
    (real / f"kernels-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    (real / f"kernels-{version}.dist-info" / "METADATA").write_text(metadata)
    assert transformers_sees_kernels(real, others) == ["True", str(real / "kernels" / "__init__.py")]


def test_command_line_starts():
    assert "Usage" in run(sys.executable, "-m", "vitfast", "--help", cwd=ROOT, PYTHONPATH=str(ROOT))
