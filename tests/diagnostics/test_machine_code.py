"""Which changes of an accumulator's layout count, from lines as Triton prints them."""

import pytest

from vitfast.diagnostics.machine_code import accumulator_conversions

LAYOUTS = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 16, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 128, 16]}>
#mma2 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 64, 16]}>
"""
PRODUCT = "%acc = ttng.warp_group_dot %a, %b, %c : !ttg.memdesc<64x64xbf16> -> tensor<64x128xf32, #mma1>"
MOVED = "%x_1 = ttg.convert_layout %acc : tensor<64x128xf32, #mma1> -> tensor<64x128xf32, {target}> loc(#loc)"
USED = "%y = arith.addf %x_1, %z : tensor<64x128xf32, {target}>"
STORED = "tt.store %p, %x_1, %mask : tensor<64x128x!tt.ptr<f32>, {target}>"


@pytest.mark.parametrize(
    ("target", "use", "counted"),
    [
        ("#mma2", USED, 1),  # other warps
        ("#mma", USED, 0),  # the same lanes, instructions of another width
        ("#blocked", USED, 1),
        ("#blocked", STORED, 0),  # on its way out
    ],
)
def test_which_conversions_count(target, use, counted):
    lines = [LAYOUTS, PRODUCT, MOVED.format(target=target), use.format(target=target)]
    assert accumulator_conversions("\n".join(lines)) == counted


def test_a_name_that_comes_again_is_another_value():
    lines = [LAYOUTS, PRODUCT, MOVED.format(target="#blocked"), STORED.format(target="#blocked")]
    lines += ["%x_1 = tt.splat %first : f32 -> tensor<64x128xf32, #blocked>", USED.format(target="#blocked")]
    assert accumulator_conversions("\n".join(lines)) == 0


def test_small_parts_do_not_count():
    lines = [LAYOUTS, PRODUCT, MOVED.format(target="#mma2").replace("64x128", "64x16"), USED.format(target="#mma2")]
    assert accumulator_conversions("\n".join(lines)) == 0
