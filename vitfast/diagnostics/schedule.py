"""Two consumer warpgroups, one producer and the tensor cores of a multiprocessor: a model of schedules, step by step.

The producer fills a ring of stages: a copy comes LATENCY clocks after its stage was given back, and copies follow
each other at a multiprocessor's share of L2's rate. Tensor cores take one warpgroup's products of a step at a time, as
they are asked for. Where two epilogues overlap, each waits for the other's issue slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitfast.diagnostics.code_times import l2_bytes_per_clock

L2_SHARE = l2_bytes_per_clock((9, 0)) / 132
"""Bytes a clock that a multiprocessor of an H100 gets of L2, if all ask."""
LATENCY = 700
"""Clocks from a stage's release to its next contents: L2, mbarriers and the way through TMA. An assumption."""


@dataclass(frozen=True)
class Schedule:
    """Which tiles are whose.

    `rows`, `columns`: of the sums that a warpgroup holds. `together`: both take every stage, each its rows of one tile;
    else tiles and stages are theirs in turn (ping-pong). `x_shared`, `weight_shared`: blocks that share a copy.
    """

    rows: int
    columns: int
    together: bool
    stages: int
    x_shared: int = 1
    weight_shared: int = 1
    depth: int = 64

    @property
    def step_clocks(self) -> float:
        """Of a warpgroup's products of a step: 4096 FLOP a clock."""
        return 2 * self.rows * self.columns * self.depth / 4096

    @property
    def step_bytes(self) -> float:
        """Of a stage, as far as L2 has to give them for this block."""
        rows = self.rows * (2 if self.together else 1)
        return 2 * self.depth * (rows / self.x_shared + self.columns / self.weight_shared)

    def takers(self, step: int, steps: int) -> tuple[int, ...]:
        """The warpgroups that multiply a stage's contents."""
        return (0, 1) if self.together else (step // steps % 2,)


def tensor_busy(schedule: Schedule, *, steps: int, epilogue: float, tiles: int = 12) -> float:
    """The share of the clocks, after the first two tiles, in which tensor cores multiply.

    Args:
        steps: of a tile. epilogue: clocks of one warpgroup's, alone.
    """
    total = tiles * steps
    arrived: list[float] = []
    released = [[0.0] * total for _ in range(2)]
    ready, at = [0.0, 0.0], [0, 0 if schedule.together else steps]
    last_epilogue = [(0.0, 0.0), (0.0, 0.0)]
    copy_free = tensor_free = busy = began = 0.0

    def copy_comes(step: int) -> bool:
        """Whether the stage of a step is, or will be, full by what has happened so far."""
        nonlocal copy_free
        while len(arrived) <= step:
            before = len(arrived) - schedule.stages
            takers = schedule.takers(before, steps) if before >= 0 else ()
            if any(at[group] <= before for group in takers):
                return False
            free = max((released[group][before] for group in takers), default=0.0)
            copy_free = max(copy_free, free) + schedule.step_bytes / L2_SHARE
            arrived.append(max(copy_free, free + LATENCY))
        return True

    while min(at) < total:
        able = [group for group in range(2) if at[group] < total and copy_comes(at[group])]
        start, group = min((max(ready[group], arrived[at[group]]), group) for group in able)
        step = at[group]
        start = max(start, tensor_free)
        tensor_free = released[group][step] = end = start + schedule.step_clocks
        if step >= 2 * steps:
            began = began or start
            busy += schedule.step_clocks
        at[group], ready[group] = (
            step + 1,
            start + schedule.step_clocks / 2,
        )  # the next products are asked for meanwhile
        if (step + 1) % steps == 0:
            other_start, other_end = last_epilogue[1 - group]
            both = max(0.0, min(end + epilogue, other_end) - max(end, other_start))
            last_epilogue[group] = (end, end + epilogue + both)
            ready[group] = end + epilogue + both
            at[group] += 0 if schedule.together else steps
    return busy / (tensor_free - began)
