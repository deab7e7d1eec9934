"""Trunk: the blocks of somebody's live Vision Transformer, run by the engine in the place of their own code.

The model keeps its own embedding, norms, pooling and heads, and all that it makes of the blocks' outputs: dataclasses,
hidden states, intermediate layers. A block runs its own code wherever the engine would not do the same: in training,
where gradients are wanted, with a mask, with hooks or patched methods inside it, where attention weights are recorded.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.engine.isolation import isolated
from vitfast.engine.runner import Runner
from vitfast.integrations.swap import original
from vitfast.models import vit
from vitfast.models.checkpoints import Checkpoint, live, load
from vitfast.models.config import ViTConfig
from vitfast.ops.registry import BackendError

IDLE = {"output_hidden_states", "return_dict"}
"""Arguments of a block that change nothing in it."""

PLACED = re.compile(r"rope|rot|position|rel_pos|relative|resolution|interpolate_pos|grid")
"""Arguments that tell a block where its tokens are, which the engine knows by the image's size."""

INSIDE = " inside it has"
"""In the reasons of blocks that somebody has changed from within."""

_CAPTURING = "transformers.utils.output_capturing"


class Trunk:
    """The blocks of one tower.

    Weights are read when a block first runs, and again when one has changed since: reloaded, moved, trained, replaced.
    A copy of the model, deep or pickled, has a trunk of its own, of the copy's weights.

    Args:
        tower: the module that `vitfast.load` takes. blocks: its blocks, in order.
        dtype: in which the blocks compute; by default that of autocast, or else the model's.
    """

    def __init__(
        self, tower: nn.Module, blocks: list[nn.Module], dtype: torch.dtype | None, native_only: bool = False
    ) -> None:
        self.tower, self.blocks, self.dtype = tower, blocks, dtype
        self.compared: list[tuple[Tensor, Tensor, Tensor]] | None = None
        """While the trunk is checked: input, own output and the engine's of each call of a block."""
        self.declined: list[str] = []
        """Why blocks ran their own code while the trunk was checked."""
        self.native_only = native_only
        """Whether the blocks' work depends on the size of images, and is the engine's at the model's own alone."""
        self.refusal = ""
        """Why a block has last run its own code; "" if none has."""
        self._forget()

    def _forget(self) -> None:
        self._seen: list[list[tuple[Any, ...]]] = []
        self._checkpoint: Checkpoint | None = None
        self._config: ViTConfig | None = None
        self._runners: dict[torch.dtype, Runner] = {}
        self._lock = threading.RLock()
        self._last = threading.local()
        self._warned, self._problem = False, ""

    def __getstate__(self) -> dict[str, Any]:
        names = ("tower", "blocks", "dtype", "native_only")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, index: int, block: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a block, of the engine's or of its own code."""
        own: Callable[..., Any] = original(block).forward
        self.refusal = self._why_not(index, block, x, args, kwargs)
        if self.refusal:
            if self.compared is not None:
                self.declined.append(self.refusal)
            return own(block, x, *args, **kwargs)
        if self.compared is None:
            return self._run(index, x)
        with torch.no_grad():
            expected = own(block, x, *args, **kwargs)
        self.compared.append((x, expected, self._run(index, x)))
        return expected

    @isolated
    def runner(self, device: torch.device) -> Runner:
        """What runs the blocks on tensors of a device, made when it is first asked for.

        Raises:
            ValueError, BackendError: if the tower's weights have become something that cannot be run.
        """
        autocast = torch.is_autocast_enabled(device.type)
        usual = torch.get_autocast_dtype(device.type) if autocast else next(self.blocks[0].parameters()).dtype
        dtype = self.dtype or usual
        with self._lock:
            if dtype not in self._runners:
                self._runners[dtype] = Runner(self.checkpoint(), device=device, dtype=dtype)
            return self._runners[dtype]

    @isolated
    def checkpoint(self) -> Checkpoint:
        """The tower's weights as they are now, or were when last read.

        Raises:
            CheckpointError: if `vitfast.load` would not take the tower.
        """
        with self._lock:
            if self._checkpoint is None:
                with live.own_code():  # blocks with hooks or patches inside run themselves; all else does anyway
                    self._checkpoint = load(self.tower)
                self._config = self._checkpoint.config
            return self._checkpoint

    def _why_not(self, index: int, block: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why a call of a block cannot be the engine's; "" if it can."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "torch.compile and torch.jit follow the model's own code"
        if index >= len(self.blocks) or self.blocks[index] is not block:
            return "a replica of the block"
        if block.training:
            return "the block is in training mode"
        if not isinstance(x, Tensor) or x.ndim != 3 or not x.numel() or not x.is_floating_point():
            return f"its input is no tensor [B, N, C] with rows but {_shown(x)}"
        for name, value in (*zip(_names(original(block)), args, strict=False), *kwargs.items()):
            idle = value is None or value is False or name in IDLE
            # A model without rotary or relative positions may tell its blocks the image's size, but no tensor of them.
            if not idle and not (PLACED.search(name) and (self.placed or _plain(value))):
                return f"it is called with {name} = {_shown(value)}"
        return self._look(index, block, x) or self._unready(x.device) or self._misplaced(x)

    @property
    def placed(self) -> bool:
        """Whether blocks do something that depends on where their tokens are."""
        config = self._config or self.checkpoint().config
        return bool(config.rope or config.relative_position or config.window)

    def _misplaced(self, x: Tensor) -> str:
        """Why it is not known where the tokens of a block's input are; "" if that is known or does not matter."""
        if not self.placed:
            return ""
        config, size = self._config or self.checkpoint().config, getattr(self._last, "size", None)
        if size is None:
            return "the size of its image is not known"
        if self.native_only and size != config.image_size:
            return f"its image is {size}, and positions are known to be the model's own at {config.image_size} only"
        try:
            tokens = config.tokens(size)
        except ValueError as error:
            return str(error)
        return "" if tokens == x.shape[1] else f"it has {x.shape[1]} tokens, of an image of {size} there are {tokens}"

    def follow(self) -> None:
        """Have the sizes of images noted where they are cut into patches, if the blocks' work depends on them.

        Raises:
            ValueError: if it does, and the patch embedding is not found.
        """
        if not self.placed:
            return
        weight = self.checkpoint().weights.get("patch_embed.weight")
        for part in self.tower.modules():
            if weight is None or not isinstance(part, nn.Conv2d) or part.weight.shape != weight.shape:
                continue
            if torch.equal(part.weight.detach().to("cpu", weight.dtype), weight):
                part.register_forward_pre_hook(_SizeNoted(self))
                return
        raise ValueError("its blocks depend on the size of images, and no convolution that cuts them was found")

    def note(self, images: Tensor) -> None:
        """The size of the images that the calls to come are about."""
        self._last.size = (images.shape[-2], images.shape[-1])

    def _unready(self, device: torch.device) -> str:
        """Why the engine cannot run the blocks with the weights that they have by now."""
        if not self._problem:
            try:
                self.runner(device)
            except (ValueError, BackendError) as error:
                self._problem = str(error)
                name = type(self.tower).__name__
                warnings.warn(f"{name} has changed, and its blocks run their own code now: {error}", stacklevel=5)
        return self._problem

    def _look(self, index: int, block: nn.Module, x: Tensor) -> str:
        """See whether a block is what it was; forget what was made of it if its weights are not."""
        if not self._seen:
            self._seen = [_inventory(b) for b in self.blocks]
        wanted = torch.is_grad_enabled() and x.requires_grad
        for holder, name, item, version, pointer in self._seen[index]:
            if holder.get(name) is not item:
                return self._changed(index, block, x)
            if version is None:  # a module
                if reason := _acting(item):
                    return reason
            elif item._version != version or item.data_ptr() != pointer:
                return self._changed(index, block, x)
            elif item.requires_grad and torch.is_grad_enabled():
                wanted = True
        if wanted:
            if not self._warned and self.compared is None:
                self._warned = True
                warnings.warn(
                    f"{type(self.tower).__name__}: gradients are enabled, so its blocks run their own code; "
                    "call it under torch.inference_mode() or torch.no_grad()",
                    stacklevel=4,
                )
            return "gradients are enabled"
        first = next(block.parameters())
        if x.device != first.device:
            return f"its input is on {x.device}, its weights on {first.device}"
        if x.dtype != first.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"its input is {x.dtype}, its weights {first.dtype}"
        return ""

    def _changed(self, index: int, block: nn.Module, x: Tensor) -> str:
        with self._lock:
            self._seen, self._checkpoint, self._runners = [_inventory(b) for b in self.blocks], None, {}
            self._problem = ""
        return self._look(index, block, x)

    @isolated
    def _run(self, index: int, x: Tensor) -> Tensor:
        runner = self.runner(x.device)
        plan, weights, last = runner.plan, runner.weights, getattr(self._last, "made", None)
        stats: Tensor | None = None
        if last is not None and last[0]() is x and last[1] == x._version and last[2].dtype == runner.dtype:
            inside, stats = last[2:]
        else:
            inside = x.to(runner.dtype).contiguous()
            stats = vit.first_stats(plan, inside)
        ends = index == len(self.blocks) - 1
        positions = runner.position(self._last.size) if self.placed else weights.positions
        place = positions.of_block(runner.config, index)
        made, stats = vit.run_block(runner.config, weights, index, inside, stats, plan, place)
        out = made.to(x.dtype)
        # Row statistics go from block to block, as long as the model hands on what it was given. The plan may ask for
        # none; then there is nothing to keep but what spares a conversion.
        keep = stats is not None or out is not made
        self._last.made = (weakref.ref(out), out._version, made, stats) if keep and not ends else None
        return out


def block_forward(block: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an accelerated block."""
    trunk, index = block._vitfast_trunk
    return trunk(index, block, x, args, kwargs)


class _SizeNoted:
    """A pre-hook of a patch embedding: a trunk notes the size of the images."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk

    def __call__(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        self.trunk.note(args[0])


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    """Of a block's arguments after its input."""
    return tuple(inspect.signature(kind.forward).parameters)[2:]  # type: ignore[attr-defined]


def _inventory(block: nn.Module) -> list[tuple[Any, ...]]:
    """(where it is kept, name, item, version, address) of each part, parameter and buffer of a block."""
    found: list[tuple[Any, ...]] = []
    for part in block.modules():
        found += [
            (part._modules, name, child, None, None) for name, child in part._modules.items() if child is not None
        ]
        for table in (part._parameters, part._buffers):
            found += [(table, n, t, t._version, t.data_ptr()) for n, t in table.items() if t is not None]
    return found


def _acting(part: nn.Module) -> str:
    """Why a part of a block has to run itself: a patched method, or a hook that is not idle."""
    if "forward" in part.__dict__:
        return f"{type(part).__name__}{INSIDE} a patched forward"
    for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
        if getattr(hook, "__module__", "") != _CAPTURING:
            return f"{type(part).__name__}{INSIDE} a forward hook"
        recorded = sys.modules[_CAPTURING]._active_collector.get() or {}
        if set(recorded) - {"hidden_states", "_hidden_states_layers"}:
            return f"what is inside it is recorded ({', '.join(recorded)})"
    return ""


def _plain(value: Any) -> bool:
    """Whether a value is numbers alone."""
    return isinstance(value, (bool, int, float)) or (isinstance(value, (tuple, list)) and all(map(_plain, value)))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
