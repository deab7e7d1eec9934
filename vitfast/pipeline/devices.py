"""One process a device, all into one embedding folder.

    job = Job(["photos/"], "facebook/dinov2-small", "embeddings")
    with open_folder("embeddings", job.model) as folder, DeviceProcesses(["cuda:0", "cuda:1"], job) as processes:
        summary = write_rows(processes.results(), folder, processes.dimension, processes.identity)

Every process reads the sources and takes the images whose key falls to it, so that none waits for another and no image
is anyone else's; it decodes and embeds them, and sends its results through a pipe. The caller alone writes the folder
and has its lock. A process that dies costs what it had not sent: the others go on, and the next run does the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from vitfast.images.files import ImageListing
from vitfast.pipeline.embed import Result, embed_images
from vitfast.pipeline.formats import open_folder
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.memory import default_limit
from vitfast.pipeline.sources import Item, find_sources
from vitfast.pipeline.stages import Stages, usable_cores

SEND_ROWS, SEND_SECONDS = 256, 0.5
"""Results are sent when there are so many, or when the first of them has waited so long."""

_BEGIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vitfast.pipeline.devices import main; main()"


class DeviceError(RuntimeError):
    """Processes that died before their images were done, each with its device and why."""


@dataclass(frozen=True)
class Job:
    """What all processes do, as text and numbers that can be sent to them.

    Attributes:
        sources: as `find_sources` takes them; find: its other arguments.
        model, out, overwrite, format: as `open_folder` takes them; refresh and content as `todo` of a folder.
        load: arguments of `vitfast.load` but for the device. embed: those of `embed_images`; `workers` and
            `decode_memory` are of all processes together, and by default what one would take.
        output_dtype: as of `write_parquet`.
    """

    sources: Sequence[str]
    model: str
    out: str
    overwrite: bool = False
    refresh: bool = False
    content: bool = False
    find: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    embed: dict[str, Any] = field(default_factory=dict)
    output_dtype: str = "float32"
    format: str | None = None


@dataclass(frozen=True)
class Ready:
    """A process has its model: the width of its embeddings, and their identity."""

    dimension: int
    identity: Identity


@dataclass(frozen=True)
class Failed:
    """A process could not begin or go on, and why; `usage`: arguments or inputs cannot be used."""

    message: str
    usage: bool


@dataclass(frozen=True)
class Done:
    """A process is through with its images: what `Folder.todo` and `Sources` say of them, and its times."""

    skipped: int
    changed: list[str]
    left_out: dict[str, str]
    unreadable: dict[str, str]
    decode: float
    total: float


def is_share(key: str, number: int, count: int) -> bool:
    """Whether an image falls to process `number` of `count`, by its key alone."""
    return zlib.crc32(key.encode("utf-8", "surrogatepass")) % count == number


def device_names(text: str) -> list[str]:
    """Devices by name: "0,1" is ["cuda:0", "cuda:1"], other names stay.

    Raises:
        ValueError: if a name is empty or a GPU is named twice.
    """
    names = [name.strip() for name in text.split(",")]
    names = [f"cuda:{name}" if name.isdigit() else name for name in names]
    twice = {name for name in names if names.count(name) > 1 and name != "cpu"}
    if twice or not all(names):
        raise ValueError(f"expected devices like 0,1 or cpu,cpu, each GPU once; got {text!r}")
    return names


class DeviceProcesses:
    """A process for each device, from the time it has its model; a context manager, at whose end there is none.

    Args:
        devices: as `torch.device` takes them. job: what they do.

    Attributes:
        dimension, identity: of the embeddings. skipped, changed, left_out, unreadable: as `Done` has them, of all
            processes that are through.

    Raises:
        ValueError: if a process cannot use its arguments or inputs, or two make embeddings of different identities.
        RuntimeError: if one fails otherwise.
    """

    def __init__(self, devices: Sequence[str], job: Job) -> None:
        self.skipped = 0
        self.changed: list[str] = []
        self.left_out: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self._names = [f"process {number} ({device})" for number, device in enumerate(devices)]
        self._times: list[tuple[float, float]] = []
        self._workers = len(devices) * _share_of(job.embed.get("workers"), usable_cores(), len(devices))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        try:
            for number, device in enumerate(devices):
                self._start(job, device, number, len(devices))
            ready = [self._ready(number) for number in range(len(devices))]
            for name, one in zip(self._names, ready, strict=True):
                if differences := one.identity.differences(ready[0].identity):
                    raise ValueError(f"{name} does not make the embeddings of the first: {'; '.join(differences)}")
        except BaseException:
            self.close()
            raise
        self.dimension, self.identity = ready[0].dimension, ready[0].identity

    def _start(self, job: Job, device: str, number: int, count: int) -> None:
        reading, writing = os.pipe()
        self._pipes.append(Connection(reading, writable=False))
        try:
            command = [sys.executable, "-c", _BEGIN, json.dumps(sys.path), str(writing)]
            # What libraries print there goes to stderr, as it does in one process.
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, pass_fds=[writing])
        finally:
            os.close(writing)
        self._processes.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # one that is dead says so where it is read
            stdin.write(pickle.dumps((job, device, number, count)))

    def _ready(self, number: int) -> Ready:
        message = self._receive(number)
        if isinstance(message, Ready):
            return message
        if message is None:
            raise RuntimeError(self._death(number))
        raise (ValueError if message.usage else RuntimeError)(message.message)

    def _receive(self, number: int) -> Any:
        """The next message of a process, None if it died."""
        try:
            return self._pipes[number].recv()
        except (EOFError, OSError):  # between two messages, or within one
            return None

    def _death(self, number: int) -> str:
        code = self._processes[number].wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self._names[number]} {how}"

    def results(self) -> Iterator[Result]:
        """What the processes give, as it comes.

        Raises:
            DeviceError: at the end, if processes died or failed before theirs.
        """
        lost = []
        working: dict[Any, int] = {pipe: number for number, pipe in enumerate(self._pipes)}
        while working:
            for pipe in wait(list(working)):
                number = working[pipe]
                message = self._receive(number)
                if isinstance(message, list):
                    yield from message
                    continue
                del working[pipe]
                if isinstance(message, Done):
                    self._through(message)
                elif isinstance(message, Failed):
                    lost.append(f"{self._names[number]} failed: {message.message}")
                else:
                    lost.append(self._death(number))
        if lost:
            raise DeviceError(f"{'; '.join(lost)}; the same command goes on with what is left")

    def _through(self, done: Done) -> None:
        self.skipped += done.skipped
        self.changed += done.changed
        self.left_out |= done.left_out
        self.unreadable |= done.unreadable
        self._times.append((done.decode, done.total))

    def note(self, listing: ImageListing, stages: Stages) -> None:
        """Add what the processes that are through say of their sources, and their mean wait for pictures."""
        listing.left_out |= self.left_out
        listing.unreadable |= self.unreadable
        if self._times:
            stages.total = max(stages.total, max(total for _, total in self._times))
            stages.workers, stages.decode = self._workers, sum(decode for decode, _ in self._times) / len(self._times)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        for pipe in self._pipes:
            pipe.close()

    def __enter__(self) -> DeviceProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _share_of(asked: int | None, default: int, count: int) -> int:
    """What one of so many processes takes of a number that is for all together."""
    return max((default if asked is None else asked) // count, 1)


def _work(pipe: Connection, job: Job, device: str, number: int, count: int) -> None:
    """What a process does, from its job to its last message."""
    import torch
    from PIL import Image

    from vitfast.engine.load import load

    if device == "cpu":
        torch.set_num_threads(max(usable_cores() // count, 1))
    if job.embed.get("max_pixels") is not None:
        Image.MAX_IMAGE_PIXELS = job.embed["max_pixels"]  # some decoders look at it themselves
    images = find_sources(job.sources, **job.find)
    folder = open_folder(job.out, job.model, overwrite=job.overwrite, format=job.format)
    share: Iterable[Item] = (item for item in images if is_share(item.key, number, count))
    todo = folder.todo(share, refresh=job.refresh, content=job.content)
    options, stages = dict(job.embed), Stages()
    options["workers"] = _share_of(options.get("workers"), usable_cores(), count)
    options["decode_memory"] = _share_of(options.get("decode_memory"), default_limit(), count)
    engine = load(job.model, device=device, **job.load)
    identity = Identity.of(engine, options.get("exif_orientation", True), job.output_dtype)
    results = embed_images(engine, todo, stages=stages, **options)
    # From here on the caller may write the folder.
    pipe.send(Ready(engine.config.embedding_dim, identity))
    batch: list[Result] = []
    first = 0.0
    for result in results:
        first = first if batch else time.perf_counter()
        result.logits = None
        batch.append(result)
        if len(batch) >= SEND_ROWS or time.perf_counter() - first >= SEND_SECONDS:
            pipe.send(batch)
            batch = []
    if batch:
        pipe.send(batch)
    listing = images.listing
    pipe.send(Done(folder.skipped, folder.changed, listing.left_out, listing.unreadable, stages.decode, stages.total))


def main() -> None:
    """What a process is: a job from stdin, messages into the pipe that the second argument has the number of."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # to the whole group: the caller ends its processes itself
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.set_inheritable(int(sys.argv[2]), False)
    pipe = Connection(int(sys.argv[2]), readable=False)
    job, device, number, count = pickle.load(sys.stdin.buffer)
    try:
        _work(pipe, job, device, number, count)
    except BrokenPipeError:  # the caller is gone, and with it all that the work was for
        os._exit(1)
    except Exception as error:
        usage = isinstance(error, (ValueError, FileNotFoundError))
        pipe.send(Failed(str(error) if usage else f"{type(error).__name__}: {error}", usage))
