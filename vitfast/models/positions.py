"""What a forward reads that depends on the size of its images: positions, of any kind, and windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.models.config import ViTConfig


@dataclass(frozen=True)
class Windows:
    """How the tokens of a grid are cut into windows, and put together again.

    Attributes:
        index: [windows * side * side], the token at each place of the windows; N, one past the last, where a patch is
            missing. back: [N], the place of each token. tokens: in a window.
    """

    index: Tensor
    back: Tensor
    tokens: int

    def cut(self, rows: Tensor, padding: Tensor | None) -> Tensor:
        """Rows [B, N, K] as windows [B * windows, T, K], with `padding` [K], or zeros, for patches that are missing."""
        if len(self.index) > len(self.back):
            last = rows.new_zeros(rows.shape[-1]) if padding is None else padding
            rows = torch.cat([rows, last.expand(len(rows), 1, -1)], dim=1)
        return rows[:, self.index].view(-1, self.tokens, rows.shape[-1])

    def join(self, rows: Tensor, batch: int) -> Tensor:
        """Windows [B * windows, T, K] as rows [B, N, K]."""
        return rows.view(batch, -1, rows.shape[-1])[:, self.back]


def windows_for(grid: tuple[int, int], side: int, device: torch.device) -> Windows:
    """Windows of `side` rows and columns, from the top left; the last ones may be short of patches."""
    (rows, columns), tokens = grid, grid[0] * grid[1]
    places = torch.full((-(-rows // side) * side, -(-columns // side) * side), tokens, device=device)
    places[:rows, :columns] = torch.arange(tokens, device=device).view(grid)
    index = places.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten()
    back = torch.empty(tokens + 1, dtype=torch.int64, device=device)
    back[index] = torch.arange(len(index), device=device)
    return Windows(index, back[:tokens].clone(), side * side)


@dataclass(frozen=True)
class Positions:
    """Positions of one image size.

    Attributes:
        grid: patches (rows, columns).
        embedding: [L, C] in the model's dtype, added to the patch embeddings; or None.
        cos, sin: fp32 [1, L, D], the same for all blocks and heads, or [blocks * H, L, D] of each; or None.
        bias: [S, H, N, N] in the model's dtype, added to the scores: S is 1, or one a block; or None.
    """

    grid: tuple[int, int]
    embedding: Tensor | None
    cos: Tensor | None = None
    sin: Tensor | None = None
    bias: Tensor | None = None
    windows: Windows | None = None

    def of_block(self, config: ViTConfig, block: int) -> dict[str, Any]:
        """What a block's attention is given of them, by the names of the op's backends."""
        options: dict[str, Any] = {}
        if self.cos is not None and self.sin is not None:
            own = slice(block * config.heads, (block + 1) * config.heads) if config.rope_learned else 0
            options |= {"cos": self.cos[own], "sin": self.sin[own], "interleaved": config.rope_interleaved}
        if self.bias is not None:
            shared = config.relative_position == "shared"
            options["bias"] = self.bias[:1] if shared else self.bias[block : block + 1]
        if self.windows is not None and block not in config.global_blocks:
            options["windows"] = self.windows
        return options


def positions_for(
    config: ViTConfig, exact: Mapping[str, Tensor], image_size: tuple[int, int], dtype: torch.dtype,
    device: torch.device,
) -> Positions:  # fmt: skip
    """Positions of images of (height, width), computed in fp32 at least and rounded once.

    Args:
        exact: those of "position", "position_rows", "position_columns", "rope" and "relative_position" that the model
            has, as `ViTConfig` describes them.

    Raises:
        ValueError: for more rows or columns than have a position embedding.
    """
    grid, native = config.grid(image_size), config.grid(config.image_size)
    embedding = bias = cos = sin = windows = None
    if "position" in exact:
        embedding = resize_position(
            exact["position"],
            native,
            grid,
            antialias=config.position_antialias,
            offset=config.position_offset,
            mode=config.position_interpolation,
            align_corners=config.position_align_corners,
            square=config.position_square,
        ).to(dtype)
    if any(config.position_sides):
        if any(side > most for side, most in zip(grid, config.position_sides, strict=True)):
            raise ValueError(f"a grid of {grid} patches, and positions for {config.position_sides}")
        rows, columns = exact["position_rows"][: grid[0]], exact["position_columns"][: grid[1]]
        embedding = (rows[:, None] + columns[None]).flatten(0, 1).to(dtype)
    if "rope" in exact:
        cos, sin = rotary_tables(config, exact["rope"], grid)
    if "relative_position" in exact:
        bias = relative_bias(exact["relative_position"], grid, class_token=config.class_token).to(dtype)
    if config.window:
        windows = windows_for(grid, config.window, device)
    return Positions(grid, embedding, cos, sin, bias, windows)


def resize_position(
    position: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    antialias: bool,
    offset: float = 0.0,
    mode: str = "bicubic",
    align_corners: bool = False,
    square: bool = False,
) -> Tensor:
    """Resample a position embedding [rows * columns, C] to another grid, in fp32; in its own dtype.

    Args:
        antialias: timm's convention if True; transformers' and the original DINOv2's if False.
        offset: added to the new grid's sides before the scale factor is formed, as the original
            DINOv2 does (0.1); 0 resizes to the exact size.
        mode, align_corners: as in torch's interpolate.
        square: resample to a square on the longer side, and take the part that the grid covers.
    """
    if old == new:
        return position
    grid = position.float().view(1, *old, -1).permute(0, 3, 1, 2)
    if offset:
        factor = ((new[0] + offset) / old[0], (new[1] + offset) / old[1])
        grid = F.interpolate(grid, scale_factor=factor, mode=mode, antialias=antialias)
    else:
        size = (max(new), max(new)) if square else new
        grid = F.interpolate(grid, size=size, mode=mode, antialias=antialias, align_corners=align_corners)
        grid = grid[:, :, : new[0], : new[1]]
    if tuple(grid.shape[2:]) != new:
        raise ValueError(f"position embedding {old} resized to {tuple(grid.shape[2:])}, expected {new}")
    return grid.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(position.dtype).contiguous()


def rotary_tables(config: ViTConfig, frequencies: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, L, D] fp32 of the angles that channels turn by, S = blocks * heads of `frequencies`."""
    frequencies = frequencies.flatten(0, 1).float()
    sides = [_coordinates(config, axis, side).to(frequencies.device) for axis, side in enumerate(grid)]
    rows, columns = (t.flatten()[:, None] for t in torch.meshgrid(*sides, indexing="ij"))
    angles = rows * frequencies[:, None, 0] + columns * frequencies[:, None, 1]
    angles = angles.repeat_interleave(2, dim=-1) if config.rope_interleaved else torch.cat((angles, angles), dim=-1)
    return angles.cos().contiguous(), angles.sin().contiguous()


