"""Batches of images that come one by one: what is run together, when, and what becomes of each."""

import threading
import time

import numpy as np
import pytest

from vitfast.serving.batching import Batcher, BatchTimes, Failed


class Model:
    """Says what it was given; works on nothing while `gate` is closed."""

    def __init__(self):
        self.gate, self.started = threading.Event(), threading.Event()
        self.gate.set()
        self.batches = []

    def __call__(self, given):
        self.started.set()
        assert self.gate.wait(30)
        self.batches.append(list(given))
        if 99 in given:
            raise RuntimeError("99")
        return [f"made of {value}" for value in given]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def make(model):
    made = []

    def make(**options):
        made.append(Batcher(model, **{"max_batch": 4, "max_wait": 30.0, **options}))
        return made[-1]

    yield make
    model.gate.set()
    for batcher in made:
        batcher.close()


def put(batcher, *values):
    entries = [batcher.expect() for _ in values]
    for entry, value in zip(entries, values, strict=True):
        batcher.put(entry, int(value))
    return [entry.future for entry in entries]


def hold(model, batcher):
    """Have the model busy with an image 0."""
    model.gate.clear()
    model.started.clear()
    put(batcher, 0)
    assert model.started.wait(30)


def values(futures):
    return [int(future.result(30).removeprefix("made of ")) for future in futures]


def test_alone_waits_for_nobody(make):
    started = time.perf_counter()
    assert values(put(make(), 7)) == [7]
    assert time.perf_counter() - started < 10  # of max_wait's 30 s


def test_batches_fill_while_the_model_works(model, make):
    batcher = make()
    hold(model, batcher)
    futures = put(batcher, *range(1, 8))
    assert batcher.waiting == 7
    model.gate.set()
    assert values(futures) == list(range(1, 8))
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]


def test_waits_for_what_is_on_its_way(model, make):
    batcher = make()
    late = batcher.expect()
    futures = put(batcher, 1)
    time.sleep(0.05)
    assert model.batches == []
    batcher.put(late, 2)
    assert values(futures) == [1]
    assert model.batches == [[1, 2]]


def test_waits_no_longer_than_it_may(model, make):
    batcher = make(max_wait=0.02)
    late = batcher.expect()
    assert values(put(batcher, 1)) == [1]
    batcher.fail(late, ValueError("bad"))
    assert isinstance(late.future.exception(), ValueError)


def test_does_not_wait_for_what_fails(model, make):
    batcher = make()
    late = batcher.expect()
    futures = put(batcher, 1)
    batcher.fail(late, ValueError("bad"))
    assert values(futures) == [1]


def test_cancelled_images_leave_the_queue(model, make):
    batcher = make()
    hold(model, batcher)
    futures = put(batcher, 1, 2, 3)
    assert futures[1].cancel()
    assert batcher.waiting == 2
    coming = batcher.expect()
    assert coming.future.cancel()
    batcher.put(coming, 4)
    assert batcher.waiting == 2
    model.gate.set()
    assert values([futures[0], futures[2]]) == [1, 3]
    assert model.batches == [[0], [1, 3]]


def test_a_failure_ends_its_batch_alone(model, make):
    batcher = make()
    hold(model, batcher)
    futures = put(batcher, 1, 99, 3, 4, 5)
    model.gate.set()
    for future in futures[:4]:
        with pytest.raises(Failed, match="RuntimeError"):
            future.result(30)
    assert values(futures[4:]) == [5]


def test_close_finishes_what_is_announced(model, make):
    batcher = make()
    late = batcher.expect()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.02)
    assert closing.is_alive()
    batcher.put(late, 8)
    closing.join(30)
    assert values([late.future]) == [8]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.expect()


def test_predicted_wait(model, make):
    batcher = make()
    assert batcher.predicted_wait() == 0
    for size, seconds in ((1, 10.0), (2, 12.0), (4, 16.0)):
        batcher.times.note(size, seconds)
    hold(model, batcher)
    assert batcher.predicted_wait() == pytest.approx(10, abs=1)
    futures = put(batcher, *range(1, 7))
    announced = batcher.expect()
    assert batcher.predicted_wait() == pytest.approx(10 + 16 + 16, abs=1)  # running, four, three
    batcher.fail(announced, ValueError())
    assert batcher.predicted_wait() == pytest.approx(10 + 16 + 12, abs=1)
    for future in futures:
        future.cancel()
    assert batcher.predicted_wait() == pytest.approx(10, abs=1)


def test_batch_times():
    times = BatchTimes()
    assert times.expected(8) == 0
    times.note(3, 1.0)
    assert times.expected(4) == times.expected(1) == 1
    assert times.expected(16) == 4  # four times as many
    times.note(4, 2.0)
    assert 1 < times.expected(4) < 2


def test_many_threads_get_their_own_answers(make):
    batcher = make(max_batch=8, max_wait=0.001)
    wrong = []

    def work(seed):
        for value in np.random.default_rng(seed).integers(0, 99, 100):
            if values(put(batcher, value)) != [value]:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_observers_are_told(model):
    told = []
    batcher = Batcher(model, max_batch=4, max_wait=1, observe=lambda *batch: told.append(batch))
    hold(model, batcher)
    futures = put(batcher, 1, 2)
    model.gate.set()
    values(futures)
    batcher.close()
    assert [size for size, _, _ in told] == [1, 2]
    assert len(told[1][1]) == 2
    assert all(wait >= 0 for wait in told[1][1])
