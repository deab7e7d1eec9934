"""What a server allows its clients, and how it refuses."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Numbers that keep a server up, whoever calls. Times are in seconds.

    Raises:
        ValueError: if one is not positive; the message names it.
    """

    max_body: int = 64 * MIB
    """Bytes of one request."""
    max_images: int = 64
    """Images of one request."""
    max_texts: int = 1024
    """Texts of one request, those that labels make included."""
    max_text: int = 8192
    """Characters of one text; a model cuts it at the end of its own context, which is shorter."""
    max_pixels: int = 50_000_000
    """Pixels of one image, looked at before it is decoded; a larger JPEG is decoded at a part of its size."""
    max_connections: int = 1024
    """Requests at work or waiting at the same time."""
    max_queue_bytes: int = 512 * MIB
    """Bytes of all requests that have been read and not been answered, their decoded images included."""
    max_wait: float = 0.005
    """How long an image waits for others to share its batch while there are some on their way."""
    max_queue_wait: float = 2.0
    """A request that would wait longer before the model turns to it is refused."""
    request_timeout: float = 60.0
    """From the end of a request to its answer."""
    body_timeout: float = 30.0
    """From a request's header to its last byte."""
    header_timeout: float = 10.0
    """From a connection, or the first byte of a later request on it, to the end of the header."""
    keep_alive: float = 75.0
    """How long a connection without a request is kept: longer than clients keep theirs (known ones 5 to 60 s), for who
    sends a request just when the server closes does not know whether it was seen."""
    drain_timeout: float = 30.0
    """After SIGTERM, for the requests that are there."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")


class Refusal(Exception):
    """A request that is not served: HTTP status, one sentence for the client, and a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """In the shape of OpenAI's errors."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def overloaded(message: str, seconds: float) -> Refusal:
    """A refusal to be tried again after some seconds."""
    return Refusal(429, message, "overloaded", headers={"Retry-After": str(max(1, round(seconds + 0.5)))})


class Budget:
    """Bytes that all requests share."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Hold some.

        Raises:
            Refusal: if there are not so many left.
        """
        with self._lock:
            if self.used + size > self.limit:
                raise overloaded("too many bytes are waiting to be worked on; try again later", 1)
            self.used += size

    def give(self, size: int) -> None:
        """Give some back."""
        with self._lock:
            self.used -= size
