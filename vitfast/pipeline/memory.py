"""Memory that decoding threads share, so that no picture and no handful of pictures exhausts the machine."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

SHARE, LEAST, MOST = 4, 256 << 20, 4 << 30
"""By default decoding may take a quarter of the memory there is, but not less or more than this many bytes."""

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Memory:
    """A number of bytes that threads take parts of and give back.

    Args:
        limit: bytes; by default what `default_limit` says.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = default_limit() if limit is None else limit
        self._used = 0
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free, and hold them.

        Raises:
            ValueError: if it is more than all there is.
        """
        if size > self.limit:
            need, limit = (round(value / 2**20) for value in (size, self.limit))
            raise ValueError(f"decoding and resizing would take about {need} MiB of memory, the limit is {limit} MiB")
        with self._freed:
            self._freed.wait_for(lambda: self._used + size <= self.limit)
            self._used += size
        try:
            yield
        finally:
            with self._freed:
                self._used -= size
                self._freed.notify_all()


def default_limit() -> int:
    """A share of the machine's memory, or of what the container may use if that is less; in bytes."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, _CGROUP_LIMITS):
        with contextlib.suppress(OSError):  # the other version of cgroups, or none
            text = path.read_text().strip()
            sizes += [int(text)] if text.isdigit() else []
    return max(LEAST, min(MOST, min(sizes) // SHARE))
