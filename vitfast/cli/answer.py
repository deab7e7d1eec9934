"""How a command answers: text or JSON on stdout, errors as one message, an exit code.

Nothing here fails for lack of somebody to talk to: a pipe that is closed, a full disk, a terminal that is gone or knows
only ASCII. What a terminal would obey rather than show (control characters in a file's name) is written as an escape.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import typer

from vitfast.cli.signals import Stopping, exit_code, stopping

_OBEYED = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories of characters that move the cursor, start a sequence or end a line."""
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Answer:
    """What a command has to say: `json` with --json, else `text` (a string, lines, or a rich object).

    `remarks` are lines for stderr, either way. `stopping` knows which signals came.
    """

    def __init__(self, stopping: Stopping) -> None:
        self.json: Any = None
        self.text: Any = ""
        self.remarks: list[str] = []
        self.code = 0
        self.stopping = stopping


def escaped(text: str, allowed: str = "") -> str:
    """Text with everything that a terminal obeys as backslash escapes, but for the characters allowed."""

    def shown(c: str) -> bool:
        return c in allowed or (unicodedata.category(c) not in _OBEYED and c not in _BIDI)

    return "".join(c if shown(c) else c.encode("unicode_escape").decode() for c in text)


def write(stream: TextIO | None, text: str) -> OSError | None:
    """Write all of a text now; what keeps it from being written is returned, not raised. A lost stream stays silent."""
    if stream is None:  # closed before the command began
        return None
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        silence(stream)
        return error
    return None


def silence(stream: TextIO) -> None:
    """Send what a stream still holds nowhere, so that the interpreter does not try again when it ends."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor holds nothing back
        descriptor = stream.fileno()
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), descriptor)


class Unfailing(io.TextIOBase):
    """A stream that loses what cannot be written, instead of stopping whoever writes."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream behind it."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write, and flush."""
        write(self._stream, text)
        return len(text)

    def isatty(self) -> bool:
        """Whether the stream behind it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Of the stream behind it."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always."""
        return True


@contextlib.contextmanager
def command(context: typer.Context, as_json: bool) -> Iterator[Answer]:
    """Run a command's body; print its answer, or its error as one message, and exit with its code.

    What libraries print goes to stderr meanwhile, so that stdout holds the answer alone.
    """
    errors = Unfailing(sys.stderr)
    try:
        with stopping() as state, contextlib.redirect_stdout(errors), contextlib.redirect_stderr(errors):
            answer = Answer(state)
            yield answer
    except KeyboardInterrupt as error:
        fail("interrupted", exit_code(error), context.obj, as_json)
    except (ValueError, FileNotFoundError) as error:
        fail(_in_options(str(error), context), 2, context.obj, as_json)
    except Exception as error:  # whatever else goes wrong in there, the user gets a message
        fail(_in_options(f"{type(error).__name__}: {error}", context), 1, context.obj, as_json)
    for remark in answer.remarks:
        write(sys.stderr, f"{escaped(remark)}\n")
    problem = write(sys.stdout, json.dumps(answer.json, indent=2) + "\n" if as_json else _rendered(answer.text))
    if problem is not None and not isinstance(problem, BrokenPipeError):  # who closes a pipe has seen enough
        write(sys.stderr, f"vitfast: the answer cannot be written: {problem.strerror or problem}\n")
        raise typer.Exit(answer.code or 1)
    raise typer.Exit(answer.code)


def _in_options(message: str, context: typer.Context) -> str:
    """A library's message with the command's own flags in place of the arguments that they set."""
    for parameter in context.command.params:
        message = message.replace(f"{parameter.name}=True", parameter.opts[0])
    return message


def _rendered(text: Any) -> str:
    """Strings as they are (rich would take ":cat:" in a name for an emoji), rich objects for the terminal on stdout."""
    from rich.console import Console

    console, parts = Console(highlight=False), []
    for item in text if isinstance(text, list) else [text]:
        if isinstance(item, str):
            parts.append(escaped(item, "\n\t") + "\n")
        else:
            with console.capture() as capture:
                console.print(item)
            parts.append(capture.get())
    return "".join(parts)


def fail(message: str, code: int, debug: bool, as_json: bool) -> None:
    """Print an error as one message and exit; with `debug` the traceback, too."""
    if debug:
        write(sys.stderr, traceback.format_exc())
    write(sys.stderr, f"vitfast: {escaped(message, chr(10))}\n")
    if as_json:
        write(sys.stdout, json.dumps({"error": message}) + "\n")
    raise typer.Exit(code)


def run(app: Callable[[], Any]) -> Any:
    """Call the command line's app such that help and usage errors do not fail for want of an output either."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the caller: a file opened later would take its place and be printed into
            os.open(os.devnull, os.O_RDWR)
    try:
        return app()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            write(sys.stderr, f"vitfast: {error.strerror or error}\n")
        sys.exit(1)
    finally:
        for stream in (sys.stdout, sys.stderr):
            write(stream, "")
