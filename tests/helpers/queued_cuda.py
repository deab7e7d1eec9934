"""A stand-in for torch.cuda that keeps what a GPU keeps: work is queued on streams, and done later.

Tensors are the CPU's. A copy with non_blocking=True, a replayed graph and a forward are queued on the current
stream; a queue is in order, queues are not ordered among each other but by events. When the host waits for an
event, work is done until the event has happened, in one of several orders:

    "least"   no more than the event depends on, so that whatever else was queued comes as late as it can
    "most"    all that can be done
    seed      what a random generator picks, until the event has happened

A missing wait shows as a result that is wrong in one of the orders. Memory is not the allocator's: that a
buffer may be given to somebody else once it is free is not modelled, buffers are kept instead.
"""

import contextlib
import random
from collections import deque

import torch
from torch.overrides import TorchFunctionMode


class QueuedCuda:
    """torch.cuda as far as vitfast.engine.cuda_graphs and vitfast.engine.streaming use it.

    `log`: what the host did, in order. `without`: names of streams that do not wait for events, to see that it shows.
    """

    def __init__(self, order="least", without=()):
        self.order, self.without, self.log = order, without, []
        self._random = random.Random(order)
        self.streams = []
        outer = self

        class Stream:
            def __init__(self, device=None):
                self.queue, self.name = deque(), f"stream {len(outer.streams)}"
                outer.streams.append(self)

            def wait_event(self, event):
                if self.name not in outer.without:
                    self.queue.append(("wait", event, event.records))

            def wait_stream(self, other):
                event = Event()
                event.record(other)
                self.queue.append(("wait", event, event.records))

            def synchronize(self):
                event = Event()
                event.record(self)
                outer.wait_for(event, event.records)

        class Event:
            def __init__(self, blocking=False):
                self.records, self.happened = 0, 0  # how often recorded; how many of these the device has reached

            def record(self, stream):
                assert outer.capturing is None
                self.records += 1
                stream.queue.append(("event", self, self.records))

            def synchronize(self):
                outer.log.append("wait")
                outer.wait_for(self, self.records)

        class CUDAGraph:
            def __init__(self):
                self.work = None

            def replay(self):
                assert self.work is not None, "replayed before it was captured"
                outer.log.append("replay")
                outer.enqueue(self.work)

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph
        self.capturing = None
        self.default = Stream()
        self._current = [self.default]
        self.pools = []

    def current_stream(self):
        return self._current[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    @contextlib.contextmanager
    def device(self, device):
        yield

    def graph_pool_handle(self):
        self.pools.append([])
        return len(self.pools) - 1

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.drain()  # torch synchronises the device here
        self.log.append("capture")
        self.pools[pool].append(graph)
        self.capturing = graph
        with self.stream(stream):
            try:
                yield
            finally:
                self.capturing = None

    def memory_snapshot(self, pool):
        return [{"total_size": 1000} for _ in self.pools[pool]]

    def enqueue(self, work):
        assert self.capturing is None
        self.current_stream().queue.append(("work", work, 0))

    def forward(self, real):
        """A forward that is queued, or captured, instead of being done."""

        def forward(images, position):
            made = real(images, position)  # for the shapes; its values come later

            def work():
                made.copy_(real(images, position))

            for tensor in made.tensors():
                tensor.fill_(float("nan"))
            if self.capturing is None:
                self.log.append("eager")
                self.enqueue(work)
            else:
                self.capturing.work = work
            return made

        return forward

    # --- the device ---

    def _ready(self, stream):
        if not stream.queue:
            return False
        kind, event, number = stream.queue[0]
        return kind != "wait" or event.happened >= number

    def _step(self, stream):
        kind, what, number = stream.queue.popleft()
        if kind == "work":
            with torch.inference_mode(), torch._C.DisableTorchFunction():
                what()
        elif kind == "event":
            what.happened = number

    def wait_for(self, event, number):
        """Work until an event has happened as often as it had been recorded."""
        if self.order == "least":
            self._reach(event, number)
            return
        while event.happened < number or self.order == "most":
            ready = [stream for stream in self.streams if self._ready(stream)]
            if not ready:
                break
            self._step(ready[0] if self.order == "most" else self._random.choice(ready))
        assert event.happened >= number, "the host waits for what never comes"

    def _reach(self, event, number):
        stream = (
            next(s for s in self.streams if ("event", event, number) in s.queue) if event.happened < number else None
        )
        while event.happened < number:
            kind, what, count = stream.queue[0]
            if kind == "wait":
                self._reach(what, count)
            self._step(stream)

    def drain(self):
        """Do all that is queued."""
        while ready := [stream for stream in self.streams if self._ready(stream)]:
            self._step(ready[0])

    def in_flight(self):
        return any(stream.queue for stream in self.streams)


class Queueing(TorchFunctionMode):
    """Copies that need not be waited for go to the queue; pinned memory is ordinary memory, counted.

    `pinned`: the data pointers of tensors that pass for pinned. `allocations`: calls of torch.empty.
    """

    def __init__(self, cuda):
        super().__init__()
        self.cuda, self.pinned, self.allocations = cuda, set(), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.copy_ and kwargs.pop("non_blocking", False):
            to, source = args
            where = ["pinned" if t.data_ptr() in self.pinned else "device" for t in (source, to)]
            self.cuda.log.append(" ".join([self.cuda.current_stream().name, *where]))
            self.cuda.enqueue(lambda: to.copy_(source))
            return to
        if function is torch.Tensor.is_pinned:
            return args[0].data_ptr() in self.pinned
        if getattr(function, "__name__", "") == "empty":
            self.allocations += 1
            pin = kwargs.pop("pin_memory", False)
            tensor = function(*args, **kwargs)
            if pin:
                self.pinned.add(tensor.data_ptr())
            return tensor
        return function(*args, **kwargs)
