"""vitfast.pipeline.embed: the pipeline and classes."""

import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from helpers import engines
from helpers.photos import FakeEngine, expected, make_photos, save
from PIL import Image

from vitfast.images.files import collect
from vitfast.images.preprocess import Preprocess
from vitfast.pipeline import embed
from vitfast.pipeline.embed import classify_images, embed_images
from vitfast.pipeline.memory import Memory, default_limit
from vitfast.pipeline.sources import item
from vitfast.pipeline.stages import Stages


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


# --- the pipeline ---


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 2), (4, 4), (64, 3)])
def test_every_image_has_its_own_status_in_order(photos, batch_size, workers):
    engine = FakeEngine()
    paths = collect([photos])
    results = list(embed_images(engine, paths, batch_size=batch_size, workers=workers))
    assert [r.path for r in results] == paths
    bad = {r.path.name: r.status for r in results if r.status != "ok"}
    assert bad.keys() == {"b00.jpg", "b99.jpg", "p45.jpg"}
    assert "known format" in bad["b00.jpg"]
    assert "truncated" in bad["b99.jpg"].lower()
    assert "empty" in bad["p45.jpg"]
    for result in results:
        if result.status == "ok":
            np.testing.assert_allclose(result.embedding, expected(result.path), rtol=1e-5)
        else:
            assert result.embedding is None
    assert sum(engine.batches) == 10
    assert max(engine.batches) <= batch_size


def test_batches_of_one_shape(photos):
    """Bad pictures between them, a last batch that is not full: the model sees whole batches, nothing else changes."""
    engine = FakeEngine()
    results = list(embed_images(engine, collect([photos]), batch_size=4, batch_invariant=True))
    assert set(engine.batches) == {4}
    for result in results:
        if result.status == "ok":
            np.testing.assert_allclose(result.embedding, expected(result.path), rtol=1e-5)
    assert sum(result.status == "ok" for result in results) == 10 and len(results) == 13


class SmallEngine(FakeEngine):
    """With memory for so many images at once."""

    room = 3

    def __call__(self, images, *, preprocessed):
        if len(images) > self.room:
            self.refused = [*getattr(self, "refused", []), len(images)]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().__call__(images, preprocessed=preprocessed)


def test_batches_that_memory_is_too_short_for_come_again_in_halves(photos):
    """Each image once and in order, the bad ones too; what did not fit is not tried again."""
    engine, stages = SmallEngine(), Stages()
    results = list(embed_images(engine, collect([photos]), batch_size=64, stages=stages))
    assert [result.path for result in results] == collect([photos])
    for result in results:
        if result.status == "ok":
            np.testing.assert_allclose(result.embedding, expected(result.path), rtol=1e-5)
    assert sum(result.status == "ok" for result in results) == 10
    assert engine.refused == [8, 4] and max(engine.batches) == 2 and sum(engine.batches) == 10
    assert "in batches of at most 2 for want of memory" in stages.advice()


def test_memory_that_is_too_short_for_one_image_or_for_batches_of_one_shape_is_an_error(photos):
    engine = SmallEngine()
    with pytest.raises(torch.OutOfMemoryError):
        list(embed_images(engine, collect([photos]), batch_size=4, batch_invariant=True))
    engine.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(embed_images(engine, collect([photos])))
    assert engine.refused[-4:] == [8, 4, 2, 1]


def test_memory_that_is_too_short_for_a_source_is_an_error(photos):
    """Not of the model's: what the source still had is gone, and to go on would lose it without a word."""

    def broken():
        yield from collect([photos])[:6]
        raise MemoryError("a list of names that is too long")

    with pytest.raises(MemoryError, match="a list of names"):
        list(embed_images(FakeEngine(), broken(), batch_size=2, workers=1))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_bits_do_not_depend_on_the_others(photos, backend):
    """Alone, in another order and among fewer: a model's own bits, by PyTorch's ops and by what a plan takes."""
    made = engines.engine(backend=backend)
    paths = [path for path in collect([photos]) if path.suffix == ".png"]

    def bits(some):
        results = embed_images(made, some, batch_size=5, batch_invariant=True)
        return {result.path: result.embedding.tobytes() for result in results}

    whole = bits(paths)
    assert bits(paths[::-1]) == whole
    for count in (1, 3):
        few = bits(paths[-count:])
        assert few == {path: whole[path] for path in few}


def test_only_bad_images_and_no_images(photos):
    engine = FakeEngine()
    results = list(embed_images(engine, [photos / "b00.jpg", photos / "missing.png"] * 20, batch_size=4))
    assert len(results) == 40
    assert all(r.status != "ok" for r in results)
    assert list(embed_images(engine, [])) == []
    assert engine.batches == []


