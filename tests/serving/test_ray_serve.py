"""The same app as a deployment of Ray Serve: its arguments, and a local cluster that answers the same."""

import asyncio
import socket

import httpx2 as httpx
import numpy as np
import pytest
import yaml
from helpers.engines import SMALL, engine
from helpers.scripts import ROOT
from helpers.serving import embedding, files, png

from vitfast.serving import ray_serve
from vitfast.serving.limits import Limits


def test_arguments():
    made = ray_serve.settings_of(
        {"model": "a=b", "options": {"dtype": "bf16"}, "limits": {"max_images": 3}, "api_keys": ["k"], "max_batch": 4}
    )
    assert (made.models, made.options) == ({"a": "b"}, {"dtype": "bf16"})
    assert (made.limits, made.api_keys, made.max_batch) == (Limits(max_images=3), ("k",), 4)
    assert ray_serve.settings_of({"models": ["org/x", "y=z"]}).models == {"org/x": "org/x", "y": "z"}
    for args, word in (
        ({}, "one of model and models"),
        ({"model": "a", "models": ["b"]}, "one of model and models"),
        ({"model": "a", "replicas": 2}, "unknown arguments replicas; known are api_keys"),
        ({"model": "a", "limits": {"max_imgs": 2}}, "unknown limits max_imgs; known are body_timeout"),
        ({"model": "a", "limits": {"max_images": 0}}, "max_images must be positive"),
    ):
        with pytest.raises(ValueError, match=word):
            ray_serve.settings_of(args)


def test_the_examples_config():
    (application,) = yaml.safe_load((ROOT / "examples" / "ray_serve.yaml").read_text())["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (module, getattr(ray_serve, name)) == (ray_serve.__name__, ray_serve.app)
    assert ray_serve.settings_of(application["args"]).models == {"dinov2": "facebook/dinov2-small"}
    assert [deployment["name"] for deployment in application["deployments"]] == [ray_serve.NAME]


@pytest.mark.filterwarnings("ignore:coroutine .*__del__. was never awaited")  # which Ray itself would
def test_what_a_replica_makes(tmp_path):
    """The deployment as it is sent to a replica, made there and asked, without a cluster."""
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: no deployment to make")
    from ray import cloudpickle
    from starlette.testclient import TestClient

    made = engine(SMALL)
    made.save(tmp_path / "model")
    config = {"models": {"small": str(tmp_path / "model")}, "options": {"device": "cpu"}, "limits": {"max_images": 2}}
    application = ray_serve.app(config)
    deployment = application._bound_deployment
    assert deployment.name == ray_serve.NAME
    kind = cloudpickle.loads(cloudpickle.dumps(deployment.func_or_class))
    replica = kind.__new__(kind)
    asyncio.run(replica.__init__())
    contents = [png(seed) for seed in range(3)]
    with TestClient(replica.app) as client:
        assert client.get("/health/ready").status_code == 200  # at once: it has warmed up
        answer = client.post("/embeddings", files=files(*contents[:2]))
        rows = np.float32([row["embedding"] for row in answer.json()["data"]])
        assert np.allclose(rows, np.stack([embedding(content, made) for content in contents[:2]]), atol=1e-4)
        assert client.post("/embeddings", files=files(*contents)).status_code == 413
    del replica._serve_asgi_lifespan  # its end is the client's here


@pytest.mark.full
def test_a_local_cluster_answers_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or it leaves a token in the home folder
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed: no cluster to test on")
    import ray

    made = engine(SMALL)
    made.save(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = {
            "models": {"small": str(tmp_path / "model")},
            "options": {"device": "cpu"},
            "limits": {"max_images": 3},
            "api_keys": ["secret"],
        }
        application = ray_serve.app(config)
        serve.run(application, name="vitfast", route_prefix="/")
        replicas = serve.status().applications["vitfast"].deployments[ray_serve.NAME].replica_states
        assert sum(replicas.values()) == 1
        contents = [png(seed) for seed in range(3)]
        key = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert client.get("/health/ready").status_code == 200
            answer = client.post("/embeddings", files=files(*contents), headers=key)
            rows = np.float32([row["embedding"] for row in answer.json()["data"]])
            assert np.allclose(rows, np.stack([embedding(content, made) for content in contents]), atol=1e-4)
            assert client.post("/embeddings", files=files(*contents)).status_code == 401
            refused = client.post("/embeddings", files=files(*contents, contents[0]), headers=key)
            assert refused.json()["error"]["code"] == "too_many_images"
            assert client.get("/models", headers=key).json()["data"][0]["id"] == "small"
            assert client.get("/").headers["content-type"].startswith("text/html")
    finally:
        serve.shutdown()
        ray.shutdown()
