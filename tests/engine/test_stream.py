"""Engine.stream, graphs, memory: on the CPU, on queues that stand for a GPU's streams, on a GPU if there is one."""

import contextlib
import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch
from helpers.queued_cuda import QueuedCuda, Queueing

import vitfast
from vitfast import testing
from vitfast.engine import cuda_graphs, streaming
from vitfast.engine.engine import Engine
from vitfast.images.preprocess import Preprocess

PREPROCESS = Preprocess((32, 48), (32, 48), "bicubic", center_crop=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
SMALL = vitfast.ViTConfig((32, 48), (16, 16), width=64, depth=1, heads=2, mlp_dim=128, num_classes=10, name="small")
ORDERS = ("least", "most", 0, 1, 2)
DEFAULT, CAPTURES, UPLOAD, DOWNLOAD = (f"stream {i}" for i in range(4))


def engine(config=SMALL, device="cpu", seed=0, **options):
    checkpoint = vitfast.Checkpoint(config, testing.random_weights(config, seed), PREPROCESS)
    return Engine(checkpoint, **{"device": device, "dtype": "fp32", "backend": "torch"} | options)


def pixels(*sizes, seed=0):
    """Batches of random uint8 images, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n, 32, 48, 3), generator=generator, dtype=torch.uint8) for n in sizes]


def same(got, want, **tolerance):
    for mine, others in zip(got.tensors(), want.tensors(), strict=True):
        torch.testing.assert_close(mine.cpu(), others.cpu(), **(tolerance or {"rtol": 0.0, "atol": 0.0}))


class Queues:
    """An engine whose work goes to the queues of a QueuedCuda."""

    def __init__(self, config=SMALL, buckets=(1, 2, 4), **options):
        self.cuda, self.engine = QueuedCuda(**options), engine(config)
        self.mode = Queueing(self.cuda)
        runner = self.engine.runner
        runner.forward = self.cuda.forward(runner.forward)
        self.engine._graphs = cuda_graphs.Graphs(runner, buckets, cuda=self.cuda) if buckets else None

    def stream(self, batches, preprocessed=True, tokens=True):
        upload, download = self.cuda.Stream(), self.cuda.Stream()
        self.lanes = [
            streaming.GpuLane(
                self.engine.runner, self.engine.run_into, upload, download,
                preprocessed=preprocessed, tokens=tokens, cuda=self.cuda,
            )
            for _ in range(streaming.LANES)
        ]  # fmt: skip
        outputs = streaming.run(self.lanes, batches)
        with contextlib.closing(outputs):
            while True:
                with self.mode:
                    output = next(outputs, None)
                if output is None:
                    return
                yield output


# --- on the CPU ---


def test_a_stream_gives_what_calls_give():
    small, batches = engine(), pixels(3, 5, 1)
    batches += [testing.make(2, 3, 32, 48).cpu(), pixels(0)[0], torch.zeros(1, 40, 50, 3, dtype=torch.uint8)]
    outputs = list(small.stream(iter(batches), tokens=True))
    for output, batch in zip(outputs, batches, strict=True):
        same(output, small(batch))
    assert next(small.stream(batches)).tokens is None


def test_a_batch_may_be_a_list_of_arrays():
    (batch,) = pixels(3)
    for streamed in (engine().stream, Queues().stream):
        (output,) = streamed([list(batch.numpy())], preprocessed=True, tokens=True)
        same(output, engine()(batch))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 32, 48, 4, dtype=torch.uint8), "batch 2: .*got 4 channels"),
        (torch.zeros(2, 3, 32, 32), "batch 2: image size 32x32: this model takes 32x48 only"),
        ([], "batch 2: .*at least one image"),
        ([np.zeros((32, 48, 3))], r"batch 2: .*got float64 \(32, 48, 3\)"),
        ([np.zeros((32, 48, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)], "batch 2: all input arrays must have"),
        (OSError("the disk is gone"), "^the disk is gone"),
    ],
)
@pytest.mark.parametrize("where", ["cpu", "queues"])
def test_what_goes_wrong_comes_after_the_outputs_before_it(bad, message, where):
    def source():
        yield from pixels(2, 1)
        if isinstance(bad, Exception):
            raise bad
        yield bad

    outputs = engine().stream(source()) if where == "cpu" else Queues().stream(source())
    sizes = [len(next(outputs).embedding) for _ in range(2)]
    assert sizes == [2, 1]
    with pytest.raises(type(bad) if isinstance(bad, Exception) else ValueError, match=message):
        next(outputs)


def test_threads_share_an_engine_and_engines_a_process():
    engines = [engine(seed=seed) for seed in range(2)]
    batches = [pixels(3, 1, 2, seed=seed) for seed in range(3)]
    want = {(e, b): [engines[e](batch) for batch in batches[b]] for e in range(2) for b in range(3)}
    got, failed = {}, []

    def run(e, b):
        try:
            got[e, b] = list(engines[e].stream(batches[b], tokens=True)) * 1
            for batch, expected in zip(batches[b], want[e, b], strict=True):
                same(engines[e](batch), expected)
        except BaseException as error:  # reported below: a thread's own exception fails no test
            failed.append(error)

    threads = [threading.Thread(target=run, args=key) for key in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for key, outputs in want.items():
        for mine, others in zip(got[key], outputs, strict=True):
            same(mine, others)


def test_memory_of_weights():
    small = engine()
    weights = testing.random_weights(SMALL)
    count = sum(t.numel() for t in weights.values())
    patch = weights["patch_embed.weight"].numel() + SMALL.width  # the second patch embedding is for uint8
    assert small.memory() == {"weights": 4 * (count + patch), "graphs": 0, "idle": 0, "staging": 0, "pinned": 0}
    assert repr(small) == f"Engine(small, cpu, float32, torch, {4 * (count + patch) / 2**20:.1f} MiB of weights)"


# --- on queues ---


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("buckets", [(1, 2, 4), None], ids=["graphs", "eager"])
def test_streams_wait_for_each_other_where_they_must(order, buckets):
    """Whatever order the GPU does things in; more images than the largest bucket, fewer, none, and floats."""
    plain, batches = engine(), [*pixels(4, 4, 4, 9, 3, 1), *pixels(0, 4), testing.make(2, 3, 32, 48).cpu(), *pixels(4)]
    outputs = list(Queues(buckets=buckets, order=order).stream(batches))
    for output, batch in zip(outputs, batches, strict=True):
        same(output, plain(batch), rtol=1e-5, atol=1e-5)  # the CPU sums otherwise in batches of other sizes


@pytest.mark.parametrize("stream_name", [DEFAULT, DOWNLOAD])
def test_a_missing_wait_shows(stream_name):
    """The computation waits for the upload, the download for the computation."""
    plain, batches = engine(), pixels(4, 4, 4, 4)
    wrong = 0
    for order in ORDERS:
        outputs = Queues(order=order, without={stream_name}).stream(batches)
        for output, batch in zip(outputs, batches, strict=True):
            wrong += not torch.equal(output.embedding, plain(batch).embedding)
    assert wrong


@pytest.mark.parametrize("waits", [True, False])
def test_replays_on_different_streams_take_turns(waits):
    """Two threads' streams, one engine: the second replay waits for the first, which shares its buffers."""
    plain, batches = engine(), pixels(4, 4)
    wrong = 0
    for order in ORDERS:
        queues = Queues(order=order, without=set() if waits else {"stream 2", "stream 3"})
        cuda, small, outputs = queues.cuda, queues.engine, []
        streams = [cuda.Stream(), cuda.Stream()]
        with queues.mode:
            for batch, there in zip(batches, streams, strict=True):
                with cuda.stream(there):
                    outputs.append(small(batch))
            for there in reversed(streams):
                there.synchronize()
        for output, batch in zip(outputs, batches, strict=True):
            wrong += not torch.equal(output.embedding, plain(batch).embedding)
    assert bool(wrong) == (not waits)


def test_the_steady_state_allocates_nothing_and_waits_for_results_only():
    queues = Queues()
    outputs = queues.stream(pixels(*[4] * 8))
    next(outputs)
    next(outputs)
    before, mark = queues.mode.allocations, len(queues.cuda.log)
    kept = list(itertools.islice(outputs, 5))
    assert queues.mode.allocations == before
    log = queues.cuda.log[mark:]
    launched = [f"{UPLOAD} pinned device", f"{DEFAULT} device device", "replay", *[f"{DEFAULT} device device"] * 3]
    returned = [f"{DOWNLOAD} device pinned"] * 3
    assert log[: len(launched) + 4] == [*launched, *returned, "wait"]
    assert log.count("wait") == 5 and log.count("replay") == 5 and "capture" not in log
    same(kept[0], engine()(pixels(*[4] * 8)[2]))  # the caller's own: later batches do not change it


def test_the_next_batch_is_under_way_while_an_output_is_used():
    queues = Queues()
    for output in queues.stream(pixels(*[2] * 5), tokens=False):
        assert output.tokens is None
        log = queues.cuda.log
        assert log.count("replay") == min(5, log.count("wait") + 1)


def test_a_pinned_batch_is_uploaded_from_where_it_is():
    queues, (batch,) = Queues(), pixels(4)
    queues.mode.pinned.add(batch.data_ptr())
    stacked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.GpuLane, "_room_for_pixels", spy(streaming.GpuLane._room_for_pixels, stacked))
        (output,) = queues.stream([batch])
    same(output, engine()(batch))
    (staging,) = stacked
    assert not torch.equal(staging, batch)  # the pixels did not go through the lane's own pinned memory


