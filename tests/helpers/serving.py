"""A server of a fake engine in this process, and pictures as clients send them."""

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from helpers.photos import PREPROCESS, FakeEngine, noise
from PIL import Image
from starlette.testclient import TestClient

from vitfast.images.preprocess import resize_and_crop
from vitfast.serving.app import create_app
from vitfast.serving.limits import Limits
from vitfast.serving.server import listening, make_server
from vitfast.serving.service import Service


class HeldEngine(FakeEngine):
    """A fake that works on nothing while `gate` is closed, after the warm-up that is.

    It may take `seconds` for each batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate, self.seconds = None, 0.0

    def __call__(self, images, *, preprocessed):
        if self.gate is not None:
            assert self.gate.wait(30)
        if self.seconds:
            time.sleep(self.seconds)
        return super().__call__(images, preprocessed=preprocessed)


class TextEngine(FakeEngine):
    """A fake that knows texts, too: it embeds one as its letters, and gives features of two by two patches."""

    preprocess = PREPROCESS

    @property
    def config(self):
        config = super().config
        config.grid = lambda size: (2, 2)
        return config

    def __call__(self, images, *, preprocessed, layers=(), reshape=False):
        output = super().__call__(images, preprocessed=preprocessed)
        if layers:
            output.layers = (output.embedding[:, :, None, None].expand(-1, -1, 2, 2),)
        return output

    def text(self, texts):
        return torch.tensor([[float(text.encode().count(letter)) for letter in b"abcd"] for text in texts])

    def zero_shot(self, labels, templates, embeddings):
        scores = torch.nn.functional.normalize(embeddings.mean(1), dim=-1)
        return SimpleZeroShot(labels, scores)


@dataclass
class SimpleZeroShot:
    """What TextEngine makes of labels."""

    labels: list[str]
    weight: torch.Tensor
    problem_type: str = "single_label_classification"

    def __call__(self, embedding):
        return embedding @ self.weight.T


def png(seed: int = 0, height: int = 12, width: int = 16) -> bytes:
    """A picture of noise as a PNG."""
    return encoded(Image.fromarray(noise(height, width, seed)))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """A picture as a file's bytes."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def data_url(content: bytes) -> str:
    """Bytes as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def embedding(content: bytes, engine=None) -> np.ndarray:
    """What an engine itself makes of a picture, float32 [E]."""
    engine = engine or FakeEngine()
    with Image.open(io.BytesIO(content)) as image:
        pixels = resize_and_crop(np.array(image.convert("RGB")), engine.preprocess or PREPROCESS)
    return engine(torch.from_numpy(pixels[None]), preprocessed=True).embedding[0].float().numpy()


def files(*contents: bytes) -> list:
    """Pictures as a multipart form has them."""
    return [("file", (f"{i}.png", content, "image/png")) for i, content in enumerate(contents)]


@contextlib.contextmanager
def client(engines=None, limits: Limits | None = None, **options) -> Iterator[TestClient]:
    """A client of a server that is ready; `client.service` is the service."""
    service = Service(engines or {"fake": FakeEngine()}, limits, **options)
    with TestClient(create_app(service)) as made:
        while not service.ready:
            assert service.failed is None, service.failed
            time.sleep(0.01)  # spinning, it would keep the interpreter from what warms up
        made.service = service
        yield made


@contextlib.contextmanager
def running(engines, limits: Limits | None = None, **options) -> Iterator[tuple[str, Service]]:
    """A server on a port of its own in a thread; its address, and its service with its event loop as `loop`."""
    service = Service(engines, limits, **options)
    with listening("127.0.0.1", 0) as listener:
        server = make_server(service, "127.0.0.1", 0)
        service.loop = None

        async def serve():
            service.loop = asyncio.get_running_loop()
            await server.serve([listener])

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        while not (server.started and service.ready):
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
