"""Kernel benchmarks: the gate, the registry's inputs and FLOPs, providers from outside, interleaving."""

import functools
import itertools
import json
import re

import pytest
import torch
from helpers.benching import CountedDevice, bench, layer_norm_case, rows_of, timed_provider
from helpers.grids import thinned

from vitfast import ops, testing
from vitfast.benchmarks import cases, device, kernels, providers, shapes, timing
from vitfast.benchmarks.environment import ROOT
from vitfast.diagnostics import predict
from vitfast.models.config import NAMED
from vitfast.ops import accuracy, mkldnn, reference, registry

DEVICE = testing.device()


def case(op, **dims):
    dtype = torch.float16 if op == "attention_block" else torch.float32  # which it does not have
    return cases.Case(op, dims, DEVICE, dtype)


SMALL = {
    "patch_embed": [{"batch": 2, "image": 32, "patch": 8, "width": 48, "pixels": p} for p in ("uint8", "float")],
    "layer_norm": [{"rows": 7, "width": 64}],
    "add_layer_norm": [{"rows": 7, "width": 64}],
    "row_stats": [{"rows": 7, "width": 130}],
    "linear": [{"M": 9, "K": 40, "N": 24, "epilogue": e} for e in cases.EPILOGUES],
    "attention": [
        *(
            {"batch": 2, "tokens": 17, "heads": 2, "head_dim": 16, "variant": v}
            for v in ("", "bias", "mask", "causal", "rope", "qk-norm rope")
        ),
        *({"batch": 2, "tokens": 17, "heads": 2, "head_dim": 64, "variant": f"to {p}"} for p in ("fp8", "int8")),
    ],
    "attention_backward": [{"batch": 2, "tokens": 17, "heads": 2, "head_dim": 16}],
    "attention_block": [{"batch": 2, "tokens": 17, "heads": 2, "head_dim": 32, "width": 48}],
    "mlp": [{"rows": 9, "width": 32, "hidden": 64, "activation": a} for a in ("gelu", "swiglu")],
    "quantize": [{"rows": 9, "width": 40, "norm": n, "precision": p} for n in ("norm", "") for p in ("fp8", "int8")],
    "quantized_linear": [
        {"M": 9, "K": 72, "N": 24, "epilogue": e, "precision": p}
        for e in ("bias", "gelu", "swiglu", "residual", "gelu requantize", "groups residual", "heads residual")
        for p in ("fp8", "int8")
    ],
    "resample": [{"batch": 2, "height": 19, "width": 33, "axis": a, "out": 9} for a in ("rows", "columns")],
    "block": [{"batch": 2, "tokens": 17, "heads": 2, "head_dim": 16, "width": 32, "hidden": 64}],
}


def test_every_op_has_cases():
    assert set(SMALL) == set(cases.OPS) == set(providers.PROVIDERS)
    assert set(registry.OPS) <= set(cases.OPS)


@pytest.mark.parametrize(
    ("op", "dims"), [case for op in SMALL for case in thinned(((op, dims) for dims in SMALL[op]), unpack=True)]
)
def test_every_case_runs_right_on_torch_and_the_interpreter(op, dims):
    one = case(op, **dims)
    if op == "block":
        interpreted = providers.Provider("interpreted", functools.partial(providers._planned_block, "triton"))
    else:
        run = registry.backend(one.spec.op, "triton").call
        if op == "attention_backward":
            run = cases.gradients(functools.partial(ops.attention, backend="triton"))
        interpreted = providers.Provider(
            "interpreted", lambda call: functools.partial(run, *call.args, **cases.backend_options(call.kwargs))
        )
    able = providers.providers_of(one)
    ours = "vitfast engine" if op == "block" else "vitfast native"
    wanted = (providers.BASELINE, ours, "vitfast triton", "oneDNN packed", "vitfast native packed", "torch._scaled_mm")
    chosen = {name: able[name] for name in wanted if name in able}
    rows = kernels.run_case(one, CountedDevice(), {**chosen, "interpreted": interpreted}, rounds=2)
    rows = {row["provider"]: row for row in rows}
    assert rows[providers.BASELINE]["correct"], rows
    assert rows["interpreted"]["correct"], rows
    assert rows["interpreted"]["configs"]
    assert "configs" not in rows[providers.BASELINE]
    triton = rows["vitfast triton"]
    assert triton["correct"] if DEVICE.type == "cuda" else "interpreter" in triton["error"]
    for row in rows.values():
        if not row["correct"]:  # absent for a reason, never wrong
            assert not row["error"].startswith("incorrect"), row


