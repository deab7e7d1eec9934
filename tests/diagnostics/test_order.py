"""Which of our kernels and configs stands first where nobody has measured: what their machine code says on Hopper."""

import json

import pytest
from helpers.emulated import needs_nvcc
from helpers.scripts import compiling_code

from vitfast.diagnostics import chips, code_times, native_attention, sass, throughput

PRODUCTS = """
    import json
    from vitfast.diagnostics.predict import add_machine_code, predict
    from vitfast.kernels import linear
    from vitfast.models.config import NAMED

    pick, found = linear.pick_config, []
    for config in (None, *(c for c in linear.TMA_CONFIGS if linear.split_of(c) == 1)):
        linear.pick_config = pick if config is None else lambda problem, sms, config=config: config
        for model in ("vit_base_patch16_224", "vit_large_patch16_224"):
            prediction = predict(NAMED[model], batch=256, chip="h100")
            rows = [row for row in prediction["launches"] if row["site"] in ("qkv", "proj", "fc1", "fc2")]
            if config is not None:
                problems = [linear.Problem(*(row["dims"][a] for a in "MNK"), linear.torch.bfloat16, True,
                                           stats="stats" in row["dims"]["epilogue"]) for row in rows]
                rows = [row for row, problem in zip(rows, problems) if not linear.why_not(config, problem)]
            prediction["launches"] = rows
            add_machine_code(prediction)
            found += [[config is None, model, row["site"], row["config"], row["code_us"]] for row in rows]
    print(json.dumps(found))
"""


@pytest.mark.full
def test_tiles_of_linear_are_the_fastest_by_their_code():
    """At the products of ViT-B and ViT-L: within 3 %, since pick_config's own model counts epilogues on average."""
    rows = json.loads(compiling_code(PRODUCTS))
    picked = {(model, site): us for chosen, model, site, _, us in rows if chosen}
    assert len(picked) == 8
    for place, us in picked.items():
        others = {config: us for chosen, *at, config, us in rows if tuple(at) == place and not chosen}
        assert len(others) >= 4
        assert us <= 1.03 * min(others.values()), (place, us, others)


SCORES = """
    import json
    from vitfast.diagnostics.compiled import find_case, inspect_case

    plain = {"HEAD_DIM": 64, "bias": None, "mask": None, "max_out": None, "out_scale": None}
    found = {}
    for tokens in (197, 257, 577):
        for config in ("half-96-short", "half-96"):
            case = find_case("attention", "attention", config, "sm_90", **plain)
            row = inspect_case(case, "sm_90", tokens=tokens)
            tiles = -(-tokens // case.constexprs["BLOCK_M"])
            found[f"{config} {tokens}"] = tiles * row["tile_clocks"]["clocks"]
    case = find_case("attention_short", "attention_short", "short D=64 N=197", "sm_90")
    found["short 197"] = inspect_case(case, "sm_90", tokens=197)["tile_clocks"]["clocks"]
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def clocks_of_a_head():
    """By config of Triton's attention and tokens."""
    return json.loads(compiling_code(SCORES))


def memory_clocks(tokens):
    """Until q, k, v and the output of a head of 64 have been moved, by the share of a multiprocessor of an H100."""
    card = chips.CHIPS["h100"]
    bytes_a_clock = card.memory_gb_s * chips.SUSTAINED_MEMORY / (card.clock_ghz * code_times.SUSTAINED_CLOCK)
    return 4 * tokens * 64 * 2 * card.multiprocessors / bytes_a_clock


@pytest.mark.full
def test_tiles_of_attention_are_the_fastest_by_their_code(clocks_of_a_head):
    """The config that is picked for so many tokens, and the other general ones; at 197 memory binds all."""
    found = clocks_of_a_head
    assert max(found[f"{config} 197"] for config in ("half-96-short", "half-96", "short")) <= memory_clocks(197)
    assert found["half-96-short 257"] <= found["half-96 257"]
    assert found["half-96 577"] <= found["half-96-short 577"]


@pytest.mark.full
@needs_nvcc
def test_the_cuda_attention_is_as_fast_by_its_code(clocks_of_a_head):
    """And faster where memory does not bind both, so that it stands first."""
    found = {}
    for row in native_attention.inspect_attention():
        assert row["spill_bytes"] == 0 and row["ptxas_warnings"] == []
        tokens = row["tokens"]
        memory = memory_clocks(tokens)
        native = max(memory, -(-tokens // native_attention.QUERIES) * row["tile_clocks"]["clocks"])
        found[tokens] = native, max(memory, clocks_of_a_head[f"half-96-short {tokens}"])
    assert found[197][0] <= found[197][1] and found[257][0] < 0.95 * found[257][1], found


TILE = """
.L_tile:
        /*0010*/ HGMMA.64x200x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/ MUFU.EX2 R24, R24 ;
        /*0040*/ FMUL R24, R24, R2 ;
        /*0050*/ BAR.SYNC.DEFER_BLOCKING R3, 0x80 ;
        /*0060*/ @P1 BRA `(.L_tile) ;
        /*0070*/ EXIT ;
"""


def test_clocks_of_the_cuda_attention_by_hand():
    """Two warpgroups of 4 warps share the pipes; alone, one waits for its products, its barrier and all the rest."""
    listing = sass.parse(TILE)
    found = native_attention.tile_clocks(listing.of(listing.product_loops[0]))
    assert found["tensor_clocks"] == 100 and found["pipes"]["mufu"] == 8 and found["pipes"]["issue"] == 6
    assert found["pipes"]["shared memory"] == pytest.approx(32 * (64 + 200) / 128)
    alone = 100 + 8 + throughput.BARRIER_CLOCKS + throughput.PRODUCT_TAIL_CLOCKS
    assert (found["bound"], found["clocks"]) == ("latency", pytest.approx(alone / 2, abs=0.5))
    assert found["tensor_busy"] == pytest.approx(100 / (alone / 2), abs=1e-3)
