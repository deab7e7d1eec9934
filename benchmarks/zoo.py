"""The zoo: models of other libraries, built small, every parameter perturbed, loaded and compared.

    python -m vitfast.benchmarks.zoo --write docs/zoo.md

A term that a translation drops shows only where it is not at its initial value: so all parameters are moved, and with
them the running statistics of batch norms. Depth is two blocks and the image a few patches where the library lets one
say so, heads are four of the model's width. A model counts as equal if tokens and outputs
differ by at most `TOLERANCE` of the largest value, in fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vitfast.benchmarks import zoo_transformers
from vitfast.benchmarks.zoo_transformers import TRANSFORMERS
from vitfast.engine.engine import Engine
from vitfast.models import checkpoints, libraries
from vitfast.ops.registry import BackendError

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest value."""

LARGEST = 512
"""Pixels along the side of an image; a model for larger ones that takes others is tried at that, and not square."""

TIMM_MODULES = {
    "vision_transformer": "ViT, CLIP, DINOv2, SigLIP, AIMv2",
    "deit": "DeiT",
    "eva": "EVA, EVA-02, DINOv3, PE",
    "beit": "BEiT",
    "vision_transformer_relpos": "ViT with relative position",
    "vision_transformer_hybrid": "ViT after a ResNet or conv stem",
    "vitamin": "ViTamin",
    "vision_transformer_sam": "SAM, ViTDet",
    "naflexvit": "NaFlex",
    "qwen3_vit": "Qwen3-VL",
    "gemma4_vit": "Gemma 4",
    "deepseek_vit": "DeepSeek",
    "hiera": "Hiera",
    "hieradet_sam2": "SAM 2",
}
"""Modules of timm that hold Vision Transformers -> what is in them."""

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model to try: how it is built, and what its library gives for images."""

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    outputs: Callable[[nn.Module, Tensor], Outputs]


@dataclass(frozen=True)
class Result:
    """What became of a model: "equal", "different", "refused" or "not built", its largest error, and the reason."""

    case: Case
    status: str
    error: float = 0.0
    reason: str = ""


def perturbed(model: nn.Module) -> nn.Module:
    """A model in evaluation mode with every parameter, and batch norms' statistics, off its initial value."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_meta:  # of a model that is refused by its class
                continue
            fan = parameter[0].numel() if parameter.ndim > 1 else 0
            parameter.add_(noise(parameter), alpha=0.5 * fan**-0.5 if fan else 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "std_bias")):
                buffer.add_(noise(buffer), alpha=0.1)
            elif name.endswith(("running_var", "std_scale")):
                buffer.mul_(1 + 0.2 * noise(buffer).abs())
    return model.eval()


def timm_cases(modules: Sequence[str] = tuple(TIMM_MODULES), small: bool = False) -> Iterator[Case]:
    """timm's models; `small`: only those narrower than 400 channels."""
    timm = libraries.import_library("timm")
    for module in modules:
        for name in timm.list_models(module=module):
            if not small or any(word in name for word in ("tiny", "small", "wee", "little", "pwee", "mediumd")):
                yield Case("timm", TIMM_MODULES[module], name, partial(_timm, name), _timm_outputs)


