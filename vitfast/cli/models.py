"""`vitfast models`: what can be loaded, and what cannot and why."""

from __future__ import annotations

from typing import Annotated

import typer

from vitfast.cli.answer import command
from vitfast.cli.options import Json

app = typer.Typer(rich_markup_mode="markdown")


@app.command(epilog="Example: `vitfast models siglip`")
def models(
    context: typer.Context,
    word: Annotated[str, typer.Argument(metavar="[WORD]", help="Only classes whose names contain this.")] = "",
    as_json: Json = False,
) -> None:
    """List the classes of other libraries that can be loaded, and those that are refused, with the reason.

    Of timm a class stands for all its models: `timm.list_models()` names them. docs/zoo.md says which were compared.
    """
    with command(context, as_json) as answer:
        from vitfast.models import checkpoints

        rows = [row for row in checkpoints.known() if word.lower() in row["class"].lower()]
        if not rows:
            raise ValueError(f"no class that is known has {word!r} in its name")
        answer.json = rows
        width = max(len(row["class"]) for row in rows)
        for library in dict.fromkeys(row["library"] for row in rows):
            answer.text = [
                *(answer.text or []),
                library,
                *(
                    f"  {row['class']:{width}}  {row['refused'] or 'loads'}"
                    for row in rows
                    if row["library"] == library
                ),
            ]