def test_an_image_that_cannot_be_resized_is_only_its_own_problem(photos):
    engine = FakeEngine(preprocess=Preprocess((8, 8), None, center_crop=False))
    save(photos / "a.png")
    Image.new("RGB", (8, 8)).save(photos / "fits.png")
    results = {r.path.name: r.status for r in embed_images(engine, [photos / "a.png", photos / "fits.png"])}
    assert results["fits.png"] == "ok"
    assert "12x16" in results["a.png"]


def test_a_decompression_bomb_is_only_its_own_problem(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    Image.new("RGB", (100, 100)).save(photos / "bomb.png")
    results = {r.path.name: r.status for r in embed_images(FakeEngine(), collect([photos]))}
    assert "too many pixels" in results["bomb.png"]
    assert results["p0.png"] == "ok"


def test_output_that_is_not_finite_is_said(photos):
    class Overflowing(FakeEngine):
        def __call__(self, images, *, preprocessed):
            output = super().__call__(images, preprocessed=preprocessed)
            output.embedding[0] = float("inf")
            return output

    statuses = [r.status for r in embed_images(Overflowing(), [photos / "p0.png", photos / "p1.png"])]
    assert "not finite" in statuses[0]
    assert statuses[1] == "ok"


def test_decoding_stays_a_bounded_way_ahead(photos, monkeypatch):
    """A folder of millions must not be decoded into memory while the model is busy."""
    started = []
    original = item.regular_file

    def counting(path):
        started.append(path)
        return original(path)

    monkeypatch.setattr(item, "regular_file", counting)
    others = set(threading.enumerate())
    results = embed_images(FakeEngine(), [photos / "p0.png"] * 500, batch_size=4, workers=2)
    next(results)
    assert len(started) < 40
    assert set(threading.enumerate()) - others
    results.close()
    assert set(threading.enumerate()) <= others


def test_a_thread_that_hangs_does_not_outlast_an_interrupt(photos, monkeypatch):
    """As one does in a file system that does not answer."""
    hanging, answered, original = threading.Event(), threading.Event(), item.regular_file

    def slow(path):
        if path.name == "p3.png":
            hanging.set()
            answered.wait(60)
        return original(path)

    monkeypatch.setattr(item, "regular_file", slow)
    results = embed_images(FakeEngine(), [photos / f"p{i}.png" for i in range(6)], batch_size=1, workers=2)
    next(results)
    assert hanging.wait(30)
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    seconds = time.perf_counter() - started
    answered.set()
    assert seconds < 30  # of the 60 that the thread would hang


class Unkind(Exception):
    def __str__(self):
        return "two\nlines"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "MemoryError: there is not enough memory"),
        (ValueError("too small"), "too small"),
        (Unkind(), "Unkind: two lines"),
        (BaseException("a panic in Rust"), "BaseException: a panic in Rust"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_whatever_goes_wrong_with_one_image_is_its_status(error, status, photos, monkeypatch):
    original = embed.resize_and_crop

    def failing(image, preprocess):
        if image.size == (5, 5):
            raise error
        return original(image, preprocess)

    Image.new("RGB", (5, 5)).save(photos / "odd.png")
    monkeypatch.setattr(embed, "resize_and_crop", failing)
    results = {r.path.name: r for r in embed_images(FakeEngine(), collect([photos]), batch_size=2)}
    assert results["odd.png"].status.startswith(status)
    assert results["odd.png"].embedding is None
    assert sum(r.status == "ok" for r in results.values()) == 10


def test_a_pipe_and_a_lie_about_the_size_stop_nothing(photos):
    os.mkfifo(photos / "x.jpg")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 89 * 10**6, 8, 2, 0, 0, 0))
    (photos / "tall.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(400))) + chunk(b"IEND", b"")
    )
    engine = FakeEngine(preprocess=Preprocess((8, 8), (9, 9)))
    results = {r.path.name: r.status for r in embed_images(engine, collect([photos]), decode_memory=1 << 30)}
    assert "named pipe" in results["x.jpg"]
    assert "MiB of memory, the limit is 1024 MiB" in results["tall.png"]
    assert sum(status == "ok" for status in results.values()) == 10


def test_decoding_threads_share_a_limit_of_memory(tmp_path, monkeypatch):
    """However many threads there are, no more is decoded at once than fits; what can never fit is refused."""
    paths = [save(tmp_path / f"{i}.png", i) for i in range(12)]
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    held, peak, lock = [], [], threading.Lock()
    original = embed.resize_and_crop

    def watched(image, preprocess):
        with lock:
            held.append(1)
            peak.append(len(held))
        time.sleep(0.01)
        with lock:
            held.pop()
        return original(image, preprocess)

    monkeypatch.setattr(embed, "resize_and_crop", watched)
    one = 8 * 12 * 16 + embed.memory(FakeEngine().preprocess, 16, 12)  # four bytes a pixel decoded, four turned
    for room, together in ((1, 1), (2, 2), (100, 6)):
        peak.clear()
        results = list(embed_images(FakeEngine(), paths, workers=6, decode_memory=room * one))
        assert all(r.status == "ok" for r in results)
        assert 1 <= max(peak) <= together
    status = next(embed_images(FakeEngine(), [tmp_path / "large.png"], decode_memory=one)).status
    assert "the limit is 0 MiB" in status