def _timm(name: str, create: Callable[..., Any] | None = None, **options: Any) -> nn.Module:
    """Two blocks, four heads, 4 by 6 patches, eleven classes; of what a model has no such arguments for, its own.

    Args:
        create: timm's create_model, where something stands in its place. options: of it.
    """
    create = create or libraries.import_library("timm").create_model
    options = {"num_classes": 11, **options}
    with torch.device("meta"):
        whole = create(name)
    inner = getattr(whole, "encoder", whole)
    patch = getattr(getattr(inner, "patch_embed", None), "patch_size", (0, 0))
    few: dict[str, Any] = {"img_size": (4 * patch[0], 6 * patch[1])} if min(patch) > 4 else {}
    first = next(iter(getattr(inner, "blocks", [])), None)
    if hasattr(first, "window_size"):
        few |= {"global_attn_indexes": (1,)}
    heads = getattr(getattr(first, "attn", first), "num_heads", 0)
    narrow = {"embed_dim": 4 * (inner.embed_dim // heads), "num_heads": 4} if heads > 4 else {}
    kv = {"num_kv_heads": (4, 2)} if len({getattr(b.attn, "num_kv_heads", 0) for b in getattr(whole, "blocks", [])
                                          if hasattr(b, "attn")}) > 1 else {}  # fmt: skip
    for arguments in (few | narrow | kv, few | narrow, few | kv, few, narrow, {}):
        with contextlib.suppress(TypeError, AssertionError, ValueError):
            return create(name, depth=2, **options, **arguments)
    return create(name, **options)


def _timm_outputs(model: Any, images: Tensor) -> Outputs:
    wanted = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if wanted and getattr(model.patch_embed, "strict_img_size", True):  # pixels that no whole patch is left for
        images = nn.functional.pad(images, (0, wanted[1] - images.shape[3], 0, wanted[0] - images.shape[2]))
    made = {"tokens": model.forward_features(images), "output": model(images)}
    inner = getattr(model, "encoder", model)
    joined = getattr(inner, "merger", None) or getattr(inner, "aligner", None)
    if joined or getattr(inner, "global_pool", "") == "soft":  # tokens joined are what an encoder gives
        made["neck"] = made.pop("output" if inner is model else "tokens")
    if hasattr(model, "neck"):
        made["neck"] = made.pop("tokens").flatten(2).mT
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, Tensor)}


def transformers_cases(names: Sequence[str] = tuple(TRANSFORMERS)) -> Iterator[Case]:
    """transformers' classes, two narrow blocks of each."""
    for name in names:
        kind = getattr(libraries.import_library("transformers"), name)
        family, build = kind.__module__.split(".")[2], partial(zoo_transformers.build, name)
        yield Case("transformers", family, name, build, zoo_transformers.outputs)


def torchvision_cases() -> Iterator[Case]:
    """torchvision's five Vision Transformers, and what its weights change of their sizes."""
    library = libraries.import_library("torchvision").models
    sizes = {
        "vit_b_16": (224, 384),
        "vit_b_32": (224,),
        "vit_l_16": (224, 512),
        "vit_l_32": (224,),
        "vit_h_14": (224, 518),
    }
    for name, images in sizes.items():
        for size in images:
            build = partial(_torchvision, library, name, size)
            yield Case("torchvision", "VisionTransformer", f"{name} at {size}", build, _torchvision_outputs)


def _torchvision(library: Any, name: str, size: int) -> nn.Module:
    dims = {"b": (768, 12, 3072), "l": (1024, 16, 4096), "h": (1280, 16, 5120)}
    width, heads, hidden = dims[name.split("_")[1]]
    patch = int(name.split("_")[2])
    return library.VisionTransformer(size, patch, 2, heads, width, hidden)


def _torchvision_outputs(model: Any, images: Tensor) -> Outputs:
    return {"output": model(images)}


def open_clip_cases() -> Iterator[Case]:
    """open_clip's models whose image tower is a Vision Transformer: not its ResNets, ConvNeXts, FastViTs and Swin."""
    library, timm = libraries.import_library("open_clip"), libraries.import_library("timm")
    known = {name for module in TIMM_MODULES for name in timm.list_models(module=module)}
    for name in library.list_models():
        config = library.get_model_config(name)
        tower, foreign = config["vision_cfg"].get("timm_model_name"), config["text_cfg"].get("hf_model_name")
        if tower in known or (not tower and isinstance(config["vision_cfg"]["layers"], int)):
            kind = "coca" if "multimodal_cfg" in config else "timm's image tower" if tower else "ViT"
            family = f"{kind}{', text tower of transformers left out' if foreign else ''}"
            outputs = partial(_open_clip_outputs, text=not foreign)
            yield Case("open_clip", family, name, partial(_open_clip, library, config), outputs)


