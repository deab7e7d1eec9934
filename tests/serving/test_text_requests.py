"""Texts beside images: embeddings, similarities and labels of a small CLIP and SigLIP, as the engine makes them."""

import logging

import numpy as np
import pytest
import torch
from helpers.photos import FakeEngine
from helpers.serving import client, data_url, files, png
from helpers.text_models import save, save_tokenizer

import vitfast
from vitfast.serving.limits import Limits

LIMITS = Limits(max_texts=6, max_text=50)
TEXTS = ["a cat.", "the dog", "zebra crossing"]


def load(folder, name):
    save(folder, name, eos=57)
    save_tokenizer(folder)
    return vitfast.load(folder, device="cpu")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return load(tmp_path_factory.mktemp("clip"), "CLIPModel")


@pytest.fixture(scope="module")
def server(engine):
    with client({"clip": engine, "fake": FakeEngine()}, LIMITS, max_batch=4) as made:
        yield made


def of_images(engine, *contents, tmp_path):
    paths = []
    for i, content in enumerate(contents):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(content)
    return engine(paths).embedding


def code(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]["code"]


def test_models_say_whether_they_have_text(server):
    assert [model["text"] for model in server.get("/models").json()["data"]] == [True, False]


def test_texts_and_images_in_one_request(server, engine, tmp_path):
    given = [TEXTS[0], data_url(png(1)), {"type": "text", "text": TEXTS[1]}, {"text": "http://x.org/cat"}]
    answer = server.post("/v1/embeddings", json={"input": given, "model": "clip"}).json()
    rows = np.float32([row["embedding"] for row in answer["data"]])
    texts = engine.text([TEXTS[0], TEXTS[1], "http://x.org/cat"])
    expected = torch.stack([texts[0], of_images(engine, png(1), tmp_path=tmp_path)[0], texts[1], texts[2]])
    assert np.allclose(rows, expected, atol=1e-5)
    form = server.post("/embeddings", files=files(png(1)), data={"text": [TEXTS[1], TEXTS[0]]}).json()
    same = np.float32([row["embedding"] for row in form["data"]])
    kinds = sorted(range(3), key=lambda i: not np.allclose(same[i], rows[1], atol=1e-5))
    assert np.allclose(same[kinds[0]], rows[1], atol=1e-5)
    assert np.allclose(same[sorted(kinds[1:])], rows[[2, 0]], atol=1e-5)


def test_similarity_of_text_and_image(server, engine, tmp_path):
    given = [data_url(png(2)), *TEXTS]
    matrix = np.array(server.post("/similarity", json={"input": given}).json()["similarity"])
    made = torch.cat([of_images(engine, png(2), tmp_path=tmp_path), engine.text(TEXTS)]).double()
    unit = torch.nn.functional.normalize(made, dim=-1)
    assert np.allclose(matrix, unit @ unit.T, atol=1e-5)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_labels(tmp_path, name):
    engine = load(tmp_path, name)
    labels, templates = ["cat", "dog", "cup"], ["{}", "a photo of {}!"]
    images = of_images(engine, png(0), png(1), tmp_path=tmp_path)
    with client({"model": engine}, LIMITS) as server:
        for form in (False, True):
            asked = {"labels": labels, "templates": templates, "topk": 3}
            if form:
                answer = server.post("/classify", files=files(png(0), png(1)), data=asked)
            else:
                answer = server.post("/classify", json={"input": [data_url(png(0)), data_url(png(1))], **asked})
            logits = engine.zero_shot(labels, templates)(images)
            want = logits.softmax(-1) if name == "CLIPModel" else logits.sigmoid()
            for row, expected in zip(answer.json()["data"], want.tolist(), strict=True):
                got = {found["label"]: found["probability"] for found in row["classes"]}
                assert got == pytest.approx(dict(zip(labels, expected, strict=True)), rel=1e-4)
        default = server.post("/classify", json={"input": data_url(png(0)), "labels": labels}).json()
        best = engine.zero_shot(labels)(images[:1]).argmax()
        assert default["data"][0]["classes"][0]["label"] == labels[best]


def test_texts_are_batched_and_remembered(server):
    model = server.service.models["clip"]
    sizes = []
    run, model._text_batcher._run = model._text_batcher._run, lambda texts: (sizes.append(len(texts)), run(texts))[1]
    texts = [f"text number {c}" for c in "abcdef"]
    first = server.post("/v1/embeddings", json={"input": texts}).json()["data"]
    assert sizes == [4, 2]
    again = server.post("/v1/embeddings", json={"input": [*texts[:5], texts[0]]}).json()["data"]
    assert sizes == [4, 2]
    assert [row["embedding"] for row in again] == [row["embedding"] for row in [*first[:5], first[0]]]
    model._text_batcher._run = run


@pytest.mark.parametrize(
    ("path", "fields", "status", "word"),
    [
        ("/v1/embeddings", {"input": "x" * 51}, 413, "text_too_long"),
        ("/v1/embeddings", {"input": ["a"] * 7}, 413, "too_many_texts"),
        ("/v1/embeddings", {"input": "  "}, 400, "malformed"),
        ("/v1/embeddings", {"input": "https://x.org/cat.png"}, 400, "url_not_allowed"),
        ("/v1/embeddings", {"input": "a cat", "model": "fake"}, 400, "text_not_supported"),
        ("/classify", {"input": "a cat", "labels": ["a"]}, 400, "text_not_supported"),
        ("/classify", {"labels": ["a"], "model": "fake"}, 400, "text_not_supported"),
        ("/classify", {"labels": []}, 400, "malformed"),
        ("/classify", {"labels": "cat"}, 400, "malformed"),
        ("/classify", {"labels": ["a", 5]}, 400, "malformed"),
        ("/classify", {"labels": ["a"], "templates": ["a photo"]}, 400, None),
        ("/classify", {"templates": ["{}"]}, 400, None),
        ("/classify", {"labels": ["a"], "topk": 2}, 400, None),
        ("/classify", {"labels": ["a", "b"], "templates": ["{}"] * 4}, 413, "too_many_texts"),
        ("/classify", {}, 400, "no_classes"),
    ],
)
def test_refusals(server, path, fields, status, word):
    assert code(server.post(path, json={"input": data_url(png()), **fields}), status) == word


def test_half_a_surrogate_pair_is_no_text(server):
    body = b'{"input": "half of \\ud800"}'
    response = server.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert code(response, 400) == "malformed"


def test_a_folder_without_a_tokenizer_is_served_for_images(tmp_path, caplog):
    save(tmp_path, "CLIPModel")
    engine = vitfast.load(tmp_path, device="cpu")
    with caplog.at_level(logging.INFO, "vitfast.serving"), client({"clip": engine}) as server:
        assert server.post("/v1/embeddings", json={"input": data_url(png())}).status_code == 200
        response = server.post("/v1/embeddings", json={"input": "a cat"})
        assert code(response, 400) == "text_not_supported"
        assert str(tmp_path) not in response.text
    assert "no tokenizer" in caplog.text
