"""The same server as a deployment of Ray Serve: replicas on many machines, autoscaling, fractions of GPUs.

    serve run vitfast.serving.ray_serve:app model=facebook/dinov2-small

or a config file (examples/ray_serve.yaml), whose `args` are those of `app` and whose `deployments` say how many
replicas there are and what each takes. Needs `pip install 'vitfast[ray]'`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vitfast.serving.app import create_app, require
from vitfast.serving.limits import Limits
from vitfast.serving.model import served_names
from vitfast.serving.settings import Settings

if TYPE_CHECKING:
    from vitfast.serving.gate import Gate

NAME = "vitfast"
"""Of the deployment, for config files."""


def app(args: Mapping[str, Any]) -> Any:
    """A Ray Serve application.

    Args:
        args: `model`, one; or `models`, a list of NAME=MODEL, hub ids and paths, or names with what is loaded.
            `options` of `vitfast.load`; `limits` (see `vitfast.serving.limits.Limits`); `api_keys`, `max_batch`,
            `decode_threads`, `decode_memory` (see `vitfast.serving.service.Service`).

    Returns:
        What `ray.serve.run` and a config file's import_path take. A replica is ready when its models have run, and
        refuses what is too much for it, as one process of `vitfast serve` does.

    Raises:
        ValueError: for arguments that there are not. ImportError: without Ray Serve; the message says how to get it.
    """
    require()
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError(f"this needs Ray Serve ({error}): pip install 'vitfast[ray]'") from error
    settings = settings_of(args)

    def build() -> Gate:
        """In the replica: `serve.ingress` knows an app's builder by its being a function."""
        service = settings.service()
        service.warm_up()
        if service.failed is not None:
            raise service.failed
        return create_app(service)

    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=settings.limits.max_connections,
        graceful_shutdown_timeout_s=settings.limits.drain_timeout,
    )
    return deployment(serve.ingress(build)()).bind()


def settings_of(args: Mapping[str, Any]) -> Settings:
    """Arguments of `app` as settings.

    Raises:
        ValueError: for others than there are, or no model.
    """
    known = {"model", "models", "options", "limits", "api_keys", "max_batch", "decode_threads", "decode_memory"}
    if unknown := set(args) - known:
        raise ValueError(f"unknown arguments {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    given = dict(args)
    models = given.pop("models", None) or [given.pop("model", None)]
    if not models or models == [None] or "model" in given:
        raise ValueError("give one of model and models")
    names = {field.name for field in fields(Limits)}
    limits = given.pop("limits", {})
    if unknown := set(limits) - names:
        raise ValueError(f"unknown limits {', '.join(sorted(unknown))}; known are {', '.join(sorted(names))}")
    keys = tuple(given.pop("api_keys", ()))
    named = dict(models) if isinstance(models, Mapping) else served_names(models)
    return Settings(named, limits=Limits(**limits), api_keys=keys, **given)