@pytest.mark.skipif(DEVICE.type != "cpu", reason="weights are packed on a CPU")
@pytest.mark.parametrize("provider", ["vitfast native packed", "oneDNN packed"])
def test_packed_products_in_int8(provider):
    name = "native" if provider.startswith("vitfast") else "torch"
    for epilogue in ("bias", "gelu requantize"):
        one = case("quantized_linear", M=33, K=64, N=128, epilogue=epilogue, precision="int8")
        reasons = mkldnn.why_not(one.spec) if name == "torch" else registry.backend(one.op, name).why_not(one.spec)
        (row,) = kernels.run_case(one, CountedDevice(), {provider: providers.providers_of(one)[provider]}, rounds=2)
        assert row["correct"] if not reasons else row["error"] == "; ".join(reasons), row
    if name == "torch":
        assert "it has no scale groups" in row["error"]


def test_an_attention_block_apart_is_the_same_work():
    one = case("attention_block", **SMALL["attention_block"][0])
    call = one.inputs()
    stats = ops.row_stats(call.args[0], backend="triton")
    answers = (cases.OPS[one.op].reference(*call.args, **call.kwargs, upcast=upcast) for upcast in (True, False))
    accuracy.assert_close(providers._apart(*call.args, row_stats=stats, **call.kwargs), *answers)


def test_inputs_are_random_repeatable_and_never_zero():
    for op, found in SMALL.items():
        one = case(op, **found[0])
        first, again, other = (one.inputs(seed).args[0] for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other), op
        assert (first != 0).double().mean() > 0.9, op


def test_part_of_a_call_gives_part_of_the_result():
    for op, found in SMALL.items():
        for dims in found:
            one, run = case(op, **dims), cases.OPS[op].reference
            call = one.inputs()
            whole, rows = kernels._tuple(run(*call.args, **call.kwargs)), slice(1, one.size)
            given = call.part(rows)
            part = kernels._tuple(run(*given.args, **given.kwargs))
            for a, b in zip(whole, part, strict=True):
                torch.testing.assert_close(a[rows].float(), b.float(), rtol=1e-5, atol=1e-5)  # fp8 has no closeness


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_base_patch16_224", "vit_large_patch14_518"])
def test_flops_are_those_of_the_prediction(model):
    """Counted here from shapes and there from the architecture."""
    launches = predict.predict(NAMED[model], batch=8, chip="h100")["launches"]
    predicted = {row["site"]: row["flops"] for row in launches}
    found = {}
    for op, dims in shapes.model_dims(NAMED[model], 8):
        found[op, dims.get("epilogue", ""), dims.get("K")] = case(op, **dims).flops
    config = NAMED[model]
    assert found["attention", "", None] == predicted["attention"]
    assert found["patch_embed", "", None] == predicted["patch_embed"]
    assert found["linear", "norm", config.width] == predicted["qkv"]
    assert found["linear", "norm gelu", config.width] == predicted["fc1"]
    assert found["linear", "residual stats", config.mlp_dim] == predicted["fc2"]
    assert found["mlp", "", None] == predicted["fc1"] + predicted["fc2"]
    if config.width <= 384:
        assert found["attention_block", "", None] == sum(predicted[site] for site in ("qkv", "attention", "proj"))
    assert found["block", "", None] == sum(predicted[site] for site in ("qkv", "attention", "proj", "fc1", "fc2"))


def test_causal_attention_and_gated_products_count_what_is_needed():
    base = {"batch": 1, "tokens": 3, "heads": 1, "head_dim": 4}
    assert case("attention", **base).flops == 4 * 9 * 4
    assert case("attention", **base, variant="causal").flops == 4 * 6 * 4
    assert case("attention_backward", **base).flops == 12 * 9 * 4
    assert case("linear", M=2, K=3, N=5, epilogue="norm swiglu").flops == 2 * 2 * 3 * 10