def test_memory_is_given_back_after_an_error():
    memory = Memory(10)
    for _ in range(3):
        with pytest.raises(KeyError), memory.reserve(10):
            raise KeyError
    with pytest.raises(ValueError, match="memory"), memory.reserve(11):
        pass
    assert 256 << 20 <= default_limit() <= 4 << 30


def test_large_jpegs_and_16_bits_are_noted(tmp_path):
    Image.new("RGB", (40, 30), (9, 90, 200)).save(tmp_path / "large.jpg")
    Image.fromarray(np.full((20, 40), 40000, np.uint16)).save(tmp_path / "scan.png")
    save(tmp_path / "plain.png")
    results = {r.path.name: r for r in embed_images(FakeEngine(), collect([tmp_path]), max_pixels=1000)}
    assert "scaled to 8 bits" in results["scan.png"].note
    assert results["scan.png"].embedding == pytest.approx([40000 >> 8] * 4)
    assert results["plain.png"].note == ""
    assert "read at 1/2" in results["large.jpg"].note
    assert results["large.jpg"].embedding[:3] == pytest.approx([9, 90, 200], abs=4)


def test_batches_on_a_cpu_take_no_longer_than_can_be_lost(photos, monkeypatch):
    monkeypatch.setattr(embed, "BATCH_SECONDS", 0.02)

    class Slow(FakeEngine):
        def __call__(self, images, *, preprocessed):
            time.sleep(0.01 * len(images))
            return super().__call__(images, preprocessed=preprocessed)

    engine = Slow()
    assert len(list(embed_images(engine, [photos / "p0.png"] * 40, batch_size=64, workers=2))) == 40
    assert engine.batches[0] == 8
    assert max(engine.batches[2:]) <= 4
    monkeypatch.setattr(embed, "BATCH_SECONDS", 60.0)
    quick = FakeEngine()
    assert len(list(embed_images(quick, [photos / "p0.png"] * 100, batch_size=32))) == 100
    assert quick.batches[:3] == [8, 16, 32]


@pytest.mark.parametrize("name", ["max_pixels", "decode_memory"])
def test_limits_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        embed_images(FakeEngine(), [], **{name: 0})


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"workers": 0}])
def test_pipeline_refuses_bad_sizes(kwargs):
    with pytest.raises(ValueError, match="at least 1"):
        embed_images(FakeEngine(), [], **kwargs)


def test_pipeline_needs_the_models_preprocessing():
    with pytest.raises(ValueError, match="preprocessed"):
        embed_images(FakeEngine(preprocess=None), [])


# --- classes ---


def test_classify(photos):
    rows = list(classify_images(FakeEngine(labels=["red", "green", "blue"]), collect([photos]), k=2, batch_size=4))
    assert len(rows) == 13
    for row in rows:
        if row.status != "ok":
            assert row.classes == []
            continue
        colour = torch.from_numpy(expected(row.path)[:3]).double()
        probabilities = colour.softmax(0)
        best = int(colour.argmax())
        assert row.classes[0]["label"] == ["red", "green", "blue"][best]
        assert row.classes[0]["index"] == best
        assert row.classes[0]["probability"] == pytest.approx(float(probabilities[best]), rel=1e-3)
        assert row.classes[0]["probability"] >= row.classes[1]["probability"]
        assert len(row.classes) == 2


def test_classes_are_judged_one_by_one_where_the_model_says_so(photos):
    engine = FakeEngine(problem_type="multi_label_classification")
    row = next(classify_images(engine, [photos / "p0.png"], k=3))
    logits = torch.from_numpy(expected(photos / "p0.png")[:3]).double()
    probabilities = {c["index"]: c["probability"] for c in row.classes}
    assert [probabilities[i] for i in range(3)] == pytest.approx(logits.sigmoid().tolist(), rel=1e-5)
    assert sum(probabilities.values()) > 1.5


def test_classify_without_labels_or_with_fewer_classes(photos):
    row = next(classify_images(FakeEngine(), [photos / "p0.png"], k=50))
    assert [c["label"] for c in row.classes] == [str(c["index"]) for c in row.classes]
    assert len(row.classes) == 3
    assert sum(c["probability"] for c in row.classes) == pytest.approx(1)


def test_classify_refuses(photos):
    with pytest.raises(ValueError, match="no classification head"):
        classify_images(FakeEngine(classes=0), [photos / "p0.png"])
    with pytest.raises(ValueError, match="at least 1"):
        classify_images(FakeEngine(), [photos / "p0.png"], k=0)
