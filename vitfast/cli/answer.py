"""How a command answers: text or JSON on stdout, errors as one message, an exit code."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import typer


class Answer:
    """What a command has to say: `json` with --json, else `text` (a string, lines, or a rich object)."""

    json: Any = None
    text: Any = ""
    code: int = 0


@contextlib.contextmanager
def command(context: typer.Context, as_json: bool) -> Iterator[Answer]:
    """Run a command's body; print its answer, or its error as one message, and exit with its code.

    What libraries print goes to stderr meanwhile, so that stdout holds the answer alone.
    """
    answer = Answer()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield answer
    except KeyboardInterrupt:
        fail("interrupted", 130, context.obj, as_json)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error), 2, context.obj, as_json)
    except Exception as error:  # whatever else goes wrong in there, the user gets a message
        fail(f"{type(error).__name__}: {error}", 1, context.obj, as_json)
    if as_json:
        typer.echo(json.dumps(answer.json, indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for item in answer.text if isinstance(answer.text, list) else [answer.text]:
            console.print(item, markup=False, soft_wrap=isinstance(item, str))
    raise typer.Exit(answer.code)


def fail(message: str, code: int, debug: bool, as_json: bool) -> None:
    """Print an error as one message and exit; with `debug` the traceback, too."""
    if debug:
        traceback.print_exc(file=sys.stderr)
    typer.echo(f"vitfast: {message}", err=True)
    if as_json:
        typer.echo(json.dumps({"error": message}))
    raise typer.Exit(code)