def _coordinates(config: ViTConfig, axis: int, side: int) -> Tensor:
    """Coordinates of the patches along one side of the grid, as `ROPE_GRIDS` describes them."""
    if config.rope == "span":
        return torch.linspace(-1.0, 1.0, side)
    at = torch.arange(side, dtype=torch.float32) + config.rope_offset
    if config.rope == "centered":
        return 2 * (at + 0.5) / side - 1
    reference = config.rope_reference[axis]
    return at / side * reference if reference else at


def relative_bias(tables: Tensor, grid: tuple[int, int], *, class_token: bool) -> Tensor:
    """Biases [S, H, N, N] of all pairs of tokens, from tables [S, H, T] over their relative positions."""
    (rows, columns), device = grid, tables.device
    down, right = (torch.arange(side, device=device) for side in grid)
    down = (down[:, None] - down[None, :] + rows - 1)[:, None, :, None]
    right = (right[:, None] - right[None, :] + columns - 1)[None, :, None, :]
    index = (down * (2 * columns - 1) + right).reshape(rows * columns, rows * columns)
    if class_token:
        patches = (2 * rows - 1) * (2 * columns - 1)
        index = F.pad(index, (1, 0, 1, 0))
        index[0, :], index[:, 0], index[0, 0] = patches, patches + 1, patches + 2
    return tables[..., index]
