"""The clients that people have: OpenAI's own, and the recipes of the documentation as they stand there."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.photos import FakeEngine
from helpers.scripts import ROOT
from helpers.serving import data_url, embedding, png, running

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def url():
    with running({"fake": FakeEngine()}, api_keys=["secret"]) as (made, _):
        yield made


def test_the_client_of_openai(url):
    openai = pytest.importorskip("openai", reason="openai is not installed: no client to test with")
    contents = [png(1), png(2)]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        for options in ({}, {"encoding_format": "float"}, {"dimensions": 4, "user": "me"}):
            answer = client.embeddings.create(model="fake", input=[data_url(c) for c in contents], **options)
            assert answer.model == "fake"
            assert [row.index for row in answer.data] == [0, 1]
            for content, row in zip(contents, answer.data, strict=True):
                assert np.array_equal(np.float32(row.embedding), embedding(content))
        assert [model.id for model in client.models.list()] == ["fake"]
        with pytest.raises(openai.NotFoundError, match="there is no model 'other'; there are fake"):
            client.embeddings.create(model="other", input=data_url(contents[0]))
        with pytest.raises(openai.BadRequestError, match="image 0: not an image"):
            client.embeddings.create(model="fake", input=data_url(b"x"))
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@pytest.mark.parametrize("word", ["curl", "urllib", "openai"])
def test_recipes_of_the_documentation(url, word, tmp_path):
    for seed, name in enumerate(("cat.png", "dog.png")):
        (tmp_path / name).write_bytes(png(seed))
    (kind, text) = next(block for block in BLOCKS if word in block[1] and "pip install" not in block[1])
    text = text.replace("http://127.0.0.1:8000", url).replace("KEY", "secret")
    if kind == "python":
        if word == "openai":
            pytest.importorskip("openai", reason="openai is not installed: no client to test with")
        text += "\nimport json; print(json.dumps(list(map(float, embedding))))"
        out = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        assert np.array_equal(np.float32(json.loads(out.stdout)), embedding(png(0)))
        return
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    out = subprocess.run(["bash", "-e", "-c", text], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    answers = [json.loads(line) for line in out.stdout.replace("}{", "}\n{").splitlines()]
    first, second = answers
    rows = [row["embedding"] for row in first["data"]]
    assert np.array_equal(np.float32(rows), np.stack([embedding(png(0)), embedding(png(1))]))
    assert np.shape(second["similarity"]) == (2, 2)
