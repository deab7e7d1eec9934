"""`python -m vitfast` is the `vitfast` command."""

from vitfast.cli.app import app

app(prog_name="vitfast")