def _open_clip(library: Any, config: Mapping[str, Any]) -> nn.Module:
    """Two blocks in each tower, two heads and four by four patches in an image tower of its own."""
    timm = libraries.import_library("timm")
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if not vision.get("timm_model_name"):
        width = 2 * vision.get("head_width", 64)
        vision |= {"layers": 2, "width": width, "image_size": 4 * vision["patch_size"]}
    small = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 99}
    text = small if text.get("hf_model_name") else text | small
    rest = {k: v for k, v in config.items() if k not in ("vision_cfg", "text_cfg", "custom_text", "multimodal_cfg")}
    kind = library.CustomTextCLIP if config.get("custom_text") else library.CLIP
    if decoder := config.get("multimodal_cfg"):
        kind, rest["multimodal_cfg"] = library.CoCa, decoder | {"layers": 1, "width": 32, "heads": 2}
    with mock.patch.object(timm, "create_model", partial(_timm, create=timm.create_model)):
        return kind(vision_cfg=vision, text_cfg=text, **rest)


def text_ids(model: Any) -> Tensor:
    """Two texts as numbers, for a model of open_clip's: a long one and one that ends early."""
    text = getattr(model, "text", model)
    length = text.context_length
    ids = torch.randint(3, 98, (2, length), generator=torch.Generator().manual_seed(2))
    eos = min(int(getattr(text, "eos_id", getattr(text, "text_eos_id", 98))), 98)
    ids[0, -2:], ids[1, length // 3], ids[1, length // 3 + 1 :] = 98, eos, 0
    return ids


def _open_clip_outputs(model: Any, images: Tensor, text: bool) -> Outputs:
    outputs = {"embedding": model.encode_image(images, normalize=False)}
    return outputs | ({"text": model.encode_text(text_ids(model), normalize=False)} if text else {})


def tried(case: Case) -> Result:
    """Build, perturb, load and compare one model."""
    torch.manual_seed(0)
    try:
        model = perturbed(case.build())
    except Exception as error:  # whatever a library raises where a model cannot be built so small
        return Result(case, "not built", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    try:
        checkpoint = checkpoints.load(model)
        engine = Engine(checkpoint, device="cpu", dtype="fp32", backend="torch")
    except (ValueError, BackendError) as error:
        return Result(case, "refused", reason=_short(str(error)))
    config = checkpoint.config
    size = config.image_size
    if max(size) > LARGEST and config.dynamic_size:
        unit = [patch * joined for patch, joined in zip(config.patch_size, config.neck_patches, strict=True)]
        size = (LARGEST // unit[0] * unit[0], LARGEST // 2 // unit[1] * unit[1])
    images = torch.randn(1, config.in_channels, *size, generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            expected = case.outputs(model, images)
    except Exception as error:  # the library's own, which then has nothing to compare with
        return Result(case, "different", float("inf"), f"{type(error).__name__}: {error}".splitlines()[0])
    made = engine(images)
    given = {"tokens": made.tokens, "embedding": made.embedding, "neck": made.neck}
    given["output"] = made.embedding if made.logits is None else made.logits
    given["patches"] = None if made.tokens is None else made.tokens[:, config.prefix_tokens :]
    if "text" in expected:
        given["text"] = engine.text(text_ids(model))
    errors = {name: _difference(given[name], tensor) for name, tensor in expected.items()}
    if not errors:
        return Result(case, "different", float("inf"), "nothing to compare with")
    worst = max(errors.values())
    told = ", ".join(f"{name} {share:.1e}" for name, share in errors.items())
    return Result(case, "equal" if worst <= TOLERANCE else "different", worst, "" if worst <= TOLERANCE else told)


def _difference(actual: Tensor | None, expected: Tensor) -> float:
    """The largest difference as a share of the largest value; infinite where sizes differ or NaNs are about."""
    if actual is None or actual.numel() != expected.numel():
        return float("inf")
    share = ((actual.reshape(expected.shape) - expected).abs().max() / expected.abs().max()).item()
    return share if share == share else float("inf")


def _short(message: str) -> str:
    """The part of a refusal that says what is missing."""
    line = message.splitlines()[0].partition(". Supported:")[0]
    return line if len(line) <= 160 else f"{line[:157]}..."


def report(results: Sequence[Result]) -> str:
    """docs/zoo.md."""
    lines = [
        "# The zoo",
        "",
        "Which models of other libraries run on the engine. Each is built small (two blocks, few patches where one can",
        "say so), every parameter perturbed so that a dropped term shows, loaded as a live module and compared with",
        f"its library in fp32 on the CPU: equal is within {TOLERANCE:g} of the largest value, tokens and output. Of a",
        "whole model of transformers it is the vision tower inside that is loaded and compared; of open_clip's, the",
        "text tower as well.",
        "",
        "    python -m vitfast.benchmarks.zoo --write docs/zoo.md",
        "",
    ]
    for library in dict.fromkeys(result.case.library for result in results):
        mine = [result for result in results if result.case.library == library]
        counts = Counter(result.status for result in mine)
        said = ", ".join(f"{counts[status]} {status}" for status in _STATUSES if counts[status])
        lines += [f"## {library}", "", f"{len(mine)} tried: {said}.", ""]
        lines += ["| family | tried | equal | refused | different | largest error |", "|---|---|---|---|---|---|"]
        families: dict[str, list[Result]] = defaultdict(list)
        for result in mine:
            families[result.case.family].append(result)
        for family, members in families.items():
            c = Counter(result.status for result in members)
            worst = max((result.error for result in members if result.status == "equal"), default=None)
            shown = "" if worst is None else f"{worst:.0e}"
            lines.append(f"| {family} | {len(members)} | {c['equal']} | {c['refused']} | {c['different']} | {shown} |")
        lines.append("")
        if library == "transformers":  # whose classes are few to a family, and known by name
            lines += [f"* equal: {', '.join(r.case.name for r in mine if r.status == 'equal')}"]
        reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
        for result in mine:
            if result.status != "equal":
                reasons[result.status, _without_name(result)].append(result.case.name)
        for (status, reason), names in sorted(reasons.items()):
            lines.append(f"* {status}: {', '.join(names)}: {reason}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


_STATUSES = ("equal", "refused", "different", "not built")


def _without_name(result: Result) -> str:
    """A reason without the model's name and place in it, so that like ones can be told together."""
    _, _, rest = result.reason.partition(": ")
    return rest if rest and result.case.name in result.reason.partition(": ")[0] else result.reason


def cases(only: Mapping[str, Callable[[], Iterator[Case]]] | None = None) -> Iterator[Case]:
    """All of them."""
    for made in (only or ALL).values():
        yield from made()


ALL: dict[str, Callable[[], Iterator[Case]]] = {
    "timm": timm_cases,
    "transformers": transformers_cases,
    "torchvision": torchvision_cases,
    "open_clip": open_clip_cases,
}


def main() -> None:
    """Try them, print what is not equal, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=tuple(ALL), action="append", help="by default all")
    parser.add_argument("--name", default="", help="only models whose names contain this")
    parser.add_argument("--write", type=Path, help="where to write the report")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    for case in cases({name: ALL[name] for name in options.library or ALL}):
        if options.name in case.name:
            results.append(tried(case))
            if results[-1].status != "equal":
                print(f"{case.name}: {results[-1].status}: {results[-1].reason}", flush=True)
    print(Counter((result.case.library, result.status) for result in results))
    if options.write:
        options.write.write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    main()
