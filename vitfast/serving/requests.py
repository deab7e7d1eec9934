"""What is read of a client: bodies within limits, and in them images, texts and a few fields. Nothing here is trusted.

Images come as files of a multipart form or as base64 data URLs in JSON, texts as fields of a form or strings in JSON. A
path is never opened and a URL never fetched.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitfast.pipeline.sources.item import bytes_item
from vitfast.serving.limits import Budget, Limits, Refusal, overloaded
from vitfast.serving.model import Input, ServedModel

if TYPE_CHECKING:
    from starlette.requests import Request

_MAX_FIELDS, _MAX_FIELD = 32, 1 << 16
_SHOWN = 80
_LISTS = ("labels", "templates")
"""Fields that have several values: a list in JSON, or given several times in a form."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass
class Parsed:
    """Images and texts in order, and the fields beside them."""

    inputs: list[Input]
    fields: Mapping[str, Any]

    @property
    def images(self) -> int:
        """How many of the inputs are images."""
        return sum(not isinstance(given, str) for given in self.inputs)


def shown(value: object) -> str:
    """A value as an error message repeats it: not all of it."""
    if isinstance(value, (dict, list)):  # which may be large or deep
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value[: 2 * _SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class Body:
    """The bytes of a request, counted in the server's budget until `release`."""

    def __init__(self, request: Request, limits: Limits, budget: Budget) -> None:
        self._request, self._limits, self._budget = request, limits, budget
        self._held = 0

    def hold(self, size: int) -> None:
        """Count some more.

        Raises:
            Refusal: 429 if the budget does not have them.
        """
        self._budget.take(size)
        self._held += size

    def release(self) -> None:
        """Give all back."""
        self._budget.give(self._held)
        self._held = 0

    async def read(self) -> bytes:
        """All of it.

        Raises:
            Refusal: 413 if it is too long, 408 if it comes too slowly, 429 if the budget is spent, 415 if it is
                compressed.
        """
        headers, limit = self._request.headers, self._limits.max_body
        if (encoding := headers.get("content-encoding", "identity")) != "identity":
            raise Refusal(415, f"Content-Encoding {shown(encoding)} is not read: send the body as it is")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise _too_long(limit)
        try:
            return await asyncio.wait_for(self._read(limit), self._limits.body_timeout)
        except asyncio.TimeoutError:
            raise Refusal(
                408, f"the body was not there after {self._limits.body_timeout:g} s", headers={"Connection": "close"}
            ) from None

    async def _read(self, limit: int) -> bytes:
        body = bytearray()
        async for chunk in self._request.stream():
            if len(body) + len(chunk) > limit:
                raise _too_long(limit)
            self.hold(len(chunk))
            body += chunk
        return bytes(body)


def _too_long(limit: int) -> Refusal:
    return Refusal(
        413, f"the request is larger than {limit} bytes", "request_too_large", headers={"Connection": "close"}
    )


async def parse(request: Request, body: bytes, limits: Limits, allowed: Collection[str]) -> Parsed:
    """Inputs and fields of a request, in JSON or as a multipart form.

    Raises:
        Refusal: for anything else, a field that is not `allowed`, no input or too many.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        inputs, fields = await _form(request, body, limits)
    elif kind == "application/json":
        inputs, fields = await asyncio.to_thread(_json, body, limits)  # decoding base64 would hold up everybody
    else:
        raise Refusal(415, f"send application/json or multipart/form-data, not {shown(kind)}", "unsupported_media_type")
    for name in fields:
        if name not in allowed:
            known = ", ".join(sorted(allowed))
            raise Refusal(400, f"unknown field {shown(name)}; known are {known}", "unknown_field", shown(name))
    if not inputs:
        raise Refusal(400, "there is no image and no text in the request", "no_input", "input")
    return Parsed(inputs, fields)


def _check_images(count: int, limits: Limits) -> None:
    if count > limits.max_images:
        raise Refusal(413, f"{count} images, at most {limits.max_images} are taken", "too_many_images", "input")


def check_texts(texts: Sequence[object], limits: Limits, param: str) -> list[str]:
    """Texts that a model may be given.

    Raises:
        Refusal: for what is no text, or half a character; for too many, or one that is too long.
    """
    if len(texts) > limits.max_texts:
        raise Refusal(413, f"{len(texts)} texts, at most {limits.max_texts} are taken", "too_many_texts", param)
    checked = []
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise Refusal(400, f"{param}: a text is a string that is not empty, got {shown(text)}", "malformed", param)
        if len(text) > limits.max_text:
            message = f"{param}: a text has {len(text)} characters, at most {limits.max_text} are taken"
            raise Refusal(413, message, "text_too_long", param)
        try:
            text.encode()
        except UnicodeEncodeError:
            message = f"{param}: {shown(text)} holds half of a surrogate pair"
            raise Refusal(400, message, "malformed", param) from None
        checked.append(text)
    return checked


async def _form(request: Request, body: bytes, limits: Limits) -> tuple[list[Input], dict[str, Any]]:
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        request.headers,
        whole(),
        max_files=limits.max_images,
        max_fields=_MAX_FIELDS + limits.max_texts,
        max_part_size=_MAX_FIELD,
    )
    parser.spool_max_size = limits.max_body + 1  # never on disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            _check_images(limits.max_images + 1, limits)
        raise Refusal(400, f"the multipart form cannot be read: {error.message}", "malformed") from None
    except Exception as error:  # parsers raise nearly anything on damaged data
        raise Refusal(400, "the multipart form cannot be read", "malformed") from error
    inputs: list[Input] = []
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            inputs.append(bytes_item(f"image {len(inputs)}", await value.read()))
        elif name == "text":
            inputs.append(value)
        elif name in _LISTS:
            fields.setdefault(name, []).append(value)
        else:
            fields[name] = value
    check_texts([given for given in inputs if isinstance(given, str)], limits, "text")
    return inputs, fields


def _json(body: bytes, limits: Limits) -> tuple[list[Input], dict[str, Any]]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON", "malformed") from None
    if not isinstance(content, dict):
        raise Refusal(400, f"the body must be a JSON object, got {shown(content)}", "malformed")
    given = content.pop("input", None)
    if given is None:
        raise Refusal(400, "the field 'input' is missing", "missing_field", "input")
    parsed: list[tuple[str, bool]] = []  # and whether it is an image, before any is decoded
    images = 0
    for index, value in enumerate(given if isinstance(given, list) else [given]):
        parsed.append(_input(value, index))
        images += parsed[-1][1]
        _check_images(images, limits)
    check_texts([text for text, is_image in parsed if not is_image], limits, "input")
    inputs: list[Input] = [
        bytes_item(f"image {i}", _decoded(text, f"input[{i}]")) if is_image else text
        for i, (text, is_image) in enumerate(parsed)
    ]
    return inputs, content


def _input(value: object, index: int) -> tuple[str, bool]:
    """One element of `input`: a data URL and True, or a text and False.

    Objects are those that people send: {"type": "image_url", "image_url": {"url": ...}}, {"image_url": ...},
    {"image": ...}, {"url": ...} and {"type": "text", "text": ...}.
    """
    param, inner, is_image = f"input[{index}]", value, False
    if isinstance(value, dict) and "text" in value and set(value) <= {"type", "text"}:
        if not isinstance(value["text"], str):
            raise _malformed(value["text"], param)
        return value["text"], False
    for _ in range(2):
        if isinstance(inner, dict):
            keys = [key for key in ("image_url", "image", "url") if key in inner]
            if "text" in inner or not keys:
                raise _malformed(value, param)
            inner, is_image = inner[keys[0]], True
    if not isinstance(inner, str):
        raise _malformed(value, param)
    if inner[:5].lower() == "data:":
        return inner, True
    if _URL.match(inner):
        message = f"{param}: {shown(inner)} is not fetched: send the picture itself as a base64 data URL"
        raise Refusal(400, message, "url_not_allowed", param)
    if is_image:
        raise _malformed(inner, param)
    return inner, False


def _decoded(url: str, param: str) -> bytes:
    """The bytes of a data URL."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refusal(400, f"{param}: a data URL must be base64, got {shown(head)}", "malformed", param)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{param}: the data URL is not valid base64", "malformed", param) from None


