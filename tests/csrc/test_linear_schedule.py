"""Why the CUDA linear's warpgroups share a tile: a model of schedules, at the products of ViT-B and ViT-L."""

import pytest
from helpers.schedule import Schedule, tensor_busy

PRODUCTS = {"qkv of B": 768, "fc2 of B": 3072, "qkv of L": 1024, "fc2 of L": 4096}
EPILOGUE = 17 * 128
"""Clocks of a warpgroup's epilogue of 64 by 256 sums: 17 instructions an element, as those in Triton have."""

TOGETHER = Schedule(64, 256, together=True, stages=3)  # what csrc/cuda/linear.cuh does
PING_PONG = {
    "64x256": Schedule(64, 256, together=False, stages=4),
    "128x128": Schedule(128, 128, together=False, stages=5),  # sums of a warpgroup: as many
}


def busy(schedule, k):
    return tensor_busy(schedule, steps=k // 64, epilogue=EPILOGUE)


@pytest.mark.parametrize("k", PRODUCTS.values(), ids=PRODUCTS)
def test_a_shared_tile_is_better_than_ping_pong(k):
    """Ping-pong hides the epilogue, but its tiles are half as large: L2 binds at less than the epilogue costs."""
    together = busy(TOGETHER, k)
    best = max(busy(schedule, k) for schedule in PING_PONG.values())
    assert together > best + 0.1
    assert 0.7 < together < 0.83 and 0.5 < best < 0.65


def test_bytes_decide():
    """With free operands ping-pong would be the better: the model does know what it hides."""
    free = {"x_shared": 1000, "weight_shared": 1000}
    together, ping_pong = (
        busy(Schedule(64, 256, together=together, stages=3, **free), 768) for together in (True, False)
    )
    assert ping_pong > together > 0.75


def test_two_blocks_that_share_weights_would_lift_the_bound():
    """What TMA's multicast to a cluster of two would bring."""
    shared = Schedule(64, 256, together=True, stages=3, weight_shared=2)
    for k in PRODUCTS.values():
        assert busy(shared, k) > busy(TOGETHER, k) + 0.05
        assert busy(shared, k) > 0.85
