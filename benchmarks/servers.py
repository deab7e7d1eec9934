"""Servers to be measured: `vitfast serve` in a process of its own or somebody else's, and how each is asked."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitfast.benchmarks.load import Target
from vitfast.images.preprocess import Preprocess
from vitfast.models.checkpoints import Checkpoint, saved
from vitfast.models.config import NAMED

PICTURES = 64
"""Different pictures that are sent in turn."""


def multipart(picture: bytes, model: str) -> bytes:
    """A form with one picture, as vitfast takes it."""
    head = '--b\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    field = head.format("model", "") + model + "\r\n"
    return (field + head.format("file", '; filename="a.jpg"')).encode() + picture + b"\r\n--b--\r\n"


def _url(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def _openai(body: bytes) -> Tensor:
    given = json.loads(body)["data"][0]["embedding"]
    return floats(base64.b64decode(given)) if isinstance(given, str) else torch.tensor(given)


def floats(content: bytes) -> Tensor:
    """Little-endian float32."""
    return torch.frombuffer(bytearray(content), dtype=torch.float32)


@dataclass(frozen=True)
class Api:
    """How a server is asked: its path and headers, a request of one picture, and what of an answer is the embedding."""

    path: str
    headers: Mapping[str, str]
    request: Callable[[bytes, str], bytes]
    embedding: Callable[[bytes], Tensor]
    unit: bool = False
    """It gives embeddings of length 1, whatever the model gives."""


_JSON = {"Content-Type": "application/json"}
APIS = {
    "vitfast": Api(
        "/embeddings",
        {"Content-Type": "multipart/form-data; boundary=b", "Accept": "application/octet-stream"},
        multipart,
        floats,
    ),
    "openai": Api(
        "/v1/embeddings",
        _JSON,
        lambda picture, model: json.dumps(
            {"model": model, "input": [_url(picture)], "encoding_format": "base64"}
        ).encode(),
        _openai,
    ),
    "infinity": Api(
        "/embeddings",
        _JSON,
        lambda picture, model: json.dumps(
            {"model": model, "input": [_url(picture)], "modality": "image", "encoding_format": "float"}
        ).encode(),
        _openai,
        unit=True,
    ),
    "litserve": Api(
        "/predict",
        _JSON,
        lambda picture, model: json.dumps({"image": base64.b64encode(picture).decode()}).encode(),
        lambda body: torch.tensor(json.loads(body)["embedding"]),
    ),
}
"""Ways to ask a server. litserve: an API of its own making, {"image": base64} -> {"embedding": [...]}."""


@dataclass
class Served:
    """A server to be measured; `pid` if it is ours."""

    name: str
    url: str
    model: str
    api: Api
    pid: int | None = None

    def target(self, pictures: Sequence[bytes]) -> Target:
        """To be sent pictures, one a request."""
        payloads = [self.api.request(picture, self.model) for picture in pictures]
        return Target(self.url, self.api.path, self.api.headers, payloads)

    def memory(self) -> int | None:
        """Resident bytes, where the process is on this machine and known."""
        status = Path(f"/proc/{self.pid}/status")
        if self.pid is None or not status.is_file():
            return None
        match = re.search(r"^VmRSS:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else None

    def metrics(self) -> dict[str, float]:
        """What /metrics tells; nothing where there is none of ours."""
        if self.pid is None:
            return {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for line in lines if line[0] != "#" for name, value in [line.rsplit(" ", 1)]}


def random_model(name: str, folder: Path) -> Path:
    """A model of random weights by its timm name, saved where a server can load it.

    Raises:
        ValueError: if the name is not known.
    """
    if name not in NAMED:
        raise ValueError(f"--model must be one of {', '.join(NAMED)}, a folder or a hub id, got {name!r}")
    config = NAMED[name]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, (shape, _) in config.weight_shapes().items():
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        weights[key] = torch.randn(shape, generator=generator) * spread
        if re.search(r"norm\d?\.weight$", key):
            weights[key] += 1
    size = config.image_size
    saved.write(Checkpoint(config, weights, Preprocess(size=size, resize=size, center_crop=False)), folder / name)
    return folder / name


def pictures(count: int = PICTURES, height: int = 240, width: int = 320) -> list[bytes]:
    """JPEGs of smooth noise, about as large as small photographs."""
    from PIL import Image

    made = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        coarse = torch.rand(1, 3, 12, 16, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
        fine = (fine + 0.03 * torch.randn(fine.shape, generator=generator)).clamp(0, 1)
        file = io.BytesIO()
        Image.fromarray((255 * fine[0].permute(1, 2, 0)).byte().numpy()).save(file, "JPEG", quality=85)
        made.append(file.getvalue())
    return made


@contextlib.contextmanager
def started(name: str, source: Path | str, options: Sequence[str] = ()) -> Iterator[Served]:
    """`vitfast serve` in a process of its own, ready.

    Raises:
        RuntimeError: if it ends before it is ready; the message has what it said.
    """
    command = [sys.executable, "-m", "vitfast", "serve", f"{name}={source}", "--port", "0", *options]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            url = None
            while url is None or not _ready(url):
                if process.poll() is not None:
                    said = Path(log.name).read_text()[-2000:]
                    raise RuntimeError(f"the server ended with code {process.returncode}: {said}")
                found = re.search(r"listening on (http://\S+?)\"", Path(log.name).read_text())
                url = found[1] if found else None
                time.sleep(0.1)
            yield Served("vitfast", url, name, APIS["vitfast"], process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as response:
            return response.status == 200
    except OSError:  # refused, or 503
        return False
