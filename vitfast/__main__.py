"""`python -m vitfast` is the `vitfast` command."""

from vitfast.cli import app

app(prog_name="vitfast")
