"""What a server is made of, as values that another process can be sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vitfast.engine.load import load
from vitfast.serving.batching import Alone
from vitfast.serving.limits import Limits
from vitfast.serving.service import Service

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine


@dataclass(frozen=True)
class Settings:
    """Models and how they are served.

    Attributes:
        models: the name that clients use -> what `vitfast.load` is given. The first serves requests that name none.
        options: of `vitfast.load`, the same for all.
        limits, api_keys, max_batch, decode_threads, decode_memory: see `vitfast.serving.service.Service`.
    """

    models: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_batch: int | None = None
    decode_threads: int | None = None
    decode_memory: int | None = None

    def engine(self, name: str) -> Engine:
        """Load a model, in a thread that ends, and with it OpenMP's team. Errors: as `vitfast.load`."""
        alone = Alone("vitfast-load")
        try:
            return alone.do(load, self.models[name], **self.options)
        finally:
            alone.close()

    def service(self) -> Service:
        """Load all models. Errors: as `vitfast.load` and `Service`."""
        return Service(
            {name: self.engine(name) for name in self.models},
            self.limits,
            api_keys=self.api_keys,
            max_batch=self.max_batch,
            decode_threads=self.decode_threads,
            decode_memory=self.decode_memory,
            load=self.engine,
        )

    def on_device(self, index: int) -> Settings:
        """For the worker of that number: the GPUs are dealt out in turn, unless one is named."""
        import torch

        device = self.options.get("device")
        if device not in (None, "cuda") or not torch.cuda.is_available():
            return self
        return replace(self, options={**self.options, "device": f"cuda:{index % torch.cuda.device_count()}"})
