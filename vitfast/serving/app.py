"""The ASGI app: which path answers what.

service = Service({"dinov2-small": engine})
app = create_app(service)
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfast.pipeline.embed import top_classes
from vitfast.serving import answers
from vitfast.serving.gate import Gate, Receive, Scope, Send
from vitfast.serving.limits import Refusal
from vitfast.serving.openapi import document
from vitfast.serving.requests import Body, Parsed, integer, parse, refuse_when_late, shown
from vitfast.serving.service import Service

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from vitfast.serving.batching import Row
    from vitfast.serving.model import ServedModel

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
"""Path -> the file of page/ that it is, and its media type."""

_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:"


def create_app(service: Service) -> Gate:
    """The app of a service, which warms up when the app starts and is closed when it ends.

    Raises:
        ImportError: if Starlette or python-multipart is absent; the message names the extra.
    """
    require()
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route, Router

    endpoints = _Endpoints(service)
    post = {
        "/v1/embeddings": endpoints.embeddings,
        "/embeddings": endpoints.embeddings,
        "/classify": endpoints.classify,
        "/similarity": endpoints.similarity,
    }
    get: dict[str, Callable[..., Any]] = {
        "/models": endpoints.models,
        "/v1/models": endpoints.models,
        "/health": endpoints.ready,
        "/health/ready": endpoints.ready,
        "/health/live": endpoints.live,
        "/metrics": endpoints.metrics,
        "/openapi.json": endpoints.openapi,
        **{path: functools.partial(_page, name=name, kind=kind) for path, (name, kind) in PAGE.items()},
    }

    @contextlib.asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        warming = asyncio.ensure_future(service.warm_up())
        yield
        await warming
        await asyncio.to_thread(service.close)

    routes = [Route(path, answer, methods=["POST"]) for path, answer in post.items()]
    routes += [Route(path, answer, methods=["GET"]) for path, answer in get.items()]
    router = Router(routes, redirect_slashes=False, lifespan=lifespan)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = app  # or else the router answers what it does not know itself, in plain text
        try:
            await router(scope, receive, send)
        except HTTPException as error:
            message = f"{scope['method']} {shown(scope['path'])}: {error.detail}"
            raise Refusal(error.status_code, message, headers=error.headers) from None
        except ClientDisconnect:
            raise Refusal(499, "the client has closed the connection") from None

    return Gate(app, service, frozenset(post) | frozenset(get))


def require() -> None:
    """Check that the packages of the extra are there.

    Raises:
        ImportError: if not; the message says how to install them.
    """
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"serving needs more packages ({error}): pip install 'vitfast[serve]'") from error


class _Endpoints:
    """The handlers, each from a request to a response."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def _answer(
        self,
        request: Request,
        allowed: set[str],
        check: Callable[[ServedModel, Parsed], Any],
        render: Callable[[ServedModel, list[Row], Any], Response],
    ) -> Response:
        """Read a request, check its fields before any work is done, run the model, and render in a thread."""
        service = self._service
        refuse_when_late(service.predicted_wait(), service.limits)
        body = Body(request, service.limits, service.budget)
        try:
            parsed = await parse(request, await body.read(), service.limits, {"model", "user", *allowed})
            model = service.model(parsed.fields.get("model"))
            checked = check(model, parsed)
            rows = await service.rows(request, body, model, parsed)
            return await asyncio.to_thread(render, model, rows, checked)
        finally:
            body.release()

    async def embeddings(self, request: Request) -> Response:
        """POST /embeddings, /v1/embeddings."""
        kind = answers.accepted(request.headers.get("accept", ""))

        def check(model: ServedModel, parsed: Parsed) -> str:
            encoding = parsed.fields.get("encoding_format", "float")
            if encoding not in ("float", "base64"):
                raise Refusal(
                    400, f"encoding_format must be float or base64, got {shown(encoding)}", None, "encoding_format"
                )
            size = model.embedding_size
            if parsed.fields.get("dimensions") is not None:
                integer(parsed.fields, "dimensions", size, size, size)
            return encoding

        def render(model: ServedModel, rows: list[Row], encoding: str) -> Response:
            if kind == answers.RAW:
                content, headers = answers.raw(rows)
                return _response(content, kind, headers)
            if kind == answers.ARROW:
                return _response(answers.arrow(rows), kind)
            return _json(answers.embeddings(rows, model.name, encoding))

        return await self._answer(request, {"encoding_format", "dimensions"}, check, render)

    async def classify(self, request: Request) -> Response:
        """POST /classify."""

        def check(model: ServedModel, parsed: Parsed) -> int:
            if "labels" in parsed.fields:
                message = f"{model.name} is served for images alone, so labels of your own cannot be compared with them"
                raise Refusal(400, message, "text_not_supported", "labels")
            if not model.classes:
                raise Refusal(400, f"{model.name} has no classification head", "no_classes", "model")
            return integer(parsed.fields, "topk", min(5, model.classes), 1, model.classes)

        def render(model: ServedModel, rows: list[Row], k: int) -> Response:
            engine = model.engine
            data = [
                {"index": i, "classes": top_classes(row.logits, k, engine.labels, engine.problem_type)}
                for i, row in enumerate(rows)
            ]
            return _json({"object": "list", "data": data, "model": model.name})

        return await self._answer(request, {"topk", "labels"}, check, render)

    async def similarity(self, request: Request) -> Response:
        """POST /similarity."""

        def check(model: ServedModel, parsed: Parsed) -> None:
            if len(parsed.items) < 2:
                raise Refusal(400, "similarity is between two images or more, got one", None, "input")

        def render(model: ServedModel, rows: list[Row], _: None) -> Response:
            return _json({"similarity": answers.similarity(rows), "model": model.name})

        return await self._answer(request, set(), check, render)

    async def models(self, request: Request) -> Response:
        """GET /models, /v1/models."""
        data = [
            {
                "id": model.name,
                "object": "model",
                "created": self._created,
                "owned_by": "vitfast",
                "embedding_size": model.embedding_size,
                "classes": model.classes,
                "image_size": list(model.image_size),
                "device": str(model.engine.device),
                "precision": model.engine.precision,
            }
            for model in self._service.models.values()
        ]
        return _json({"object": "list", "data": data})

    async def live(self, request: Request) -> Response:
        """GET /health/live: the process answers."""
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """GET /health, /health/ready: requests are taken."""
        service = self._service
        status = "draining" if service.draining else "ready" if service.ready else "warming up"
        return _json({"status": status}, 200 if status == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        content, kind = self._service.metrics.text()
        return _response(content, kind)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return _json(document())


def _response(content: bytes, kind: str, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    from starlette.responses import Response

    return Response(content, status, {"Content-Type": kind, **(headers or {})})


def _json(content: Any, status: int = 200) -> Response:
    return _response(answers.json_bytes(content), answers.JSON, status=status)


async def _page(request: Request, name: str, kind: str) -> Response:
    content = await asyncio.to_thread((Path(__file__).parent / "page" / name).read_bytes)
    return _response(content, f"{kind}; charset=utf-8", {"Content-Security-Policy": _POLICY})
