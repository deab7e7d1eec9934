"""Malformed requests by the hundred: each is refused as a client's fault, and the server goes on."""

import base64
import json
import random

import pytest
from helpers.serving import TextEngine, client, data_url, embedding, encoded, files, png
from PIL import Image

from vitfast.serving.limits import Limits
from vitfast.serving.openapi import document

POSTS = {path: methods["post"] for path, methods in document()["paths"].items() if "post" in methods}
FIELDS = {
    path: post["requestBody"]["content"]["application/json"]["schema"]["properties"] for path, post in POSTS.items()
}
"""Path -> field -> its schema, as the OpenAPI document has it."""
PATHS = (*POSTS, "/models", "/", "/nothing", "/health", "/%00")
KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA")
ODD = (
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "\x00",
    "\ud800",
    "é" * 50,
    [],
    {},
    [[]],
    "data:",
    "data:,",
    "file:///x",
    "..",
)
HEADERS = ("accept", "content-encoding", "authorization", "content-length", "x-api-key", "transfer-encoding", "cookie")


def damaged(rng: random.Random) -> bytes:
    """A picture of some format with bytes changed, cut out or added."""
    content = bytearray(encoded(Image.new("RGB", (9, 7), (rng.randrange(256), 3, 200)), rng.choice(KINDS)))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(content) or 1)
        change = rng.randrange(4)
        if change == 0 and content:
            content[min(at, len(content) - 1)] = rng.randrange(256)
        elif change == 1:
            del content[at : at + rng.randrange(1, 40)]
        elif change == 2:
            content[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            content[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"))
    return bytes(content)


def value(rng: random.Random, depth: int = 0) -> object:
    """Something that might stand in `input`, often wrong."""
    choice = rng.randrange(6)
    if choice == 0:
        return data_url(damaged(rng))
    if choice == 1:
        url = data_url(png())
        at = rng.randrange(len(url))
        return url[:at] + rng.choice(("", "\n", "=", "%", "é", "\x00", ",", ";")) + url[at + rng.randrange(3) :]
    if choice == 2 and depth < 3:
        return [value(rng, depth + 1) for _ in range(rng.randrange(6))]
    if choice == 3 and depth < 3:
        key = rng.choice(("image", "image_url", "url", "text", "type", "x"))
        return {key: value(rng, depth + 1)}
    return rng.choice(ODD)


def of_schema(rng: random.Random, schema: dict) -> object:
    """A value that a field's schema allows."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "array":
        return [of_schema(rng, schema["items"]) for _ in range(rng.randrange(1, 4))]
    return (
        rng.choice((1, 2, 4, 10**6)) if schema["type"] == "integer" else rng.choice(("fake", "a {}", "cat", "\ud83d"))
    )


def json_request(rng: random.Random, path: str) -> dict:
    """A body of JSON, its fields right or odd, at times cut or with bytes changed."""
    right = [data_url(png(rng.randrange(9)))] * rng.randrange(1, 6)
    fields = {"input": right if rng.random() < 0.3 else value(rng)}
    for name in (*FIELDS.get(path, ()), "user", "zzz"):
        if name != "input" and rng.random() < 0.3:
            right = rng.random() < 0.6 and name in FIELDS.get(path, ())
            fields[name] = of_schema(rng, FIELDS[path][name]) if right else rng.choice(ODD)
    body = json.dumps(fields).encode()
    if rng.random() < 0.3:
        at = rng.randrange(len(body))
        body = body[:at] + rng.randbytes(rng.randrange(3)) + body[at + rng.randrange(3) :]
    return {"content": body, "headers": {"Content-Type": rng.choice(("application/json", "application/json; a=b"))}}


def form_request(rng: random.Random, path: str) -> dict:
    """A multipart form, at times with its syntax damaged."""
    boundary = rng.choice(("b", "-" * 60, "x y"))
    parts = b""
    for _ in range(rng.randrange(7)):
        name = rng.choice(
            (
                'name="file"; filename="a.png"',
                'name="model"',
                'filename="../../x"',
                "name=",
                'name="topk"',
                'name="text"',
            )
        )
        parts += f"--{boundary}\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode() + damaged(rng) + b"\r\n"
    body = bytearray(parts + f"--{boundary}--\r\n".encode())
    for _ in range(rng.randrange(4)):
        body[rng.randrange(len(body))] = rng.choice(b'-\r\n";:=\x00\xff')
    kind = rng.choice((f"multipart/form-data; boundary={boundary}", f'multipart/form-data; boundary="{boundary}"'))
    if rng.random() < 0.1:
        kind = rng.choice(("multipart/form-data; boundary=", "multipart/form-data; boundary=\xe9", "multipart/", ";;"))
    return {"content": bytes(body), "headers": {"Content-Type": kind.encode("latin-1")}}


def any_request(rng: random.Random, path: str) -> dict:
    """Bytes, a body of JSON or a form; with headers that may be odd."""
    made = rng.choice((json_request, json_request, form_request, form_request, None))
    request = made(rng, path) if made else {"content": rng.randbytes(rng.randrange(99)), "headers": {}}
    if rng.random() < 0.2:
        request["headers"][rng.choice(HEADERS)] = rng.choice(
            ("", "x" * 300, "-1", "gzip", "\xe9\xff", "1e9", "*/*", ",;,")
        )
    request["headers"] = {
        name: content if isinstance(content, bytes) else content.encode("latin-1")
        for name, content in request["headers"].items()
    }
    return request


@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.full)])
def test_malformed_requests_are_the_clients_fault(count):
    rng = random.Random(21)
    statuses = set()
    with client({"fake": TextEngine()}, Limits(max_images=3, max_body=1 << 18, max_pixels=100_000)) as server:
        for number in range(count):
            state = rng.getstate()
            method = rng.choice(("POST", "POST", "POST", "POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD"))
            path = rng.choice(PATHS[:4] if method == "POST" else PATHS)
            response = server.request(method, path, **any_request(rng, path))
            statuses.add(response.status_code)
            said = (number, state[1][-1], method, path, response.text[:500])
            assert response.status_code < 500, said
            assert not any(word in response.text for word in ("Traceback", "site-packages", '.py"')), said
            if method == "POST":
                assert str(response.status_code) in POSTS[path]["responses"], said
            if response.status_code >= 400 and method != "HEAD":
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}, said
        assert {200, 400, 404, 405, 406, 413, 415} <= statuses
        assert server.service.budget.used == server.service.in_flight == 0
        content = png(3)
        answer = server.post("/embeddings", files=files(content), data={"encoding_format": "base64"}).json()
        assert base64.b64decode(answer["data"][0]["embedding"]) == embedding(content).tobytes()
