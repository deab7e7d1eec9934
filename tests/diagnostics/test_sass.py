"""vitfast.diagnostics.sass and throughput: a listing read by hand, and clocks added up by hand."""

import pytest

from vitfast.diagnostics import sass, throughput

# One tile loop (.L_x_2 to the last but one BRA) around a loop of two products (.L_x_1), a wait inside it, an epilogue.
LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R2, RZ ;
.L_x_2:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR10+0x2c000], R4 ;
        /*0040*/              @!P3 BRA `(.L_x_0) ;
.L_x_3:
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0070*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/                   FFMA.FTZ R3, R4, R5, R6 ;
        /*00c0*/                   FMUL R3, R3, R3 ;
        /*00d0*/                   MUFU.TANH R3, R3 ;
        /*00e0*/              @!P5 LDG.E.128 R136, desc[UR24][R100.64+0x20] ;
        /*00f0*/                   STS.64 [R1], R136 ;
        /*0100*/                   STSM.16.M88.4 [R9], R12 ;
        /*0110*/                   IMAD.MOV.U32 R115, RZ, RZ, 0x3e235519 ;
        /*0120*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0130*/               @P1 BRA `(.L_x_2) ;
        /*0140*/                   EXIT ;
.L_x_0:
        /*0150*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR10+0x2c000], R4 ;
        /*0160*/              @!P3 BRA `(.L_x_0) ;
        /*0170*/                   BRA `(.L_x_3) ;
.L_x_9:
        /*0180*/                   BRA `(.L_x_9);
"""


@pytest.fixture
def listing():
    return sass.parse(LISTING)


def test_the_loop_of_products_is_found(listing):
    (loop,) = listing.product_loops
    assert [i.base for i in listing.of(loop)] == ["SYNCS", "BRA", "HGMMA", "HGMMA", "UIADD3", "WARPGROUP", "BRA"]
    assert sass.products_waited_for(listing.of(loop)) == 1
    assert list(sass.tensor_instructions(listing.of(loop))) == [("HGMMA", 64, 256, 16)] * 2


def test_the_rest_is_that_of_the_tile(listing):
    """Not what stands before the loop over tiles, nor waits moved behind the end."""
    rest = listing.outside()
    assert [i.base for i in rest] == [
        "IADD3", "WARPGROUP", "FFMA", "FMUL", "MUFU", "LDG", "STS", "STSM", "IMAD", "BAR", "BRA",
    ]  # fmt: skip
    assert sass.count_pipes(rest) == {
        "alu": 1, "barrier": 2, "fma": 2, "mufu": 1, "global": 1, "shared": 2, "imad": 1, "control": 1,
    }  # fmt: skip
    assert sass.load_widths(rest) == {"LDG": {16: 1}, "STS": {8: 1}}


def test_what_never_runs_takes_an_issue_slot_alone(listing):
    code = sass.parse(LISTING.replace("     STS.64 [R1], R136", "@!PT LDS RZ, [RZ]")).outside()
    assert len(code) == len(listing.outside())
    counts = sass.count_pipes(code)
    assert (counts["shared"], counts["control"]) == (1, 2)
    assert sass.load_widths(code) == {"LDG": {16: 1}}


def test_without_a_loop_over_tiles_all_code_is_the_tiles():
    code = LISTING.replace("@P1 BRA `(.L_x_2)", "    NOP")
    assert [i.base for i in sass.parse(code).outside()][:3] == ["LDC", "MOV", "IADD3"]


def test_instructions_of_sm_100_have_a_pipe():
    """Packed fp32, sums of fp32 and 16 bits, tensor memory, and its products."""
    names = {"FADD2": "fma", "FHADD.BF16": "fma", "LDTM.x32": "tensor_memory", "STTM.x4": "tensor_memory"}
    names |= {"UTCHMMA": "tensor", "UTCBAR": "copy", "UIADD3": "uniform"}
    for name, pipe in names.items():
        (instruction,) = sass.parse(f"        /*0000*/                   {name} R1, R2 ;\n").instructions
        assert instruction.pipe == pipe, name


def test_an_unknown_instruction_is_named():
    with pytest.raises(ValueError, match=r"FANCY\.F32"):
        sass.count_pipes(sass.parse("        /*0000*/                   FANCY.F32 R1, R2 ;\n").instructions)
    with pytest.raises(ValueError, match="no instructions"):
        sass.parse("nothing")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("HMMA.16816.F32.BF16", ("HMMA", 16, 8, 16)),
        ("HMMA.1688.F32.TF32", ("HMMA", 16, 8, 8)),
        ("IMMA.16832.S8.S8", ("IMMA", 16, 8, 32)),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", ("QGMMA", 64, 128, 32)),
    ],
)
def test_shapes_of_products(name, shape):
    code = sass.parse(f"        /*0000*/                   {name} R1, R2 ;")
    assert list(sass.tensor_instructions(code.instructions)) == [shape]


