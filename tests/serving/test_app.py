"""What each endpoint answers, and what it refuses."""

import base64
import io
import logging
import socket
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from helpers.photos import FakeEngine
from helpers.serving import client, data_url, embedding, encoded, files, png
from PIL import Image

from vitfast.serving.limits import Limits


@pytest.fixture(scope="module")
def server():
    labels = ["red", "green", "blue"]
    engines = {"fake": FakeEngine(labels=labels), "headless": FakeEngine(classes=0)}
    with client(engines, Limits(max_images=4, max_body=1 << 20, max_pixels=10_000)) as made:
        yield made


def post(server, path="/v1/embeddings", /, **content):
    return server.post(path, json=content)


def refused(response, status, *words):
    """Check that a response is a refusal in OpenAI's shape that names the words; its code."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    return error["code"]


PICTURES = [
    lambda url: url,
    lambda url: [url],
    lambda url: {"type": "image_url", "image_url": {"url": url}},
    lambda url: [{"type": "input_image", "image_url": url}],
    lambda url: {"image": url},
]


@pytest.mark.parametrize("shape", range(len(PICTURES)))
def test_embeddings_of_data_urls(server, shape):
    content = png(shape)
    answer = post(server, model="fake", input=PICTURES[shape](data_url(content))).json()
    assert answer["object"] == "list"
    assert answer["model"] == "fake"
    assert set(answer["usage"]) == {"prompt_tokens", "total_tokens"}
    (row,) = answer["data"]
    assert (row["object"], row["index"]) == ("embedding", 0)
    assert np.array_equal(np.float32(row["embedding"]), embedding(content))


@pytest.mark.parametrize("path", ["/embeddings", "/v1/embeddings"])
def test_embeddings_of_files(server, path):
    contents = [png(i) for i in range(3)]
    answer = server.post(path, files=files(*contents), data={"model": "headless"}).json()
    assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    for content, row in zip(contents, answer["data"], strict=True):
        assert np.array_equal(np.float32(row["embedding"]), embedding(content))


def test_base64_holds_float32(server):
    content = png(5)
    answer = post(server, input=data_url(content), encoding_format="base64", dimensions=4).json()
    values = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert np.array_equal(values, embedding(content))


def test_bulk_answers(server):
    contents = [png(i) for i in range(4)]
    expected = np.stack([embedding(content) for content in contents])
    raw = server.post("/embeddings", files=files(*contents), headers={"Accept": "application/octet-stream"})
    assert raw.headers["x-shape"] == "4,4"
    assert np.array_equal(np.frombuffer(raw.content, "<f4").reshape(4, 4), expected)
    kind = "application/vnd.apache.arrow.stream"
    arrow = server.post("/embeddings", files=files(*contents), headers={"Accept": f"{kind};q=1, */*"})
    table = pa.ipc.open_stream(arrow.content).read_all()
    assert arrow.headers["content-type"] == kind
    assert table["index"].to_pylist() == [0, 1, 2, 3]
    assert np.array_equal(np.float32(table["embedding"].to_pylist()), expected)
    refused(server.post("/embeddings", files=files(png()), headers={"Accept": "text/html"}), 406)


def test_classify(server):
    content = encoded(Image.new("RGB", (16, 12), (10, 200, 30)))
    answer = server.post("/classify", files=files(content, png()), data={"topk": "2"}).json()
    first, second = answer["data"]
    assert [c["label"] for c in first["classes"]] == ["green", "blue"]
    assert first["classes"][0]["probability"] == pytest.approx(1)
    assert len(second["classes"]) == 2
    assert len(post(server, "/classify", input=data_url(content)).json()["data"][0]["classes"]) == 3
    refused(post(server, "/classify", input=data_url(content), topk=4), 400, "topk", "1 to 3", "4")
    refused(post(server, "/classify", input=data_url(content), topk=True), 400, "topk")
    refused(post(server, "/classify", input=data_url(content), model="headless"), 400, "no classification head")
    assert refused(post(server, "/classify", input=data_url(content), labels=["a"]), 400) == "text_not_supported"


def test_similarity(server):
    contents = [png(0), png(1), png(0)]
    matrix = np.array(server.post("/similarity", files=files(*contents)).json()["similarity"])
    a, b = (embedding(content).astype(np.float64) for content in contents[:2])
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert matrix.shape == (3, 3)
    assert np.allclose(matrix, [[1, cosine, 1], [cosine, 1, cosine], [1, cosine, 1]], atol=1e-12)
    refused(server.post("/similarity", files=files(png())), 400, "two images")


def test_models(server):
    for path in ("/models", "/v1/models"):
        data = server.get(path).json()["data"]
        assert [model["id"] for model in data] == ["fake", "headless"]
        assert [model["classes"] for model in data] == [3, 0]
        assert data[0]["embedding_size"] == 4
        assert data[0]["image_size"] == [8, 8]


def test_health_metrics_and_openapi(server):
    post(server, input=data_url(png()))
    post(server, input="nothing")
    assert server.get("/health/live").status_code == server.get("/health/ready").status_code == 200
    text = server.get("/metrics").text
    assert 'vitfast_requests_total{endpoint="/v1/embeddings",status="200"}' in text
    assert 'vitfast_requests_total{endpoint="/v1/embeddings",status="400"}' in text
    assert 'vitfast_batch_size_count{kind="image",model="fake"}' in text
    for stage in ("decode", "queue", "model"):
        assert f'vitfast_stage_seconds_count{{kind="image",model="fake",stage="{stage}"}}' in text
    assert "vitfast_queue_bytes 0.0" in text
    document = server.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            assert server.request(method, path).status_code not in (404, 405), path


def test_the_page(server):
    page = server.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text  # nothing comes from elsewhere
    for path in ("/page.js", "/page.css"):
        assert path in page.text
        assert server.get(path).status_code == 200


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("http://127.0.0.1/cat.png", "url_not_allowed"),
        ("GOPHER://127.0.0.1/", "url_not_allowed"),
        ({"image": "/etc/passwd"}, "malformed"),
        ({"text": 5}, "malformed"),
        ({"text": "a", "image": "data:,"}, "malformed"),
        ("", "malformed"),
        ({"image_url": {"url": "https://example.com/cat.png"}}, "url_not_allowed"),
        ("file:///etc/passwd", "url_not_allowed"),
        ("a sentence", "text_not_supported"),
        ("/etc/passwd", "text_not_supported"),
        ({"text": "a sentence"}, "text_not_supported"),
        ([1, 2, 3], "malformed"),
        ({"image_url": {"url": {"url": "data:,"}}}, "malformed"),
        (None, "missing_field"),
        ([], "no_input"),
        ("data:image/png,abc", "malformed"),
        ("data:image/png;base64,!!!", "malformed"),
        ("data:image/png;base64,é", "malformed"),
        ("data:image/png;base64,", "image_not_usable"),
        (data_url(b"no picture"), "image_not_usable"),
        ([data_url(png()), data_url(png()[:60])], "image_not_usable"),
    ],
)
def test_what_is_no_picture(server, given, code):
    assert refused(post(server, input=given), 400) == code


def test_nothing_is_ever_fetched(server, monkeypatch):
    """Not by a URL in any place where one might stand, whatever it is that it names."""
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    for url in ("http://127.0.0.1:1/x.png", "http://169.254.169.254/latest", "ftp://h/x", "file:///etc/passwd"):
        for given in (url, [url], {"url": url}, {"image_url": {"url": url}}, {"image": url}, f"data:{url},x"):
            assert post(server, input=given).status_code == 400
        assert server.post("/embeddings", files=files(url.encode())).status_code == 400
        svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}"/></svg>'.encode()
        assert server.post("/embeddings", files=files(svg)).status_code == 400
        for field in ("file", "text", "url"):
            assert server.post("/embeddings", data={field: url}, files=files(png())).status_code == 400


def test_the_bad_image_is_named(server):
    refused(post(server, input=[data_url(png()), data_url(b"x")]), 400, "image 1: not an image in a known format")
    refused(server.post("/embeddings", files=files(png(), b"")), 400, "image 1: the file is empty")


def test_fields(server):
    picture = data_url(png())
    assert refused(post(server, input=picture, model="other"), 404, "'other'", "fake, headless") == "model_not_found"
    assert refused(post(server, input=picture, model=["fake"]), 404) == "model_not_found"
    assert refused(post(server, input=picture, path="/etc/passwd"), 400, "'path'") == "unknown_field"
    refused(post(server, input=picture, dimensions=3), 400, "dimensions", "4 to 4")
    refused(post(server, input=picture, encoding_format="int8"), 400, "encoding_format", "'int8'")
    refused(server.post("/embeddings", data={"file": "/etc/passwd"}, files=files(png())), 400, "'file'")


def test_bodies(server):
    kind = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"input": ' + b"[" * 100_000, b"9" * 5000, b"NaN"):
        assert refused(server.post("/v1/embeddings", content=body, headers=kind), 400) == "malformed"
    refused(server.post("/embeddings", content=b"x", headers={"Content-Type": "text/plain"}), 415, "text/plain")
    refused(server.post("/embeddings", content=b"x", headers={**kind, "Content-Encoding": "gzip"}), 415, "gzip")
    form = {"Content-Type": "multipart/form-data"}
    assert refused(server.post("/embeddings", content=b"x", headers=form), 400, "boundary") == "malformed"


def test_half_a_surrogate_pair_is_answered(server):
    body = b'{"input": "\\ud800", "model": "\\udfff"}'
    refused(server.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"}), 400)


def test_limits(server):
    many = [png()] * 5
    assert refused(server.post("/embeddings", files=files(*many)), 413, "at most 4") == "too_many_images"
    assert refused(post(server, input=[data_url(c) for c in many]), 413, "5", "at most 4") == "too_many_images"
    large = b"x" * (1 << 20)
    assert refused(server.post("/embeddings", files=files(large)), 413) == "request_too_large"
    chunks = (large[:1000] for _ in range(2000))  # no Content-Length
    assert refused(server.post("/embeddings", content=chunks), 413) == "request_too_large"
    assert server.service.budget.used == 0


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims many pixels, its data short."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bombs_are_refused_before_they_are_decoded(server, monkeypatch):
    monkeypatch.setattr("vitfast.images.decode.ImageFile.decode", lambda self: pytest.fail("decoded"))
    refused(server.post("/embeddings", files=files(bomb(50_000, 50_000))), 400, "too many pixels", "10000")


def test_unknown_paths_and_methods(server):
    refused(server.get("/nothing"), 404)
    refused(server.get("/embeddings"), 405)
    refused(server.post("/models"), 405)
    assert "nothing" not in server.get("/metrics").text


def test_api_keys():
    picture = data_url(png())
    with client(api_keys=["one", "zwei-ü"]) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": "on"}, {"Authorization": "one"}):
            response = server.post("/v1/embeddings", json={"input": picture}, headers=headers)
            assert refused(response, 401) == "invalid_api_key"
            assert server.get("/metrics", headers=headers).status_code == 401
        for headers in ({"Authorization": "Bearer one"}, {"X-API-Key": "zwei-ü".encode()}):
            assert server.post("/v1/embeddings", json={"input": picture}, headers=headers).status_code == 200
        assert server.get("/health/ready").status_code == server.get("/").status_code == 200


class BrokenEngine(FakeEngine):
    """Fails on what is not black."""

    def __call__(self, images, *, preprocessed):
        if images.any():
            raise RuntimeError("secret of the device")
        return super().__call__(images, preprocessed=preprocessed)


def test_a_model_that_fails_fails_its_batch_alone(caplog):
    black = encoded(Image.new("RGB", (9, 9)))
    with client({"broken": BrokenEngine()}) as server, caplog.at_level(logging.INFO, "vitfast.serving"):
        response = server.post("/embeddings", files=files(png()))
        assert refused(response, 500) == "model_failed"
        assert "secret" not in response.text
        assert "Traceback" not in response.text
        assert server.post("/embeddings", files=files(black)).status_code == 200
    assert any("the model failed" in record.message for record in caplog.records)


class InfiniteEngine(FakeEngine):
    """Gives infinity for what is not black."""

    def __call__(self, images, *, preprocessed):
        output = super().__call__(images, preprocessed=preprocessed)
        output.embedding[images.flatten(1).amax(1) > 0] = float("inf")
        return output


def test_outputs_that_are_not_finite_are_refused():
    with client({"infinite": InfiniteEngine()}) as server:
        refused(server.post("/embeddings", files=files(png())), 500, "image 0", "not finite")


def test_a_fault_of_the_server_shows_no_trace(server, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("a secret")

    monkeypatch.setattr("vitfast.serving.answers.embeddings", broken)
    response = server.post("/embeddings", files=files(png()))
    refused(response, 500, response.headers["x-request-id"])
    assert "secret" not in response.text
    assert "a secret" in caplog.text  # for whoever runs it


def test_a_model_that_cannot_be_warmed_up_is_told(monkeypatch):
    from starlette.testclient import TestClient

    from vitfast.serving.app import create_app
    from vitfast.serving.service import Service

    class Broken(FakeEngine):
        def __call__(self, images, *, preprocessed):
            raise RuntimeError("no memory")

    service = Service({"broken": Broken()})
    with TestClient(create_app(service)) as server:
        while service.failed is None:
            pass
        assert server.get("/health/live").status_code == 200
        assert server.get("/health/ready").status_code == 503
        refused(server.post("/embeddings", files=files(png())), 503, "warming up")


def test_models_without_preprocessing_are_refused():
    with pytest.raises(ValueError, match="fake: the checkpoint does not say"), client({"fake": FakeEngine(None)}):
        pass


def test_jpegs_beyond_the_limit_are_read_at_a_part_of_their_size(server):
    content = encoded(Image.new("RGB", (150, 100), (200, 10, 10)), "JPEG")
    row = server.post("/embeddings", files=files(content)).json()["data"][0]["embedding"]
    assert np.allclose(row[:3], np.array(Image.open(io.BytesIO(content))).mean((0, 1)), atol=3)


@pytest.mark.parametrize("name", ["max_body", "max_wait", "drain_timeout"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        Limits(**{name: 0})