def _malformed(value: object, param: str) -> Refusal:
    message = f"{param}: an image is a base64 data URL and a text a string, got {shown(value)}"
    return Refusal(400, message, "malformed", param)


def check_kinds(parsed: Parsed, model: ServedModel, *, texts: bool) -> None:
    """Refuse texts where none are wanted, or where the model has none.

    Raises:
        Refusal: 400.
    """
    if parsed.images == len(parsed.inputs):
        return
    index = next(i for i, given in enumerate(parsed.inputs) if isinstance(given, str))
    if not texts:
        raise Refusal(400, "only images are taken here, no texts", "text_not_supported", f"input[{index}]")
    if not model.has_text:
        given = shown(parsed.inputs[index])
        message = f"{model.name} embeds images, not text; an image is a base64 data URL, got {given}"
        raise Refusal(400, message, "text_not_supported", f"input[{index}]")


def integer(fields: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A whole number among the fields, given as a number or, in a form, as text.

    Raises:
        Refusal: if it is none, or out of range.
    """
    value = fields.get(name, default)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise Refusal(400, f"{name} must be a whole number from {low} to {high}, got {shown(value)}", None, name)
    return value


def refuse_when_late(predicted: float, limits: Limits) -> None:
    """Refuse a request that would wait longer than it may.

    Raises:
        Refusal: 429, with what Retry-After should say.
    """
    if predicted > limits.max_queue_wait:
        raise overloaded(
            f"a request would wait {predicted:.1f} s for the model, at most {limits.max_queue_wait:g} s are allowed",
            predicted - limits.max_queue_wait,
        )