def test_clocks_of_a_tile(listing):
    """8 warps, that is two warpgroups; 10 steps; added up by hand."""
    tile = throughput.tile_clocks(listing, [10], arch="sm_90", warps=8, blocks=1, elements=128 * 256)
    products = 10 * 2 * 2 * 256 / 2  # two instructions of N/2 clocks, two warpgroups
    assert tile["tensor_clocks"] == products
    issue = (11 + 10 * 7) * 8 / 4
    assert tile["pipes"]["issue"] == issue
    assert tile["pipes"]["mufu"] == 8 * 2
    assert tile["pipes"]["fma"] == 8 * (2 * 0.25 + 0.5)
    operands = 10 * 2 * 2 * 32 * (64 + 256) / 128  # rows of 32 bytes of both, of each instruction of each warpgroup
    assert tile["pipes"]["shared memory"] == 8 * 32 * (8 + 16) / 128 + operands
    assert tile["pipes"]["global memory"] == 8 * 32 * 16 / 64
    rest = max(11 * 8 / 4, 8 * 32 * 16 / 64)
    alone = products + rest + throughput.BARRIER_CLOCKS + throughput.FILL_CLOCKS + throughput.PRODUCT_TAIL_CLOCKS
    # The rest waits for the last products: it has none of its own.
    assert tile["clocks"] == alone
    assert tile["bound"] == "latency"
    assert tile["tensor_busy"] == round(products / alone, 4)
    assert tile["epilogue_instructions_per_element"] == round(11 * 8 * 32 / (128 * 256), 2)


def test_two_blocks_hide_each_others_epilogue(listing):
    options = {"arch": "sm_90", "warps": 8, "elements": 128 * 256}
    one, two = (throughput.tile_clocks(listing, [10], blocks=blocks, **options) for blocks in (1, 2))
    assert one["tensor_busy"] < two["tensor_busy"] == 1
    assert two["bound"] == "products"


def test_products_waited_for_at_once_overlap_with_nothing(listing):
    waiting = sass.parse(LISTING.replace("gsb0, 0x1", "gsb0, 0x0"))
    options = {"arch": "sm_90", "warps": 8, "blocks": 1, "elements": 1}
    fast, slow = (throughput.tile_clocks(code, [10], **options)["clocks"] for code in (listing, waiting))
    assert slow == fast + 10 * 7 * 8 / 4  # the loop's issue slots


def test_what_tma_writes_takes_shared_memory_too(listing):
    options = {"arch": "sm_90", "warps": 8, "elements": 1, "blocks": 2}
    bare, with_copies = (throughput.tile_clocks(listing, [10], copied=copied, **options) for copied in (0, 128 * 500))
    assert with_copies["pipes"]["shared memory"] == bare["pipes"]["shared memory"] + 10 * 500
    assert (bare["bound"], with_copies["bound"]) == ("products", "shared memory")
    assert with_copies["tensor_busy"] < 0.8
    blocks = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}
    assert throughput.copied_bytes("linear", blocks, 2) == (128 + 64) * 64 * 2
    assert throughput.copied_bytes("linear", {**blocks, "ACTIVATION": "swiglu"}, 2) == (128 + 2 * 64) * 64 * 2
    assert throughput.copied_bytes("attention", blocks, 2) == 0


def test_operands_in_registers_are_not_read_again():
    """With a in registers the first register is the accumulator's, the second a's."""
    shared = sass.parse("        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;")
    half = sass.parse("        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;")
    rates = throughput.RATES["sm_90"]
    clocks = [throughput.phase(code.instructions, 4, rates).operands for code in (shared, half)]
    assert clocks == [32 * (64 + 128) / 128, 32 * 128 / 128]


@pytest.mark.parametrize(
    ("kernel", "blocks", "elements"),
    [
        ("attention", {"BLOCK_M": 64, "BLOCK_N": 32}, 64 * 80),
        ("attention_dq", {"BLOCK_M": 64, "BLOCK_N": 32}, 64 * 80),
        ("attention_dkdv", {"BLOCK_M": 32, "BLOCK_N": 64}, 2 * 64 * 80),  # dk and dv
    ],
)
def test_steps_of_attention(kernel, blocks, elements):
    """197 tokens are six tiles of 32 and one of 16, whichever axis is walked."""
    blocks = {**blocks, "BLOCK_TAIL": 16}
    assert throughput.steps_of(kernel, blocks, tokens=197) == [6, 1]
    assert throughput.steps_of(kernel, blocks, tokens=192) == [6, 0]
    assert throughput.output_elements(kernel, blocks, 80, 197) == elements


def test_what_cannot_be_said_is_none(listing):
    options = {"warps": 8, "blocks": 1, "elements": 1}
    assert throughput.tile_clocks(listing, [10], arch="sm_100", **options) is None
    assert throughput.tile_clocks(listing, [10, 2], arch="sm_90", **options) is None
