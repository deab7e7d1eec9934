"""`vitfast similar`, `duplicates`, `map` and `npy`: what is done with the folders that `vitfast embed` has written."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfast.cli.answer import command, escaped
from vitfast.cli.options import AllowPickle, Arch, Device, Json, WeightsKey, load_engine

if TYPE_CHECKING:
    import numpy as np

    from vitfast.pipeline.search import Index

app = typer.Typer(rich_markup_mode="markdown")

Folder = Annotated[str, typer.Argument(metavar="INDEX", help="Folder that `vitfast embed` has written.")]
Html = typer.Option("--html", metavar="FILE", help="Write a page with the pictures, too.")


class IndexKind(str, Enum):
    """What --index takes."""

    exact = "exact"
    hnsw = "hnsw"


class MapMethod(str, Enum):
    """What --method takes."""

    pca = "pca"
    umap = "umap"


@app.command(epilog="Example: `vitfast similar photos/cat.jpg embeddings/ --topk 5`")
def similar(
    context: typer.Context,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="An image file; with --text a sentence.")],
    index: Folder,
    text: Annotated[bool, typer.Option("--text", help="QUERY is a sentence: for models like CLIP and SigLIP.")] = False,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="Images to find.")] = 10,
    kind: Annotated[
        IndexKind,
        typer.Option("--index", help="hnsw: a graph that is kept in INDEX, made when it is first asked for (usearch)."),
    ] = IndexKind.exact,
    recall: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="With --index hnsw: share of the ten true neighbours to be found; more takes longer. [default: 0.97]",
        ),
    ] = None,
    page: Annotated[str | None, Html] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="What embeds QUERY. [default: the model noted in INDEX]")
    ] = None,
    device: Device = None,
    allow_pickle: AllowPickle = False,
    weights_key: WeightsKey = None,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Find the images most similar to one, or to a sentence; similarity is the cosine, -1 to 1.

    An image that is in INDEX needs no model, and is not found itself. Any other is embedded as those in INDEX were;
    another model, dtype or version is refused. The search is exact, but with --index hnsw, whose recall is printed.
    """
    with command(context, as_json) as answer:
        from vitfast.images.files import path_text
        from vitfast.pipeline.search import Index

        if recall is not None and kind is not IndexKind.hnsw:
            raise ValueError("--recall goes with --index hnsw")
        searched = Index(index)
        searcher: Any = searched
        answer.json = {"index": path_text(index), "model": searched.model, "images": len(searched)}
        remark = f"{topk} most similar of {len(searched)} images"
        if kind is IndexKind.hnsw:
            from vitfast.pipeline.hnsw import NEIGHBOURS, RECALL, Graph

            searcher = graph = Graph.of(searched, RECALL if recall is None else recall)
            answer.json |= {"recall": round(graph.recall, 4), "expansion": graph.expansion, "built": graph.built}
            remark += f" by HNSW: recall@{NEIGHBOURS} {graph.recall:.3f} against exact search"
        key = query if text else path_text(os.path.abspath(query))
        vector = None if text else searcher.vector_of(key)
        if vector is None:
            options = {"allow_pickle": allow_pickle, "weights_key": weights_key, "arch": arch, "device": device}
            vector = _embedded(searched, query, text, model, options)
        matches = searcher.search(vector, topk, without=None if text else key)
        answer.json |= {
            "query": key,
            "matches": [{"path": match.path, "similarity": round(match.similarity, 6)} for match in matches],
        }
        answer.text = [f"{match.similarity:7.4f}  {escaped(match.path)}" for match in matches]
        if kind is IndexKind.hnsw:
            answer.remarks = [remark]
        if page is not None:
            from vitfast.pipeline.by_key import thumbnails
            from vitfast.pipeline.pages import contact_sheet

            pictures = thumbnails([match.path for match in matches] + ([] if text else [key]), exif_orientation=True)
            Path(page).write_text(contact_sheet(key, remark, matches, pictures), encoding="utf-8")
            answer.json["html"] = path_text(page)


