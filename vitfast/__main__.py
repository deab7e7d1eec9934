"""`python -m vitfast` is the `vitfast` command."""

from vitfast.cli.app import app

if __name__ == "__main__":  # not so in the processes of `vitfast serve --workers`, which import this file
    app(prog_name="vitfast")
