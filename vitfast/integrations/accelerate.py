"""`accelerate`: a live model, run by the engine behind its own interface."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.engine.dtypes import resolve_device, resolve_dtype
from vitfast.integrations import replace_attention
from vitfast.integrations.swap import Swap, original
from vitfast.integrations.trunk import INSIDE, Trunk, block_forward
from vitfast.models.checkpoints import CheckpointError, live, loadable
from vitfast.models.config import ViTConfig
from vitfast.ops import accuracy
from vitfast.ops.registry import BackendError

_SWAPS: weakref.WeakKeyDictionary[nn.Module, Swap] = weakref.WeakKeyDictionary()
"""Models of which the attention alone was replaced."""

_ULPS = 4
"""What two residual sums of a block may be apart for having been rounded in another order, in ulps of the largest."""


def accelerate(
    model: nn.Module,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    strict: bool = False,
) -> nn.Module:
    """Run a live model's transformer blocks on the engine; its calls and outputs stay what they are.

        model = vitfast.accelerate(model)
        with torch.inference_mode():
            outputs = model(pixel_values)

    Blocks are found by what the model is made of: in a model that `vitfast.load` takes, or in a part of one, like the
    vision tower of a CLIP or of a multimodal model. Each runs on random images, beside its own code, before anything
    is said to work. Where no blocks can run on the engine (hierarchical models, unknown families), attention alone
    is replaced, as `replace_attention` does, with a warning that says why.

    The model is changed in place, but not its parameters and state dict: weights may be loaded, moved and trained as
    before, and are read anew after a change. Copies, deep or pickled, are accelerated too. In training mode, where
    gradients are wanted, with masks, and with hooks inside the blocks, the blocks run their own code.

    Args:
        model: of timm, transformers or torchvision, or a module that has one inside.
        dtype: in which the blocks compute: "fp32", "fp16", "bf16" or a torch dtype; by default autocast's where that is
            on, else the model's. Inputs and outputs keep the model's dtype.
        device: where the model is moved first; by default it stays where it is.
        strict: raise where the blocks cannot run on the engine; the model is then unchanged.

    Returns:
        `model`.

    Raises:
        ValueError: if `model` is no module, the dtype or device does not fit; or, with every reason, if nothing in the
            model can be replaced (with `strict`: if no blocks can).
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    computed = None if dtype is None else resolve_dtype(dtype, torch.device("cpu"))
    restore(model)
    if device is not None:
        model.to(resolve_device(device))
    refused: dict[str, str] = {}
    found = 0
    for path, tower in _towers(model):
        name = f"{path} ({type(tower).__name__})" if path else type(tower).__name__
        try:
            _accelerate(tower, computed)
            found += 1
        except (ValueError, BackendError, _Refused) as error:
            refused[name] = str(error)
    if not found and not refused:
        refused[type(model).__name__] = _reason(model)
    listed = "\n  ".join(f"{name}: {why}" for name, why in refused.items())
    if refused and strict:
        restore(model)
        raise ValueError(f"not accelerated:\n  {listed}")
    if found and refused:
        warnings.warn(f"these parts are not accelerated and run as they are:\n  {listed}", stacklevel=2)
    if not found:
        swap = replace_attention(model)
        if not swap.replaced:
            left = "".join(f"\n  {name or 'the model'}: {why}" for name, why in swap.left.items())
            raise ValueError(f"nothing in this model can be accelerated:\n  {listed}{left}")
        _SWAPS[model] = swap
        warnings.warn(
            f"only attention is replaced ({len(swap.replaced)} modules, {len(swap.left)} left), for the blocks cannot "
            f"run on the engine:\n  {listed}",
            stacklevel=2,
        )
    return model


def restore(model: nn.Module) -> None:
    """Give a model its own blocks and attention back; nothing happens to one that was not accelerated."""
    trunks = {id(trunk): trunk for part in model.modules() if (trunk := _trunk(part)) is not None}
    for trunk in trunks.values():
        for block in trunk.blocks:
            block.__class__ = original(block)
        _forget(model, trunk)
    if (swap := _SWAPS.pop(model, None)) is not None:
        swap.restore()


def accelerated(model: nn.Module) -> dict[str, Trunk]:
    """The trunks in a model, by the name of the part that each belongs to ("" for the model itself)."""
    names = {id(part): name for name, part in model.named_modules()}
    trunks = {id(t): t for part in model.modules() if (t := _trunk(part)) is not None}
    return {names.get(id(trunk.tower), type(trunk.tower).__name__): trunk for trunk in trunks.values()}


class _Refused(Exception):
    """Why a tower that can be loaded is not accelerated."""


def _trunk(part: nn.Module) -> Trunk | None:
    held = part.__dict__.get("_vitfast_trunk")
    return held[0] if held else None