def spy(room, made):
    def call(*args):
        pinned, pixels = room(*args)
        made.append(pinned.fill_(7))
        return pinned, pixels

    return call


@pytest.mark.parametrize("order", ORDERS)
def test_breaking_off_waits_for_what_is_under_way(order):
    queues = Queues(order=order)
    outputs = queues.stream(pixels(*[4] * 5))
    next(outputs)
    assert queues.cuda.in_flight() or order == "most"
    with queues.mode:
        outputs.close()
    assert not any(lane._download.queue or lane._upload.queue for lane in queues.lanes)


def test_memory_of_graphs_and_lanes():
    queues = Queues()
    outputs = queues.stream(pixels(4, 4, 4))
    next(outputs)
    next(outputs)
    queues.engine._lanes.update(queues.lanes)
    batch, result = 4 * 32 * 48 * 3, 4 * 4 * (7 * 64 + 64 + 10)
    found = queues.engine.memory()
    assert found["staging"] == found["pinned"] == 2 * (batch + result)
    assert found["graphs"] == batch + 1000  # the input, and the pool, as QueuedCuda has it
    del outputs
    queues.lanes.clear()
    assert queues.engine.memory()["staging"] == 0


def test_graphs_are_few_share_a_pool_and_keep_what_they_read(monkeypatch):
    """More image sizes than position embeddings are kept for: a graph still reads its own."""
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 10)
    config = dataclasses.replace(SMALL, dynamic_size=True)
    plain, queues = engine(config), Queues(config)
    batches = [testing.make(1, 3, 16 * (1 + i), 16, seed=i).cpu() for i in range(12)]
    for _ in range(2):
        for batch in batches:
            with queues.mode:
                output = queues.engine(batch)
                queues.cuda.drain()
            same(output, plain(batch))
    captured = queues.engine._graphs._captured
    assert len(captured) == 10 and len(queues.engine.runner.positions) <= 8
    assert all(graph.positions.embedding is not None for graph in captured.values())
    assert len(queues.cuda.pools) == 1


