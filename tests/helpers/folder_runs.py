"""`vitfast` commands with a fake model in processes of their own, which begin in milliseconds and can be made to fail.

A process that has imported everything forks one for each run. A run is told at which file operation or result to send
itself a signal, or from where on its disk is full: the moments between any two steps, not only those that a clock hits.
"""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """Starts runs and waits for them; a context manager."""

    def __enter__(self):
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, **question):
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments, log, **job):
        """Begin a run; its process id. stdout and stderr go to `log`.out and `log`.err, unless job says otherwise.

        job: weights (which the fake model has), rows and seconds (of a part), pause (s after each result), slow (s of
        a batch, each said on stderr), real (the model is loaded, not faked), encoding, stdout; limit: bytes that a file
        may have; fault: [what, which, when, do], what being "replace", "fsync", "unlink" or "result", which its number
        from 0, when "before" or "after" ("before" for a result), do a signal's name or "full".
        """
        return self._ask(arguments=[str(a) for a in arguments], log=str(log), **job)

    def wait(self, pid):
        """The exit code of a run; minus the signal that killed it."""
        return self._ask(wait=pid)

    def run(self, *arguments, **job):
        """The exit code of a run that is started and waited for."""
        return self.wait(self.start(*arguments, **job))


def _serve():
    # Whatever a run would import and build, so that none has to.
    from helpers import photos  # noqa: F401
    from typer.testing import CliRunner

    import vitfast.engine.load
    import vitfast.pipeline.parquet  # noqa: F401
    from vitfast.cli.app import app
    from vitfast.images import formats

    formats.readable()
    CliRunner().invoke(app, ["embed", "no such file", "-m", "m", "-o", "o"])
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            reply = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            reply = os.fork()
            if reply == 0:
                _run(question)
        print(json.dumps(reply), flush=True)


def _run(job):
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, path in ((0, os.devnull), (1, job.get("stdout", job["log"] + ".out")), (2, job["log"] + ".err")):
        # To write only: a pipe that its writer could read, too, would never be broken.
        file = os.open(path, (os.O_WRONLY if descriptor else os.O_RDONLY) | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    encoding = job.get("encoding", "utf-8")
    sys.stdin, sys.stdout = open(0), open(1, "w", encoding=encoding)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding=encoding, errors="backslashreplace")  # noqa: SIM115
    code = 99
    try:
        _prepare(job)
        from vitfast.cli.app import app

        app(job["arguments"])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def _prepare(job):
    """Put the fake model, the sizes of parts and the fault in place."""
    from vitfast.engine import load
    from vitfast.pipeline import folder, writing

    load_module = sys.modules[load.__module__] if callable(load) else load
    if not job.get("real"):
        load_module.load = lambda *_, **__: model(job.get("weights", 0), job.get("slow", 0))
    folder.PART_ROWS, writing.PART_SECONDS = job.get("rows", 4096), job.get("seconds", 5.0)
    if "limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    what, which, when, do = job.get("fault") or ("", 0, "", "")
    seen = {}

    def at(name, moment):
        number = seen.setdefault((name, moment), 0)
        seen[name, moment] += 1
        if name == what and moment == when and do == "full" and number >= which:
            raise OSError(errno.ENOSPC, "No space left on device")
        if name == what and moment == when and number == which and do.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, do))

    def watched(name, function):
        def call(*arguments, **options):
            at(name, "before")
            result = function(*arguments, **options)
            at(name, "after")
            return result

        return call

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, watched(name, getattr(os, name)))
    original = writing.write_rows

    def write(results, *arguments, on_result, **options):
        def noted(result):
            import time

            at("result", "before")
            on_result(result)
            time.sleep(job.get("pause", 0))

        return original(results, *arguments, on_result=noted, **options)

    writing.write_rows = write


def model(weights, slow):
    """A fake model: its embedding is that of FakeEngine and a thousand for each number of its weights."""
    import time

    from helpers.photos import FakeEngine

    class Model(FakeEngine):
        def __call__(self, images, *, preprocessed):
            if slow:
                print("batch", file=sys.stderr, flush=True)
                time.sleep(slow)
            output = super().__call__(images, preprocessed=preprocessed)
            output.embedding += 1000 * weights
            return output

    return Model(fingerprint=f"weights {weights}", labels=["red", "green", "blue"])


if __name__ == "__main__":
    _serve()
