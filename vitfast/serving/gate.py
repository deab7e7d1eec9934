"""What every request passes: accounting, the key, the end of the server's life, and no stack trace for clients."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vitfast.serving.answers import JSON, json_bytes
from vitfast.serving.limits import Refusal
from vitfast.serving.service import Service

log = logging.getLogger("vitfast.serving")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ALWAYS = {"/health", "/health/live", "/health/ready", "/metrics"}
"""Answered while the server starts and ends, too."""
OPEN = {"/", "/page.js", "/patches.js", "/page.css", "/health", "/health/live", "/health/ready", "/openapi.json"}
"""Need no key: they tell nothing of anybody's data, and a person types the key into the page."""


class Gate:
    """An ASGI app around the app.

    Args:
        app: what answers.
        service: whose life and limits these are.
        endpoints: the paths there are; in metrics all others are one.
    """

    def __init__(self, app: App, service: Service, endpoints: frozenset[str]) -> None:
        self._app, self._service, self._endpoints = app, service, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, identity = time.perf_counter(), 0, uuid.uuid4().hex

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", identity.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        self._service.requests += 1
        self._service.in_flight += 1
        try:
            self._check(scope)
            await self._app(scope, receive, sending)
        except Refusal as refusal:
            await refuse(refusal, sending)
        except Exception:
            log.exception("request %s failed", identity)
            if status:  # the answer has begun: all that is left is to break it off
                raise
            await refuse(Refusal(500, f"the server failed on this request ({identity})"), sending)
        finally:
            self._service.in_flight -= 1
            seconds = time.perf_counter() - started
            endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
            self._service.metrics.request(endpoint, status, seconds)
            fields = {"id": identity, "method": scope["method"][:16], "endpoint": endpoint, "status": status}
            log.info("request", extra={"fields": {**fields, "ms": round(seconds * 1e3, 2)}})

    def _check(self, scope: Scope) -> None:
        service, path = self._service, scope["path"]
        if path not in OPEN:
            self._check_key(scope)
        if path in ALWAYS:
            return
        if service.draining:
            raise Refusal(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "1"})
        if not service.ready:
            raise Refusal(503, "the server is warming up", "not_ready", headers={"Retry-After": "1"})
        if service.in_flight > service.limits.max_connections:
            raise Refusal(503, "too many requests at the same time", "overloaded", headers={"Retry-After": "1"})

    def _check_key(self, scope: Scope) -> None:
        if not self._service.api_keys:
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else given
        matches = [hmac.compare_digest(given, key.encode()) for key in self._service.api_keys]
        if not any(matches):
            message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            raise Refusal(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def refuse(refusal: Refusal, send: Send) -> None:
    """Answer with a refusal, in OpenAI's shape."""
    body = json_bytes(refusal.body())
    headers = {"Content-Type": JSON, "Content-Length": str(len(body)), **refusal.headers}
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