def _towers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what can be loaded, the innermost where one holds another."""
    with live.own_code():
        model = live.unwrap(model)
    found = [(path, part) for path, part in model.named_modules() if loadable(part)]
    for path, part in found:
        lead = f"{path}." if path else ""
        if not any(other != path and other.startswith(lead) for other, _ in found):
            yield path, part


def _reason(model: nn.Module) -> str:
    from vitfast.models.checkpoints import load

    try:
        load(model)
    except CheckpointError as error:
        return str(error)
    return "no part of it is a model that vitfast.load takes"


def _accelerate(tower: nn.Module, dtype: torch.dtype | None) -> None:
    """Put the engine under the blocks of a tower; or raise, and leave it as it is."""
    training = [part for part in tower.modules() if part.training]
    tower.eval()
    try:
        trunk = Trunk(tower, [], dtype)
        checkpoint = trunk.checkpoint()
        trunk.blocks = _blocks(tower, checkpoint.config.depth, checkpoint.weights)
        first = next(trunk.blocks[0].parameters())
        runner = trunk.runner(first.device)
        config = runner.config
        trunk.follow()
        swap = Swap()
        try:
            own = {config.image_size: _outputs(tower, _images(config, config.image_size, first))}
            if trunk.placed and config.dynamic_size:
                own |= _other_size(tower, config, first)
            for i, block in enumerate(trunk.blocks):
                block._vitfast_trunk = (trunk, i)  # type: ignore[assignment]
                swap.replace(str(i), block, block_forward)
            for size, before in own.items():
                try:
                    _check(trunk, before, _images(config, size, first), runner.dtype)
                except _Refused:
                    if size == config.image_size:
                        raise
                    trunk.native_only = True
        except BaseException:
            swap.restore()
            _forget(tower, trunk)
            raise
    finally:
        for part in training:
            part.training = True


def _forget(model: nn.Module, trunk: Trunk) -> None:
    """Take what belongs to a trunk out of its model, but for the blocks' class."""
    for part in model.modules():
        if _trunk(part) is trunk:
            del part.__dict__["_vitfast_trunk"]
        for key, hook in list(part._forward_pre_hooks.items()):
            if getattr(hook, "trunk", None) is trunk:
                del part._forward_pre_hooks[key]


def _other_size(tower: nn.Module, config: ViTConfig, like: Tensor) -> dict[tuple[int, int], dict[str, Tensor]]:
    """What a tower gives of images of another size than its own; nothing if it does not take them."""
    (height, width), patch = config.image_size, config.patch_size
    size = (height + patch[0], width + 2 * patch[1])
    try:
        return {size: _outputs(tower, _images(config, size, like))}
    except _Refused:
        return {}


def _images(config: ViTConfig, size: tuple[int, int], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, config.in_channels, *size, generator=generator).to(like.device, like.dtype)


def _check(trunk: Trunk, before: dict[str, Tensor], images: Tensor, dtype: torch.dtype) -> None:
    """Compare a tower, and each of its blocks, with its own code on some images."""
    trunk.compared, trunk.declined = [], []
    try:
        _outputs(trunk.tower, images)
        _check_blocks(trunk, dtype)
    finally:
        trunk.compared = None
    _check_outputs(before, _outputs(trunk.tower, images), dtype)


def _blocks(tower: nn.Module, depth: int, weights: Mapping[str, Tensor]) -> list[nn.Module]:
    """The modules in whose parameters the weights of blocks 0 to depth - 1 are found."""

    def holds(block: nn.Module, i: int) -> bool:
        for name in ("fc2", "fc1", "proj", "qkv", "norm1"):  # those that a family keeps in parts are in none
            wanted = weights[f"blocks.{i}.{name}.weight"]
            same = (p for p in block.parameters() if p.shape == wanted.shape)
            if any(torch.equal(p.detach().to("cpu", wanted.dtype), wanted) for p in same):
                return True
        return False

    for part in tower.modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) == depth:
            blocks = list(part)
            if all(holds(block, i) for i, block in enumerate(blocks)):
                return blocks
    raise _Refused(f"its {depth} blocks do not stand in one ModuleList or Sequential")


@torch.no_grad()
def _outputs(tower: nn.Module, images: Tensor) -> dict[str, Tensor]:
    try:
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices):  # a masked autoencoder shuffles its tokens, each time in the same way here
            torch.manual_seed(0)
            return dict(_leaves("output", tower(images)))
    except Exception as error:  # a model that takes something else than images may raise anything
        raise _Refused(f"it cannot be tried on images {list(images.shape)}: {type(error).__name__}: {error}") from error


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(f"{name}[{i}]", item)


def _check_blocks(trunk: Trunk, dtype: torch.dtype) -> None:
    """Compare each block with its own code by what it adds to its input, so that a small LayerScale hides nothing."""
    compared = trunk.compared or []
    changed = [reason for reason in trunk.declined if INSIDE in reason]
    if not compared or len(compared) + len(changed) != len(trunk.blocks):
        raise _Refused(
            f"{len(compared)} of its {len(trunk.blocks)} blocks could be tried: {trunk.refusal or 'not run'}"
        )
    bound = accuracy.MODEL_TOLERANCES[dtype].error
    ulp = accuracy.TOLERANCES[dtype].ulp
    for i, (x, expected, got) in enumerate(compared):
        if type(expected) is not Tensor or (expected.shape, expected.dtype) != (got.shape, got.dtype):
            raise _Refused(f"block {i} gives {type(expected).__name__}, not a tensor of its input's shape and dtype")
        added = (expected.float() - x.float()).abs().max().item()
        allowed = bound * added + _ULPS * ulp * expected.float().abs().max().item()
        error = (got.float() - expected.float()).abs().max().item()
        if not error <= allowed:
            raise _Refused(f"block {i} differs from its own code by {error:.3g}, more than {allowed:.3g} ({dtype})")


def _check_outputs(before: dict[str, Tensor], after: dict[str, Tensor], dtype: torch.dtype) -> None:
    bound = accuracy.MODEL_TOLERANCES[dtype].error
    for name, expected in before.items():
        got = after[name]
        if (expected.shape, expected.dtype) != (got.shape, got.dtype):
            raise _Refused(
                f"{name} would be {got.dtype} {list(got.shape)}, not {expected.dtype} {list(expected.shape)}"
            )
        error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
        allowed = bound * expected.double().abs().max().item() if got.numel() else 0.0
        if not error <= allowed:
            raise _Refused(f"{name} differs by {error:.3g}, more than {allowed:.3g} ({dtype})")