def test_the_least_recently_used_graph_goes_first(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    queues = Queues()
    for size in (1, 2, 1, 4):  # when 4 comes, 1 was used after 2
        with queues.mode:
            queues.engine(pixels(size)[0])
            queues.cuda.drain()
    assert [bucket for bucket, *_ in queues.engine._graphs._captured] == [1, 4]
    assert queues.cuda.log.count("capture") == 3
    with queues.mode:
        queues.engine(pixels(1)[0])
        queues.cuda.drain()
    assert queues.cuda.log.count("capture") == 3


def test_buckets_are_positive():
    with pytest.raises(ValueError, match=r"buckets must be positive batch sizes, got \(0,\)"):
        Queues(buckets=(0,))


# --- on a GPU ---

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need an NVIDIA GPU")


@pytest.mark.gpu
@pytest.mark.device
@needs_gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("use_graphs", [True, False])
def test_gpu_stream_gives_what_calls_give(backend, use_graphs):
    small = engine(device="cuda", dtype="bf16", backend=backend, graphs=use_graphs, buckets=(1, 4))
    batches = [*pixels(4, 4, 9, 3, 1, 0, 4), testing.make(2, 3, 32, 48), torch.zeros(1, 40, 50, 3, dtype=torch.uint8)]
    batches += [pixels(2)[0].pin_memory(), pixels(2)[0].cuda()]
    outputs = list(small.stream(iter(batches), tokens=True))
    for output, batch in zip(outputs, batches, strict=True):
        assert output.embedding.device.type == "cpu" and not output.embedding.is_pinned()
        same(output, small(batch))


@pytest.mark.gpu
@pytest.mark.device
@needs_gpu
@pytest.mark.parametrize("raw", [False, True], ids=["preprocessed", "to be resized"])
def test_gpu_steady_state_neither_allocates_nor_synchronises(raw):
    small = engine(device="cuda", dtype="bf16", buckets=(4,))
    batches = [torch.zeros(4, 40, 50, 3, dtype=torch.uint8)] * 20 if raw else pixels(*[4] * 20)
    outputs = small.stream(batches, preprocessed=not raw)
    for _ in range(4):
        next(outputs)
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(itertools.islice(outputs, 10))) == 10
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    for name in ("segment.all.allocated", *(() if raw else ("allocation.all.allocated",))):
        assert after[name] == before[name], name
    found = small.memory()
    assert all(found[name] > 0 for name in ("weights", "graphs", "staging", "pinned"))
    assert len(list(outputs)) == 6


@pytest.mark.gpu
@pytest.mark.device
@needs_gpu
def test_gpu_threads_streams_and_engines_side_by_side():
    """Each thread on its own stream, captures among them, while others run."""
    engines = [engine(device="cuda", dtype="bf16", seed=seed, buckets=(1, 2, 4)) for seed in range(2)]
    plain = [engine(device="cuda", dtype="bf16", seed=seed, graphs=False) for seed in range(2)]
    batches = [pixels(*[4, 1, 3, 2] * 5, seed=seed) for seed in range(3)]
    jobs = list(itertools.product(range(2), range(3)))
    got, failed = {}, []

    def run(e, b):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                outputs = [engines[e](batch.cuda()) for batch in batches[b]]
                torch.cuda.current_stream().synchronize()
                got[e, b] = outputs, list(engines[e].stream(batches[b], tokens=True))
        except BaseException as error:  # reported below: a thread's own exception fails no test
            failed.append(error)

    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for e, b in jobs:
        for called, streamed, batch in zip(*got[e, b], batches[b], strict=True):
            same(called, streamed)
            torch.testing.assert_close(called.logits, plain[e](batch).logits, rtol=0.02, atol=0.02)
