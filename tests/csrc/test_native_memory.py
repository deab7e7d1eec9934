"""Memory that ops on the CPU leave to each other."""

import gc
import importlib
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.global_state import threads
from helpers.linear import implementation, operands

from vitfast.ops import native

pytest.importorskip("vitfast._C", reason="vitfast._C is not built (a C++ compiler builds it on install)")

MIB = 1 << 20


def linear(rows, columns=512):
    """Of fp32 numbers, `rows` * `columns` of them."""
    return implementation("native")(*operands(rows, columns, 8, torch.float32))


def test_an_output_takes_what_the_last_left():
    pool = native.memory_pool()
    with pool:
        first = linear(2048)
        address, size = first.data_ptr(), first.nbytes
        assert pool.idle_bytes == 0
        del first
        assert size <= pool.idle_bytes <= size + 2 * MIB
        second = linear(2000)
        assert second.data_ptr() == address and pool.idle_bytes == 0
    assert second.untyped_storage().nbytes() == second.nbytes == 2000 * 512 * 4


def test_two_outputs_never_share_memory():
    """Of whatever sizes, in whatever order they go; their numbers stay."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 8, generator=generator)
    packed, kept = native.pack(weight), []
    with native.memory_pool():
        for _ in range(60):
            x = torch.randn(int(torch.randint(1, 3000, (), generator=generator)), 8, generator=generator)
            kept.append((x, native.linear_packed(x, packed)))
            if len(kept) > 5:
                kept.pop(int(torch.randint(0, 6, (), generator=generator)))
            for x, y in kept:
                assert torch.allclose(y, x @ weight.T, atol=1e-4)


def test_no_more_is_kept_than_was_used_at_once():
    pool = native.memory_pool()
    with pool:
        for rows in range(500, 5000, 500):
            linear(rows)
            assert pool.idle_bytes <= rows * 512 * 4 + 2 * MIB


def test_a_request_that_fails_is_not_counted():
    """What was asked for in vain is no licence to keep as much."""
    pool = native.memory_pool()
    tokens = torch.ones(1, 1, 1, 1).expand(1, 2**58, 1, 1)  # more than an address reaches
    with pool:
        with pytest.raises(RuntimeError, match=r"can't allocate memory: you tried to allocate \d+ bytes"):
            native.attention(tokens, tokens[:, :1], tokens[:, :1])
        for rows in range(500, 5000, 500):
            linear(rows)
            assert pool.idle_bytes <= rows * 512 * 4 + 2 * MIB


def test_outputs_outlive_the_pool_and_the_pool_its_engine():
    pool = native.memory_pool()
    with pool:
        y = linear(2048)
    wanted = y.clone()
    del pool
    gc.collect()
    assert torch.equal(y, wanted)
    y.resize_(4096, 512).zero_()  # memory comes from elsewhere now
    assert not y.any()


def test_small_outputs_and_those_outside_are_torch_s():
    pool = native.memory_pool()
    with pool:
        linear(4)
        with native.memory_pool() as _:
            linear(2048)
    linear(2048)
    assert pool.idle_bytes == 0


def test_numbers_never_written_are_still_filled_in():
    """torch's own guard against reading what no op has written."""
    torch.use_deterministic_algorithms(True)
    try:
        pool = native.memory_pool()
        with pool:
            linear(2048)
        assert pool.idle_bytes == 0
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_share_a_pool():
    pool = native.memory_pool()
    args = operands(700, 512, 8, torch.float32)
    wanted = implementation("native")(*args)

    def run(_):
        with pool:
            return torch.equal(implementation("native")(*args), wanted)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(40)))
    assert 0 < pool.idle_bytes <= 4 * (wanted.nbytes + 2 * MIB)


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_THREAD"), reason="counts one thread's page faults, as Linux can")
def test_a_steady_state_has_no_page_faults():
    importlib.import_module("vitfast._C")
    packed = native.pack(torch.randn(2048, 64))
    x = torch.randn(4096, 64)

    def faults():
        """Of this thread alone: others of the process have theirs."""
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(5):
            native.linear_packed(x, packed)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    with threads(1), native.memory_pool():
        faults()
        assert min(faults() for _ in range(3)) < 10  # memory that is new costs 80 in huge pages, 40960 in small ones
