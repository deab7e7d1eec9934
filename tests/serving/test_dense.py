"""Features of patches over HTTP, as the engine itself gives them."""

import base64
import io

import numpy as np
import pytest
import torch
from helpers.engines import SMALL, engine
from helpers.serving import client, data_url, files, png
from PIL import Image

from vitfast.images.preprocess import resize_and_crop


@pytest.fixture(scope="module")
def small():
    return engine(SMALL)


def features(engine, content):
    """float32 [rows, columns, C]"""
    with Image.open(io.BytesIO(content)) as image:
        pixels = resize_and_crop(np.array(image.convert("RGB")), engine.preprocess)
    output = engine(torch.from_numpy(pixels[None]), preprocessed=True, layers=[-1], reshape=True)
    return output.layers[0][0].permute(1, 2, 0).float().cpu().numpy()


def test_dense(small):
    contents = [png(seed) for seed in range(3)]
    want = [features(small, content) for content in contents]
    assert want[0].shape == (2, 3, 64)
    with client({"small": small}) as server:
        answer = server.post("/dense", json={"input": [data_url(content) for content in contents]}).json()
        raw = server.post("/dense", files=files(*contents), headers={"Accept": "application/octet-stream"})
        assert raw.headers["x-shape"] == "3,2,3,64"
        for i, (row, bulk) in enumerate(
            zip(answer["data"], np.frombuffer(raw.content, "<f4").reshape(3, 2, 3, 64), strict=True)
        ):
            got = np.frombuffer(base64.b64decode(row["features"]), "<f4").reshape(row["shape"])
            assert np.allclose(got, want[i], atol=1e-4)
            assert np.allclose(bulk, want[i], atol=1e-4)
        assert 'vitfast_inputs_total{kind="dense",model="small"} 6.0' in server.get("/metrics").text
        arrow = server.post("/dense", files=files(png()), headers={"Accept": "application/vnd.apache.arrow.stream"})
        assert arrow.status_code == 406
        assert server.post("/dense", json={"input": "a cat"}).json()["error"]["code"] == "text_not_supported"
        assert server.service.budget.used == 0


def test_large_answers_count_as_bytes_that_wait(small):
    from vitfast.serving.limits import Limits

    content = png()
    room = len(content) + 32 * 48 * 3 + 2 * 3 * 64 * 4 + 1000  # for one, the form around it included
    with client({"small": small}, Limits(max_queue_bytes=room)) as server:
        assert server.post("/dense", files=files(content)).status_code == 200
        assert server.post("/embeddings", files=files(content)).status_code == 200
    with client({"small": small}, Limits(max_queue_bytes=room - 2000)) as server:
        assert server.post("/dense", files=files(content)).status_code == 429
        assert server.post("/embeddings", files=files(content)).status_code == 200
