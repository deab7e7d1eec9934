"""What a server holds while it runs: its models, what clients share, and which part of its life it is in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitfast.serving.limits import Budget, Limits, Refusal
from vitfast.serving.metrics import Metrics
from vitfast.serving.model import Decoding, ServedModel

if TYPE_CHECKING:
    from starlette.requests import Request

    from vitfast.engine.engine import Engine
    from vitfast.serving.model import Input, Row
    from vitfast.serving.requests import Body

log = logging.getLogger("vitfast.serving")


class Service:
    """Models and what they share.

    Args:
        engines: by the names that clients use; the first serves requests that name none.
        limits: of a request, and of all together.
        api_keys: one of which a client must show; nothing is asked for where there are none.
        max_batch, decode_threads, decode_memory: see `ServedModel` and `Decoding`.
        load: name -> a new engine of that model, for `reload`.

    Attributes:
        ready: warmed up. draining: no new request is taken. failed: what went wrong while warming up.
        requests: that have come in. in_flight: those that have not been answered.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        limits: Limits | None = None,
        *,
        api_keys: Sequence[str] = (),
        max_batch: int | None = None,
        decode_threads: int | None = None,
        decode_memory: int | None = None,
        load: Callable[[str], Engine] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.api_keys = tuple(api_keys)
        self.metrics = Metrics()
        self.budget = Budget(self.limits.max_queue_bytes)
        self.decoding = Decoding(decode_threads, decode_memory)
        self._load, self._max_batch, self._reloading = load, max_batch, False
        self.models = {name: self._served(name, engine) for name, engine in engines.items()}
        self.ready = self.draining = False
        self.failed: Exception | None = None
        self.in_flight = self.requests = 0
        self.metrics.watch(lambda: self.budget.used, lambda: self.in_flight)

    def _served(self, name: str, engine: Engine) -> ServedModel:
        return ServedModel(name, engine, self.limits, self.decoding, self.metrics, max_batch=self._max_batch)

    def warm_up(self) -> None:
        """Run every model that has not run, then be ready. What goes wrong is kept in `failed`."""
        try:
            for model in self.models.values():
                if not model.embedding_size:
                    model.warm_up()
            self.ready = True
        except Exception as error:
            self.failed = error

    async def reload(self) -> None:
        """Load the models anew, each to take over when it has warmed up; until then the old ones go on, and after.

        A model that cannot be loaded leaves the old one where it is. What is asked for during a reload is that reload.
        """
        if self._load is None or self._reloading:
            return
        self._reloading = True
        try:
            for name in self.models:
                await self._replace(name, self._load)
        finally:
            self._reloading = False

    async def _replace(self, name: str, load: Callable[[str], Engine]) -> None:
        log.info("loading %s anew", name)
        new: ServedModel | None = None
        try:
            new = self._served(name, await asyncio.to_thread(load, name))
            await asyncio.to_thread(new.warm_up)
        except Exception:  # whatever loading and running a model raises
            log.exception("%s cannot be loaded anew; the one before goes on", name)
            self.metrics.reloads(name, "failed")
            if new is not None:
                await asyncio.to_thread(new.close)
                self.models[name].watch()
            return
        old, self.models[name] = self.models[name], new
        log.info("%s has been loaded anew", name)
        self.metrics.reloads(name, "done")
        while old.users:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(old.close)

    def close(self) -> None:
        """Finish what has been taken, and end all threads."""
        for model in self.models.values():
            model.close()
        self.decoding.close()

    def model(self, name: object) -> ServedModel:
        """A model by its name, or the first.

        Raises:
            Refusal: 404 if there is none of that name.
        """
        from vitfast.serving.requests import shown

        if name is None:
            return next(iter(self.models.values()))
        if not isinstance(name, str) or name not in self.models:
            known = ", ".join(self.models)
            raise Refusal(404, f"there is no model {shown(name)}; there are {known}", "model_not_found", "model")
        return self.models[name]

    def predicted_wait(self) -> float:
        """Of the model that is least busy: where that is too long, no request need be read."""
        return min(model.predicted_wait() for model in self.models.values())

    async def rows(
        self, request: Request, body: Body, model: ServedModel, inputs: Sequence[Input], *, dense: bool = False
    ) -> list[Row]:
        """Every input's row, in order; with `dense` the features of the images' patches.

        Raises:
            Refusal: for an image that cannot be used, when the client is gone, when time is up, if the server is too
                busy, or the model has failed.
        """
        import numpy as np

        from vitfast.images.decode import ImageError
        from vitfast.serving.batching import Failed
        from vitfast.serving.requests import refuse_when_late

        refuse_when_late(model.predicted_wait(), self.limits)
        body.hold(sum(model.bytes_of(given, dense) for given in inputs))
        futures = model.submit(inputs, dense=dense)
        all_rows: asyncio.Future[list[Row]] = asyncio.gather(*map(asyncio.wrap_future, futures))
        gone: asyncio.Future[None] = asyncio.ensure_future(_disconnected(request))
        timeout = self.limits.request_timeout
        try:
            waited: list[asyncio.Future[Any]] = [all_rows, gone]
            await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if all_rows.done():
                rows = all_rows.result()
            elif gone.done():
                raise Refusal(499, "the client has closed the connection")
            else:
                raise Refusal(503, f"there was no answer within {timeout:g} s", "timeout", headers={"Retry-After": "1"})
        except ImageError as error:
            raise Refusal(400, f"{error.path}: {error.reason}", "image_not_usable", "input") from None
        except Failed as error:
            raise Refusal(500, f"the model failed on this request ({error})", "model_failed") from None
        finally:
            gone.cancel()
            all_rows.cancel()
            for future in futures:  # of a request that fails, what waits leaves the queue
                future.cancel()
        for index, row in enumerate(rows):
            if not np.isfinite(row.embedding).all():
                kind = "text" if isinstance(inputs[index], str) else "image"
                raise Refusal(500, f"{kind} {index}: the model's output is not finite", "model_failed")
        return rows


async def _disconnected(request: Request) -> None:
    """Until the client is gone; the whole body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