def _embedded(index: Index, query: str, text: bool, model: str | None, options: dict[str, Any]) -> np.ndarray:
    """The vector of a sentence, or of an image that the folder does not have, by the model that the folder is of."""
    from vitfast.images.files import InputError, path_text
    from vitfast.pipeline.embed import OK, embed_images

    if not text and not os.path.lexists(query):
        raise InputError(f"no such file: {path_text(query)!r} (a sentence needs --text)")
    dtype = index.identity.dtype.partition(" ")[0] if index.identity else None
    draft = index.identity is not None and index.identity.preprocess.get("draft")
    preprocess = {"draft": True} if draft else None
    engine = load_engine(model or index.model, dtype=dtype, preprocess=preprocess, **options)
    index.check(engine)
    if text:
        return engine.text([query])[0].float().cpu().numpy()
    result = next(embed_images(engine, [query]))
    if result.status != OK or result.embedding is None:
        raise InputError(f"{path_text(query)!r} cannot be embedded: {result.status}")
    return result.embedding


@app.command(epilog="Example: `vitfast duplicates embeddings/ --above 0.98`")
def duplicates(
    context: typer.Context,
    index: Folder,
    above: Annotated[float, typer.Option(min=-1, max=1, help="The cosine from which two images are alike.")] = 0.98,
    page: Annotated[str | None, Html] = None,
    as_json: Json = False,
) -> None:
    """List groups of images that are alike. All pairs are compared."""
    with command(context, as_json) as answer:
        from vitfast.images.files import path_text
        from vitfast.pipeline.search import Index

        searched = Index(index)
        groups = searched.duplicates(above)
        answer.json = {
            "index": path_text(index),
            "images": len(searched),
            "above": above,
            "groups": [[{"path": m.path, "similarity": round(m.similarity, 6)} for m in group] for group in groups],
        }
        lines = []
        for first, *others in groups:
            lines.append(escaped(first.path))
            lines += [f"  {match.similarity:.4f}  {escaped(match.path)}" for match in others]
        answer.text = [*lines, f"{len(groups)} groups of images alike among {len(searched)}"]
        if page is not None:
            from vitfast.pipeline.by_key import thumbnails
            from vitfast.pipeline.pages import GROUPS_SHOWN, OF_A_GROUP, groups_page

            shown = [match.path for group in groups[:GROUPS_SHOWN] for match in group[:OF_A_GROUP]]
            title = f"Images alike in {path_text(index)}, from a cosine of {above:g}"
            Path(page).write_text(groups_page(title, groups, thumbnails(shown)), encoding="utf-8")
            answer.json["html"] = path_text(page)


@app.command("map", epilog="Example: `vitfast map embeddings/ --html map.html --color label`")
def map_(
    context: typer.Context,
    index: Folder,
    page: Annotated[str, typer.Option("--html", metavar="FILE", help="The page to write.")],
    method: Annotated[MapMethod, typer.Option(help="umap needs the package umap-learn.")] = MapMethod.pca,
    color: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of INDEX to colour points by.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Images on the page, chosen at random if there are more.")] = 5000,
    pictures: Annotated[int, typer.Option(min=0, help="Of these so many with a picture.")] = 1000,
    as_json: Json = False,
) -> None:
    """Write a page with a map of all images: what is alike lies close together."""
    with command(context, as_json) as answer:
        from vitfast.images.files import path_text
        from vitfast.pipeline import mapping

        made = mapping.make(index, method.value, color=color, most=most, pictures=pictures)
        Path(page).write_text(made.page, encoding="utf-8")
        answer.json = {"index": path_text(index), "html": path_text(page), "method": method.value, **made.counts}
        answer.text = [f"{made.remark} -> {escaped(path_text(page))}"]


@app.command(epilog="Example: `vitfast npy embeddings/ vectors.npy`")
def npy(
    context: typer.Context,
    index: Folder,
    out: Annotated[str, typer.Argument(metavar="FILE", help="The vectors, .npy; their keys go beside it, .keys.json.")],
    as_json: Json = False,
) -> None:
    """Write the vectors of INDEX as one array [rows, numbers], and the images' keys in that order as a JSON list."""
    with command(context, as_json) as answer:
        from vitfast.images.files import path_text
        from vitfast.pipeline.reading import write_npy

        keys, rows = write_npy(index, out)
        answer.json = {"vectors": path_text(out), "keys": path_text(keys), "rows": rows}
        answer.text = f"{rows} vectors -> {escaped(path_text(out))}, keys -> {escaped(path_text(keys))}"
