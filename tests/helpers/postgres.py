"""A PostgreSQL server of a test's own, with the extension pgvector, where the machine has both."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

USER = "vitfast"


def _folders():
    """Where the server's programs may be: on the path, where Debian puts them, in the package pgserver."""
    if found := shutil.which("initdb"):
        yield Path(found).parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if spec := importlib.util.find_spec("pgserver"):
        yield from (Path(place) / "pginstall" / "bin" for place in spec.submodule_search_locations or ())


def programs():
    """The folder of a server's programs that has pgvector beside it, or a skip."""
    for folder in _folders():
        if not all((folder / name).is_file() for name in ("initdb", "pg_config", "pg_ctl", "postgres")):
            continue
        asked = [folder / "pg_config", "--sharedir"]
        shared = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        if (Path(shared) / "extension" / "vector.control").is_file():
            return folder
    pytest.skip("there is no PostgreSQL server with pgvector here: its recipe is not run")


@contextlib.contextmanager
def running():
    """A server that nobody else reaches; gives the environment by which a client finds it."""
    folder = programs()
    root = Path(tempfile.mkdtemp(prefix="postgres-"))
    as_user = {}
    if os.geteuid() == 0:  # as which PostgreSQL does not run
        shutil.chown(root, "nobody")
        as_user = {"user": "nobody", "cwd": "/"}

    def call(program, *arguments):
        command = [folder / program, "-D", root / "data", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **as_user)
        assert done.returncode == 0, done.stdout

    try:
        call("initdb", "--auth=trust", "-U", USER, "--no-sync", "--encoding=UTF8", "--locale=C")
        call("pg_ctl", "-w", "-l", root / "log", "-o", f"-k {root} -c listen_addresses=''", "start")
        try:
            yield {"PGHOST": str(root), "PGUSER": USER, "PGDATABASE": "postgres"}
        finally:
            call("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(root)