def test_wrong_kernel_gets_no_time_but_its_error():
    counted = CountedDevice()
    wrong = timed_provider(counted, "vitfast triton", 1.0, lambda *a: reference.layer_norm(*a) * 1.01)
    absent = providers.Provider("absent", lambda call: __import__("no_such_package"))
    rows = rows_of(counted, wrong, absent)
    assert rows[providers.BASELINE]["correct"] and rows[providers.BASELINE]["ratio"] == 1
    assert "median_ms" not in rows["vitfast triton"] and rows["vitfast triton"]["ratio"] is None
    assert rows["vitfast triton"]["error"].startswith("incorrect: max error")
    assert rows["vitfast triton"]["max_error"] == pytest.approx(0.01, rel=0.01)
    assert rows["absent"]["error"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert "median_ms" not in rows["absent"]


def corner(*args):
    out = reference.layer_norm(*args)
    out[-1, -1] += 1
    return out


@pytest.mark.parametrize(
    "answer",
    [
        lambda *a: reference.layer_norm(*a)[:-1],
        lambda *a: reference.layer_norm(*a).half(),
        lambda *a: reference.layer_norm(*a).fill_(float("nan")),
        lambda *a: (reference.layer_norm(*a),) * 2,
        corner,
    ],
)
def test_the_gate_sees(answer):
    counted = CountedDevice()
    row = rows_of(counted, timed_provider(counted, "vitfast triton", 1.0, answer))["vitfast triton"]
    assert row["error"].startswith("incorrect") and "median_ms" not in row


def test_a_gate_on_part_sees_both_ends_and_the_middle(monkeypatch):
    monkeypatch.setattr(kernels, "gate_size", lambda one: 3)
    counted = CountedDevice()

    def middle(*args):
        out = reference.layer_norm(*args)
        out[3] = float("inf")
        return out

    def skipped(*args):
        out = reference.layer_norm(*args)
        out[3] += 1
        return out

    for answer in (corner, middle, skipped):
        row = rows_of(counted, timed_provider(counted, "vitfast triton", 1.0, answer))["vitfast triton"]
        assert row["error"].startswith("incorrect"), answer
        assert row["checked"] == "3 of 7, in 3 parts"


@pytest.mark.parametrize(("size", "count"), [(7, 2), (50432, 1302), (10, 9), (512, 26), (1000, 17)])
def test_spread_parts_are_even_and_do_not_overlap(size, count):
    parts = kernels.spread(size, count)
    rows = [row for part in parts for row in range(size)[part]]
    assert len(rows) == len(set(rows)) == count
    assert (rows[0], rows[-1]) == (0, size - 1)
    gaps = [b.start - a.stop for a, b in itertools.pairwise(parts)]
    assert max(gaps) - min(gaps) <= 2


def test_what_turns_wrong_while_it_is_timed_gets_no_time():
    counted, calls = CountedDevice(), []

    def tiring(*args):
        calls.append(1)
        return reference.layer_norm(*args) + (len(calls) > 4)

    row = rows_of(counted, timed_provider(counted, "vitfast triton", 1.0, tiring))["vitfast triton"]
    assert row["error"].startswith("incorrect after the timing: max error") and "median_ms" not in row


def test_the_gate_of_a_large_case_is_affordable():
    large = case("attention", batch=512, tokens=1370, heads=16, head_dim=64)
    size = kernels.gate_size(large)
    assert 2 <= size < 512
    assert size / 512 * large.flops < 3e10
    assert kernels.gate_size(layer_norm_case()) == 7


def test_eight_bit_providers_have_a_rule_of_their_own():
    counted = CountedDevice()
    rough = timed_provider(counted, "eight", 1.0, lambda *a: reference.layer_norm(*a) * 1.03)
    as_declared = providers.Provider("eight", rough.build, eight_bit=True)
    row = rows_of(counted, as_declared)["eight"]
    assert row["correct"] and row["eight_bit"]
    assert not rows_of(counted, rough)["eight"]["correct"]
    off = timed_provider(counted, "eight", 1.0, lambda *a: reference.layer_norm(*a) * 1.06)
    assert not rows_of(counted, providers.Provider("eight", off.build, eight_bit=True))["eight"]["correct"]


def test_rounds_interleave_in_changing_order():
    counted, programs = CountedDevice(), {}
    for name in "abc":
        programs[name] = counted.prepare([functools.partial(counted.order.append, name)])
    counted.order.clear()
    times, _ = timing.time_interleaved(programs, counted, rounds=3)
    assert counted.order == [*"abc", *"bca", *"cab"]
    assert all(len(values) == 3 for values in times.values())


def test_a_short_program_runs_once_more_before_it_is_timed():
    """Also one of several calls, whose times are those of one call."""
    counted, programs = CountedDevice(), {}

    def call(name, ms):
        counted.order.append(name)
        counted.now += ms

    for name, ms in (("short", 1.0), ("long", 50.0)):
        programs[name] = counted.prepare([functools.partial(call, name, ms)] * 4)
    counted.order.clear()
    times, _ = timing.time_interleaved(programs, counted, rounds=3, settle_ms=100.0)
    assert (counted.order.count("short"), counted.order.count("long")) == (
        4 * 6,
        4 * 4,
    )  # how long is not known at first
    assert times["short"] == pytest.approx([1.0] * 3, abs=1e-3) and times["long"] == pytest.approx([50.0] * 3, abs=1e-3)


def test_times_are_per_call_and_ratios_of_medians():
    counted = CountedDevice()
    counted.cache_bytes = 10**5  # many copies, each called once a round
    rows = rows_of(counted, timed_provider(counted, "vitfast native", 1.0))
    assert rows["vitfast native"]["median_ms"] == pytest.approx(1.005, rel=0.01)
    assert rows["vitfast native"]["ratio"] == pytest.approx(2, rel=0.02)
    assert rows["vitfast native"]["p20_ms"] <= rows["vitfast native"]["median_ms"] <= rows["vitfast native"]["p80_ms"]
    assert not rows["vitfast native"]["noisy"]
    assert rows["vitfast native"]["cold"]


def test_copies_cover_twice_the_cache_or_it_says_warm():
    assert timing.copies_needed(10, 50) == 10
    assert timing.copies_needed(200, 50) == 1
    assert timing.copies_needed(1, 10**9) == timing.MOST_COPIES
    counted = CountedDevice()
    counted.cache_bytes = 10**9
    assert not rows_of(counted)[providers.BASELINE]["cold"]


def test_noise_is_flagged():
    assert timing.summary([1.0, 1.01, 1.0, 0.99])["noisy"] is False
    assert timing.summary([1.0, 1.3, 0.8, 1.0, 1.2])["noisy"] is True


def test_timing_stops_when_the_time_is_up_but_not_at_once():
    counted = CountedDevice()
    programs = {"a": counted.prepare([lambda: None])}
    times, _ = timing.time_interleaved(programs, counted, rounds=50, seconds=0)
    assert len(times["a"]) == timing.FEWEST_ROUNDS


def test_cases_without_time_are_named():
    counted = CountedDevice()
    rows = []
    left = kernels.run([layer_norm_case(), layer_norm_case()], counted, seconds=0, rounds=2, on_rows=rows.extend)
    assert left == ["layer_norm rows 7 width 64"] * 2 and not rows


def test_grids():
    quick = kernels.grid("quick", [], ["vit_base_patch16_224"], [8], DEVICE, torch.float32)
    assert [one.name.split()[-1] for one in quick[:4]] == ["plain"] * 4  # the library's own products beside ours
    assert quick[4].name == "attention batch 8 tokens 197 heads 12 head_dim 64"
    assert quick[-1].op == "block"
    assert {one.op for one in quick} == set(cases.OPS) - {"attention_block"}  # which is for smaller models
    small = kernels.grid("quick", [], ["vit_small_patch16_224"], [8], DEVICE, torch.float32)
    assert {one.op for one in small} == set(cases.OPS)
    assert len({one.name for one in quick}) == len(quick)
    only = kernels.grid("quick", ["mlp"], ["vit_base_patch16_224"], [8], DEVICE, torch.float32)
    assert [one.op for one in only] == ["mlp"]
    full = kernels.grid("full", [], ["vit_base_patch16_224"], [8], DEVICE, torch.float32)
    assert {one.dims.get("tokens") for one in full} >= {197, 257, 577, 1370}
    assert {one.dims["batch"] for one in full if one.op == "attention"} >= {1, 8, 64, 256, 512}


def test_grids_in_several_dtypes():
    models, products = ["vit_base_patch16_224", "vit_tiny_patch16_224"], ["linear", "quantized_linear"]
    found = kernels.grid_in(["fp32", "bfloat16", "int8"], "quick", products, models, [8], DEVICE)
    assert len({one.name for one in found}) == len(found)
    sizes = {(1576, n, k) for w in (768, 192) for n, k in ((3 * w, w), (w, w), (4 * w, w), (w, 4 * w))}
    for op, operands, dtype in (
        ("linear", torch.float32, "float32"), ("linear", torch.bfloat16, "bfloat16"),
        ("quantized_linear", torch.int8, "bfloat16"),
    ):  # fmt: skip
        these = [one for one in found if (one.op, one.operand_dtype) == (op, operands)]
        assert {(one.dims["M"], one.dims["N"], one.dims["K"]) for one in these} >= sizes
        assert {one.name.split()[-1] for one in these} == {dtype}
    assert torch.float8_e4m3fn not in {one.operand_dtype for one in found}
    plain = kernels.grid("quick", [], models, [8], DEVICE, torch.bfloat16)
    assert [one.name for one in kernels.grid_in(["bf16"], "quick", [], models, [8], DEVICE)] == [x.name for x in plain]
    alone = kernels.grid_in(["int8"], "quick", [], models, [8], DEVICE)
    assert {one.op for one in alone} == {"quantized_linear", "quantize", "attention"}
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'fp64'"):
        kernels.grid_in(["fp32", "fp64"], "quick", [], models, [8], DEVICE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
@pytest.mark.parametrize("op", list(SMALL))
def test_gpu_times_our_kernels_as_graphs(op):
    gpu = device.open_device(torch.device("cuda", 0))
    one = cases.Case(op, SMALL[op][0], torch.device("cuda", 0), torch.bfloat16)
    rows = {row["provider"]: row for row in kernels.run_case(one, gpu, providers.providers_of(one), rounds=3)}
    for name in (providers.BASELINE, "vitfast triton"):
        assert rows[name]["correct"], rows[name]
        assert rows[name]["timed_by"] == "graph", rows[name]
        assert 0 < rows[name]["median_ms"] < 1000


MINE = """
from vitfast.ops import reference

def right(x, weight, bias, eps):
    return reference.layer_norm(x, weight, bias, eps)

def wrong(x, weight, bias, eps):
    return reference.layer_norm(x, weight, bias, 0.1)
"""


def test_your_own_kernel_from_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "mymodule.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    common = ("kernels", "--op", "layer_norm", "-m", "vit_tiny_patch16_224", "--batch", 1, "--device", "cpu",
              "--rounds", 2, "--no-roofs", "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")  # fmt: skip
    done = bench(*common, "--provider", "mymodule:right", "--provider", "mymodule:wrong")
    assert done.exit_code == 1, done.output
    rows = {row["provider"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["mymodule:right"]["correct"] and rows["mymodule:right"]["median_ms"] > 0
    assert rows["mymodule:wrong"]["error"].startswith("incorrect") and "median_ms" not in rows["mymodule:wrong"]
    assert "wrong: mymodule:wrong" in done.output
    assert "mymodule:right" in (tmp_path / "r.csv").read_text()
    for needed in ("case", "provider", "median_ms", "p20_ms", "p80_ms", "ratio", "correct"):
        assert needed in rows["mymodule:right"]


def test_peer_is_the_old_name_of_provider():
    for command in ("kernels", "model"):
        done = bench(command, "--peer", "nothing")
        assert done.exit_code != 0 and "'nothing'" in done.output
        assert "--peer is now --provider" in done.output
        assert "--peer" not in bench(command, "--help").output


def test_a_library_that_is_wrong_is_named_but_no_failure(tmp_path, monkeypatch):
    library = timed_provider(CountedDevice(), "a library", 1.0, lambda *a: reference.layer_norm(*a) * 1.01)
    monkeypatch.setitem(providers.PROVIDERS["layer_norm"], "a library", library)
    common = ("kernels", "--op", "layer_norm", "-m", "vit_tiny_patch16_224", "--batch", 1, "--device", "cpu",
              "--rounds", 2, "--no-roofs", "--json", tmp_path / "r.json")  # fmt: skip
    done = bench(*common)
    assert done.exit_code == 0 and "wrong: a library" in done.output, done.output
    ours = providers.Provider("vitfast wrong", library.build)
    monkeypatch.setitem(providers.PROVIDERS["layer_norm"], "vitfast wrong", ours)
    assert bench(*common).exit_code == 1


def test_the_example_in_the_docs_is_right(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "benchmarking.md").read_text()
    (tmp_path / "documented.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    provider = providers.from_outside("documented:my_attention")
    for dims in SMALL["attention"]:
        one, counted = case("attention", **dims), CountedDevice()
        both = {providers.BASELINE: providers.providers_of(one)[providers.BASELINE], provider.name: provider}
        row = kernels.run_case(one, counted, both, rounds=2)[1]
        if dims["variant"] not in ("", "causal"):
            assert row["error"].startswith("NotImplementedError: no "), row
        else:
            assert row["correct"], row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "--op", "pooling"), "'pooling'"),
        (("kernels", "-m", "resnet50"), "'resnet50'"),
        (("kernels", "--provider", "nothing"), "module:function"),
        (("kernels", "--provider", "no_such_module:f"), "no_such_module"),
        (("kernels", "--budget", "soon"), "soon"),
        (("kernels", "--threads", "4096", "--device", "cpu"), "4096"),
        (("model", "--provider", "Caffe"), "'Caffe'"),
        (("compare", "no.json", "no.json"), "no.json"),
        (("report",), "give result files"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    done = bench(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.output
