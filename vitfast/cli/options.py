"""Options that several commands take: how they are typed, and what they mean to the functions behind."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer


def dtype_name(text: str) -> str:
    """What --dtype takes, by its short name.

    Raises:
        typer.BadParameter: for anything else.
    """
    from vitfast.engine import dtypes

    try:
        return dtypes.dtype_name(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def numbers(text: str) -> list[float]:
    """What --mean and --std take: a number, or one a channel.

    Raises:
        ValueError: for anything else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected a number, or one for each channel like 0.5,0.4,0.3; got {text!r}") from None


def side(text: str) -> int | tuple[int, int]:
    """What --size and --crop take: a side, or height and width.

    Raises:
        ValueError: for anything else.
    """
    try:
        sides = [int(part) for part in text.lower().split("x")]
        return sides[0] if len(sides) == 1 else (sides[0], sides[1])
    except (ValueError, IndexError):
        raise ValueError(f"expected pixels like 256, or height and width like 224x336; got {text!r}") from None


class BackendName(str, Enum):
    """What --backend takes."""

    auto = "auto"
    torch = "torch"
    triton = "triton"
    native = "native"


class OutputDtypeName(str, Enum):
    """What --output-dtype takes."""

    float32 = "float32"
    float16 = "float16"


Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SRC", help="Image files, folders, quoted glob patterns; archives, lists, tables, videos; URLs."
    ),
]
Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, model directory or weight file.")]
WeightsKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", help="Which weights of a training checkpoint, e.g. state_dict. [default: averaged ones first]"
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Architecture of a bare weight file: vit_base_patch16_224, vit_b_16, dinov2_vits14, ViT-B/32.",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(metavar="M[,M,M]", help="Subtracted from pixels of 0 to 1. [default: what the model says, as below]"),
]
Std = Annotated[str | None, typer.Option(metavar="S[,S,S]", help="What they are then divided by.")]
Size = Annotated[
    str | None, typer.Option(metavar="N|HxW", help="Images are resized to this shortest side, or exactly to HxW.")
]
Crop = Annotated[str | None, typer.Option(metavar="N|HxW", help="The centre that is then cut out.")]
Draft = Annotated[
    bool,
    typer.Option(
        "--draft", help="Decode JPEGs that shrink much at 1/2, 1/4 or 1/8 of their size: faster, no longer bit for bit."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per run of the model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: the GPU if there is one]")]
Devices = Annotated[
    str | None,
    typer.Option(metavar="N,N", help="One process on each of these GPUs, e.g. 0,1,2,3; or cpu,cpu."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        parser=dtype_name,
        metavar="[fp32|fp16|bf16|fp8|int8]",
        help="What to compute in; float32 and its like mean the same. [default: bf16 on a GPU, else fp32]",
    ),
]
OutputDtype = Annotated[OutputDtypeName, typer.Option(help="Of the vectors as they are written.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin, .pth, .pt and .ckpt files, too: their tensors, no code.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Decoding threads. [default: one per CPU core]")]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1, help="Largest picture to decode; a larger JPEG is decoded at a part of its size. [default: 89 million]"
    ),
]
DecodeMemory = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="MIB", help="Memory for decoding, all threads together. [default: a quarter, 4096 at most]"
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Carry along: columns of tables, fields of a WebDataset sample's .json."),
]
ImageColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of tables that has the images. [default: one with a usual name]"),
]
Fps = Annotated[float, typer.Option("--fps", help="Of videos, frames a second.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def load_options(
    device: str | None,
    dtype: str | None,
    allow_pickle: bool,
    weights_key: str | None,
    arch: str | None,
    preprocess: dict[str, Any] | None,
) -> dict[str, Any]:
    """The options of a command as `vitfast.load` takes them."""
    return {
        "device": device,
        "dtype": dtype,
        "allow_pickle": allow_pickle,
        "weights_key": weights_key,
        "model": arch,
        "preprocess": preprocess,
    }


def load_engine(
    model: str,
    device: str | None,
    dtype: str | None,
    allow_pickle: bool,
    weights_key: str | None,
    arch: str | None,
    preprocess: dict[str, Any] | None,
) -> Any:
    """`vitfast.load` with the options of a command."""
    from vitfast.engine.load import load

    return load(model, **load_options(device, dtype, allow_pickle, weights_key, arch, preprocess))


def prepared(
    mean: str | None, std: str | None, size: str | None, crop: str | None, draft: bool = False
) -> dict[str, Any] | None:
    """The options as `vitfast.load` takes them."""
    parsed: dict[str, Any] = {
        **{name: numbers(text) for name, text in (("mean", mean), ("std", std)) if text is not None},
        **{name: side(text) for name, text in (("size", size), ("crop", crop)) if text is not None},
        **({"draft": True} if draft else {}),
    }
    return parsed or None


def decode_options(max_pixels: int | None, decode_memory: int | None) -> dict[str, Any]:
    """The options as `embed_images` takes them; Pillow's own limit, which some of its decoders look at, goes along."""
    if max_pixels is not None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = max_pixels
    return {"max_pixels": max_pixels, "decode_memory": None if decode_memory is None else decode_memory << 20}
