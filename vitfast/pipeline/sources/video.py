"""Frames of videos as images, at a rate. PyAV decodes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from vitfast.images.files import InputError
from vitfast.pipeline.sources.archives import Opener
from vitfast.pipeline.sources.item import Item, bytes_item, inside

VIDEO = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def is_video(name: str) -> bool:
    """Whether a name's ending says video."""
    return os.fspath(name).lower().endswith(VIDEO)


def video_items(name: str, opener: Opener, columns: Sequence[str], fps: float) -> Iterator[Item]:
    """The first frame, and then one every 1 / fps seconds: the first that is shown at that time or later.

    Keys are the file and the frame's time in seconds, to a thousandth. No columns are known.

    Raises:
        InputError: if PyAV is not installed, or the file has no video.
        Exception: what PyAV raises where the file is damaged, after the frames before.
    """
    try:
        import av
    except ImportError as error:
        raise InputError("videos need PyAV: pip install 'vitfast[video]'") from error
    with opener() as file, av.open(file) as container:
        if not container.streams.video:
            raise InputError(f"{name!r} has no video in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        wanted, last = 0, -1.0
        for frame in container.decode(stream):
            time = frame.time
            if time is None or time <= last or time * fps < wanted - 1e-6:
                continue
            wanted, last = int(time * fps + 1e-6) + 1, time
            content = _ppm(frame.to_ndarray(format="rgb24"))
            yield bytes_item(inside(name, f"{time:.3f}s"), content, columns=dict.fromkeys(columns))


def _ppm(pixels: np.ndarray) -> bytes:
    """Pixels as a file that loses none of them and costs no time."""
    height, width = pixels.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()
