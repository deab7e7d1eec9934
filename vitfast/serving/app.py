"""The ASGI app: which path answers what.

service = Service({"dinov2-small": engine})
app = create_app(service)
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vitfast.pipeline.embed import top_classes
from vitfast.serving import answers
from vitfast.serving.gate import Gate, Receive, Scope, Send
from vitfast.serving.limits import Limits, Refusal
from vitfast.serving.openapi import document
from vitfast.serving.requests import Body, Parsed, check_kinds, check_texts, integer, parse, refuse_when_late, shown
from vitfast.serving.service import Service

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from vitfast.engine.engine import Engine
    from vitfast.engine.text import ZeroShot
    from vitfast.serving.model import Row, ServedModel

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/patches.js": ("patches.js", "text/javascript"),
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
        "/dense": endpoints.dense,
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
        warming = asyncio.ensure_future(asyncio.to_thread(service.warm_up))
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
        more: Callable[[Any], list[str]] = lambda checked: [],
        dense: bool = False,
    ) -> Response:
        """Read a request, check its fields before any work is done, run the model, and render in a thread.

        Args:
            more: texts whose rows are wanted, too, after those of the request.
            dense: rows are the features of the images' patches.
        """
        service = self._service
        refuse_when_late(service.predicted_wait(), service.limits)
        body = Body(request, service.limits, service.budget)
        try:
            parsed = await parse(request, await body.read(), service.limits, {"model", "user", *allowed})
            model = service.model(parsed.fields.get("model"))
            model.users += 1
            try:
                checked = check(model, parsed)
                inputs = [*parsed.inputs, *more(checked)]
                rows = await service.rows(request, body, model, inputs, dense=dense)
                return await asyncio.to_thread(render, model, rows, checked)
            finally:
                model.users -= 1
        finally:
            body.release()

    async def embeddings(self, request: Request) -> Response:
        """POST /embeddings, /v1/embeddings."""
        kind = answers.accepted(request.headers.get("accept", ""))

        def check(model: ServedModel, parsed: Parsed) -> str:
            check_kinds(parsed, model, texts=True)
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

        def check(model: ServedModel, parsed: Parsed) -> _Asked:
            check_kinds(parsed, model, texts=False)
            given, limits = parsed.fields, self._service.limits
            labels, templates = ([], []) if "labels" not in given else _zero_shot(model, given, limits)
            if not labels and "templates" in given:
                raise Refusal(400, "templates go with labels", None, "templates")
            if not labels and not model.classes:
                message = f"{model.name} has no classification head"
                message += ": send labels of your own" if model.has_text else ""
                raise Refusal(400, message, "no_classes", "model")
            classes = len(labels) or model.classes
            return _Asked(integer(given, "topk", min(5, classes), 1, classes), labels, templates)

        def render(model: ServedModel, rows: list[Row], asked: _Asked) -> Response:
            head: Engine | ZeroShot
            logits: list[np.ndarray | None]
            if asked.labels:
                images = rows[: len(rows) - len(asked.texts)]
                head, logits = _compared(model, images, rows[len(images) :], asked)
            else:
                head, logits = model.engine, [row.logits for row in rows]
            data = [
                {"index": i, "classes": top_classes(one, asked.topk, head.labels, head.problem_type)}
                for i, one in enumerate(logits)
            ]
            return _json({"object": "list", "data": data, "model": model.name})

        return await self._answer(
            request, {"topk", "labels", "templates"}, check, render, more=lambda asked: asked.texts
        )

    async def dense(self, request: Request) -> Response:
        """POST /dense."""
        kind = answers.accepted(request.headers.get("accept", ""), answers.JSON, answers.RAW)

        def render(model: ServedModel, rows: list[Row], _: None) -> Response:
            if kind == answers.RAW:
                content, headers = answers.raw(rows)
                return _response(content, kind, headers)
            return _json(answers.dense(rows, model.name))

        return await self._answer(
            request, set(), lambda model, parsed: check_kinds(parsed, model, texts=False), render, dense=True
        )

    async def similarity(self, request: Request) -> Response:
        """POST /similarity."""

        def check(model: ServedModel, parsed: Parsed) -> None:
            check_kinds(parsed, model, texts=True)
            if len(parsed.inputs) < 2:
                raise Refusal(400, "similarity is between two images or texts or more, got one", None, "input")

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
                "text": model.has_text,
                "image_size": list(model.image_size),
                "resize": model.preprocess.resize,
                "center_crop": model.preprocess.center_crop,
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


@dataclass(frozen=True)
class _Asked:
    """What /classify is asked for."""

    topk: int
    labels: list[str]
    templates: list[str]

    @property
    def texts(self) -> list[str]:
        """Every label in every template, label by label."""
        return [template.replace("{}", label) for label in self.labels for template in self.templates]


def _zero_shot(model: ServedModel, given: Mapping[str, Any], limits: Limits) -> tuple[list[str], list[str]]:
    """The labels and templates of a request."""
    from vitfast.engine.text import TEMPLATES

    if not model.has_text:
        message = f"{model.name} is served for images alone, so labels of your own cannot be compared with them"
        raise Refusal(400, message, "text_not_supported", "labels")
    lists = {"labels": given["labels"], "templates": given.get("templates", list(TEMPLATES))}
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise Refusal(400, f"{name} must be a list of texts, got {shown(values)}", "malformed", name)
        check_texts(values, limits, name)
    for template in lists["templates"]:
        if "{}" not in template:
            raise Refusal(400, f"a template has {{}} where the label goes, got {shown(template)}", None, "templates")
    count = len(lists["labels"]) * len(lists["templates"])
    if count > limits.max_texts:
        message = f"labels in templates make {count} texts, at most {limits.max_texts} are taken"
        raise Refusal(413, message, "too_many_texts", "labels")
    return lists["labels"], lists["templates"]


def _compared(
    model: ServedModel, images: list[Row], texts: list[Row], asked: _Asked
) -> tuple[ZeroShot, list[np.ndarray | None]]:
    """A classifier of the labels, made of their rows, and what it makes of the images."""
    made = torch.from_numpy(np.stack([row.embedding for row in texts]))
    classes = model.engine.zero_shot(
        asked.labels, asked.templates, made.unflatten(0, (len(asked.labels), len(asked.templates)))
    )
    return classes, list(classes(torch.from_numpy(np.stack([row.embedding for row in images]))).cpu().numpy())


def _response(content: bytes, kind: str, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    from starlette.responses import Response

    return Response(content, status, {"Content-Type": kind, **(headers or {})})


def _json(content: Any, status: int = 200) -> Response:
    return _response(answers.json_bytes(content), answers.JSON, status=status)


async def _page(request: Request, name: str, kind: str) -> Response:
    content = await asyncio.to_thread((Path(__file__).parent / "page" / name).read_bytes)
    return _response(content, f"{kind}; charset=utf-8", {"Content-Security-Policy": _POLICY})
