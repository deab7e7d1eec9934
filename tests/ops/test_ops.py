"""The ops as torch sees them: opcheck, torch.compile, forced backends, refusals, folding helpers."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from vitfast import ops, testing
from vitfast.images.pillow_resize import taps
from vitfast.ops import reference, registry
from vitfast.testing import make

# slopes, softcap, left, right, offset, scale; no packed sequences
OPTIONS = (None, 0.0, None, 0, 0, 0.3, None, None, 0, 0)
# cos, sin, interleaved; weights and biases of the norms, eps, rms
HEADS = (make(4, 24), make(4, 24), True, make(24), make(24), None, make(24), 1e-6, False)
HEADLESS = (None, None, False, None, None, None, None, 1e-6, False)


def _arguments() -> dict[str, tuple]:
    """Positional arguments of each torch.ops.vitfast op, small."""
    x, w, b = make(2, 5, 48), make(64, 48), make(64)
    norm = (make(48, seed=1), make(48, seed=2))
    weight, total, bias = ops.fold_norm(w, b, *norm)
    qkv_weight, sums, qkv_bias = ops.fold_norm(make(144, 48), make(144), *norm)
    images = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8, device=testing.device())
    qkv = make(2, 5, 3, 2, 24)
    # fmt: off
    return {
        "patch_embed": (images, make(48, 192), make(48), make(6, 48), make(1, 48), [8, 8], True),
        "layer_norm": (x, *norm, 1e-6),
        "add_layer_norm": (x, make(2, 5, 48, seed=3), *norm, 1e-6),
        "row_stats": (x,),
        "linear": (x, weight, bias, "gelu", make(64), make(2, 5, 64), reference.row_stats(x), total, 1e-6),
        "linear_stats": (x, w, b, "silu", None, make(2, 5, 64)),
        "attention": (*qkv.unbind(2), make(1, 2, 5, 5), make(2, 1, 1, 5) > 0, *OPTIONS, *HEADS, "auto"),
        "attention_quantize": (
            *make(2, 5, 3, 2, 64).unbind(2), None, make(2, 1, 1, 5) > 0, *OPTIONS, *HEADLESS, torch.int8, "auto",
        ),
        "attention_block": (x, qkv_weight, qkv_bias, make(48, 48), make(48), 2, make(48), x, sums, 1e-6),
        "attention_block_stats": (x, make(144, 48), None, make(48, 48), None, 2, None, x),
        "mlp": (x, weight, bias, make(48, 64), None, "gelu_tanh", None, x, total, 1e-6),
        "mlp_stats": (x, w, b, make(48, 64), None, "gelu_tanh", None, x),
        "quantize": (x, *norm, 1e-6, torch.float8_e4m3fn),
        "resample": (images, *(torch.from_numpy(table).to(testing.device()) for table in taps(24, 7, "bicubic")), 2),
        "quantized_linear": (
            *reference.quantize(x, dtype=torch.int8), *reference.quantize(w, dtype=torch.int8), b,
            "gelu", None, None, torch.float32,
        ),
        "quantized_linear_requantize": (
            *reference.quantize(x, dtype=torch.int8), *reference.quantize(w, dtype=torch.int8), b,
            "gelu", None, None, torch.float32,
        ),
    }


ARGUMENTS = _arguments()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.vitfast, name).default, ARGUMENTS[name])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_fullgraph_compile(name):
    torch._dynamo.reset()  # all ops share the code object below, and it may be compiled a few times only
    op = getattr(torch.ops.vitfast, name)
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*ARGUMENTS[name]), op(*ARGUMENTS[name]), rtol=0, atol=0)


def test_public_functions_trace_in_one_graph():
    def block(x, w, b, norm_weight, norm_bias):
        x = ops.layer_norm(x, norm_weight, norm_bias)
        q = ops.linear(x, w, b, activation="gelu").unflatten(-1, (2, 24))
        return ops.attention(q, q, q, key_mask=q[:, :, 0, 0] > 0)

    args = (make(2, 5, 48), make(48, 48), make(48), make(48, seed=1), make(48, seed=2))
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(*args), block(*args))


FUSED = {"linear": "stats", "quantized_linear": "requantize", "mlp": "stats", "attention_block": "stats"}
"""The ops with an epilogue, and the option of each that asks for a second result."""


@pytest.mark.parametrize("name", FUSED)
def test_torch_ops_take_what_the_function_takes(name):
    """A public function gives its arguments by position, in the order of the schema."""
    parameters = inspect.signature(getattr(ops, name)).parameters
    expected = {key: p.default for key, p in parameters.items() if key not in (FUSED[name], "backend")}
    for torch_op in (name, f"{name}_{FUSED[name]}"):
        arguments = getattr(torch.ops.vitfast, torch_op).default._schema.arguments
        assert [argument.name for argument in arguments] == list(expected)
        for argument in arguments:
            if argument.has_default_value():
                assert argument.default_value == expected[argument.name]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_function_and_its_graph_give_what_the_reference_gives(name, second):
    torch._dynamo.reset()
    function, arguments = getattr(ops, name), ARGUMENTS[name]
    named = dict(zip(inspect.signature(function).parameters, arguments, strict=False)) | {FUSED[name]: second}
    compiled = torch.compile(lambda **kwargs: function(**kwargs), fullgraph=True, backend="aot_eager")
    expected = getattr(reference, name)(**named)
    torch.testing.assert_close(compiled(**named), expected, rtol=0, atol=0)
    torch.testing.assert_close(function(**named, backend="torch"), expected, rtol=0, atol=0)


def test_torch_ops_have_the_defaults_of_the_backends():
    x, w = make(2, 5, 48), make(64, 48)
    torch_ops = torch.ops.vitfast
    expected = reference.linear(x, w, activation="gelu", stats=True)
    torch.testing.assert_close(torch_ops.linear_stats(x, weight=w, activation="gelu"), expected, rtol=0, atol=0)
    expected = reference.mlp(x, w, None, w.T.contiguous(), None)
    torch.testing.assert_close(torch_ops.mlp(x, w, None, w.T.contiguous(), None), expected, rtol=0, atol=0)


def test_every_op_has_every_part():
    for op in ops.OPS:
        assert callable(getattr(reference, op))
        assert callable(getattr(ops, op))
        assert hasattr(torch.ops.vitfast, op)
        assert set(ops.BACKENDS) == {registry.backend(op, name).name for name in ops.BACKENDS}


def test_forced_backend_that_cannot_run_gives_every_reason(monkeypatch):
    entry = ops.Backend(
        "triton", "linear", lambda: None, devices=("cuda",), dtypes=("float16",), min_capability=(9, 0),
        limits={"N": (1, 10)}, multiples={"N": 24, "K": 8},
    )  # fmt: skip
    monkeypatch.setattr(registry, "backend", lambda op, name: entry)
    spec = ops.Spec("linear", "cpu", torch.float32, (8, 6), {"N": 64})
    with pytest.raises(ops.BackendError) as error:
        ops.choose(spec, "triton")
    for part in (
        "device cpu",
        "dtype float32",
        "8.6 is below 9.0",
        "N 64 is outside 1..10",
        "N 64 is not a multiple of 24",
    ):
        assert part in str(error.value)
    entry = ops.Backend("native", "linear", lambda: None, min_capability=(9, 0), max_capability=(9, 0))
    for capability, reasons in {(8, 9): 1, (9, 0): 0, (10, 0): 1}.items():
        assert len(entry.why_not(ops.Spec("linear", "cuda", torch.float16, capability))) == reasons
    assert entry.why_not(spec)[0] == "compute capability 8.6 is below 9.0"


def test_limits_include_both_ends():
    entry = ops.Backend("native", "linear", lambda: None, limits={"N": (2, 10)})
    for width, reasons in {1: 1, 2: 0, 10: 0, 11: 1}.items():
        assert len(entry.why_not(ops.Spec("linear", "cpu", torch.float32, dims={"N": width}))) == reasons, width


def test_unknown_backend_and_op_are_named():
    with pytest.raises(ValueError, match=r"'cudnn'.*torch, triton, native"):
        ops.choose(ops.Spec("linear", "cpu", torch.float32), "cudnn")
    with pytest.raises(ValueError, match="'gelu'"):
        registry.backend("gelu", "torch")


def test_missing_backend_keeps_its_reason(monkeypatch):
    real = registry.importlib.import_module

    def absent(name):
        if name.startswith("vitfast.kernels"):
            raise ImportError("No module named 'triton'")
        return real(name)

    monkeypatch.setattr(registry.importlib, "import_module", absent)
    assert (
        "No module named 'triton'" in registry._triton("linear").why_not(ops.Spec("linear", "cuda", torch.float16))[0]
    )


X, W = make(4, 48), make(64, 48)
QKV = make(2, 5, 3, 2, 24)
IMAGES = torch.zeros(1, 3, 16, 16)
BAD = {
    "linear widths": (lambda: ops.linear(X, make(64, 47)), r"\(4, 48\) and \(64, 47\)"),
    "linear bias": (lambda: ops.linear(X, W, make(63)), r"bias has shape \(63,\), expected \(64,\)"),
    "linear dtype": (lambda: ops.linear(X, W.half()), "weight has dtype torch.float16"),
    "linear int": (lambda: ops.linear(X.int(), W), "x has dtype torch.int32"),
    "linear activation": (lambda: ops.linear(X, W, activation="relu"), "'relu'"),
    "linear swiglu": (lambda: ops.linear(X, make(63, 48), activation="swiglu"), "even number.*63"),
    "linear stats": (lambda: ops.linear(X, W, row_stats=make(4, 1, 2)), "row_stats and weight_sum go together"),
    "linear no columns": (lambda: ops.linear(make(4, 0), make(64, 0)), r"K >= 1 do not fit: \(4, 0\) and \(64, 0\)"),
    "linear layer_scale": (
        lambda: ops.linear(X, W, layer_scale=make(64), activation="swiglu"),
        r"layer_scale has shape \(64,\), expected \(32,\)",
    ),
    "linear residual": (
        lambda: ops.linear(X, W, residual=make(64)), r"residual has shape \(64,\), expected \(4, 64\)"
    ),
    "linear residual dtype": (lambda: ops.linear(X, W, residual=make(4, 64).half()), "residual has dtype.*float16"),
    "linear device": (lambda: ops.linear(X, W, make(64).to("meta")), "bias is on meta, expected"),
    "linear weight_sum": (
        lambda: ops.linear(X, W, row_stats=make(4, 1, 2), weight_sum=make(48)),
        r"weight_sum has shape \(48,\), expected \(64,\)",
    ),
    "norm weight": (lambda: ops.layer_norm(X, make(47), make(48)), r"weight has shape \(47,\)"),
    "norm residual": (lambda: ops.add_layer_norm(X, make(3, 48), make(48), make(48)), r"residual has shape \(3, 48\)"),
    "attention axes": (lambda: ops.attention(X, X, X), r"q must be \[B, N, H, D\], got shape \(4, 48\)"),
    "attention key": (lambda: ops.attention(QKV[:, :, 0], make(2, 5, 2, 23), QKV[:, :, 2]), r"k has shape"),
    "attention mask": (
        lambda: ops.attention(*QKV.unbind(2), mask=torch.ones(3, 5, dtype=torch.bool)),
        r"mask of shape \(3, 5\) cannot be broadcast",
    ),
    "attention mask dtype": (lambda: ops.attention(*QKV.unbind(2), mask=make(5, 5)), "mask has dtype torch.float32"),
    "attention key_mask": (
        lambda: ops.attention(*QKV.unbind(2), key_mask=torch.ones(2, 4, dtype=torch.bool)),
        r"key_mask has shape \(2, 4\), expected \(2, 5\)",
    ),
    "attention head dim": (lambda: ops.attention(*make(1, 2, 3, 1, 257).unbind(2)), "head dim must be 1..256, got 257"),
    "attention stride": (
        lambda: ops.attention(*(make(2, 5, 24, 2).transpose(2, 3) for _ in range(3))),
        "last axis of q has stride 2",
    ),
    "patch size": (lambda: ops.patch_embed(IMAGES, make(8, 147), patch_size=(7, 7)), "16x16 is not a positive"),
    "patch channels": (lambda: ops.patch_embed(IMAGES, make(8, 256), patch_size=(8, 8)), "3 channels.*192, got 256"),
    "patch position": (
        lambda: ops.patch_embed(IMAGES, make(8, 192), None, make(5, 8), patch_size=(8, 8)),
        r"position has shape \(5, 8\), expected \(4, 8\)",
    ),
    "attention_block heads": (
        lambda: ops.attention_block(QKV[:, :, 0, 0], make(144, 24), None, make(24, 48), None, heads=5),
        r"got \(2, 5, 24\) and \(144, 24\) for 5 heads",
    ),
    "attention_block proj": (
        lambda: ops.attention_block(QKV[:, :, 0, 0], make(144, 24), None, make(24, 47), None, heads=2),
        r"proj_weight has shape \(24, 47\), expected \(24, 48\)",
    ),
    "attention_block weight_sum": (
        lambda: ops.attention_block(
            QKV[:, :, 0, 0], make(144, 24), None, make(24, 48), None, heads=2, weight_sum=make(144).double()
        ),
        "weight_sum has dtype torch.float64",
    ),
    "mlp weight_sum": (
        lambda: ops.mlp(X, W, None, make(48, 64), None, weight_sum=make(48)), r"weight_sum has shape \(48,\)"
    ),
    "mlp residual": (lambda: ops.mlp(X, W, None, make(48, 64), None, residual=make(48)), r"residual has shape \(48,\)"),
    "mlp": (lambda: ops.mlp(X, W, None, make(48, 63), None), r"fc2_weight has shape \(48, 63\), expected \(48, 64\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("uint8", [False, True])
def test_pack_patch_embed_is_normalise_then_convolve(uint8, channels_last):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    weight, bias = make(8, 3, 4, 6), make(8)
    pixels = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, device=testing.device())
    normal = (pixels.double() / 255 - pixels.new_tensor(mean, dtype=torch.float64).view(3, 1, 1)) / pixels.new_tensor(
        std, dtype=torch.float64
    ).view(3, 1, 1)
    oracle = F.conv2d(normal, weight.double(), bias.double(), stride=(4, 6)).flatten(2).transpose(1, 2)
    if uint8:
        packed = ops.pack_patch_embed(weight, bias, mean=mean, std=std, uint8=True, channels_last=channels_last)
        images = pixels
    else:
        packed = ops.pack_patch_embed(weight, bias, channels_last=channels_last)
        images = normal.float()
    images = images.permute(0, 2, 3, 1) if channels_last else images
    got = ops.patch_embed(images, *packed, patch_size=(4, 6), channels_last=channels_last, backend="torch")
    torch.testing.assert_close(got.double(), oracle, rtol=1e-5, atol=1e-5)


def test_folded_norm_equals_norm_then_linear():
    x, w, b = make(9, 200) + 30, make(64, 200, scale=0.1), make(64)
    norm = (make(200, seed=1), make(200, seed=2))
    weight, total, bias = ops.fold_norm(w, b, *norm)
    got = ops.linear(x, weight, bias, row_stats=ops.row_stats(x), weight_sum=total, backend="torch")
    want = F.linear(F.layer_norm(x, (200,), *norm, 1e-6), w, b)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("op", "capability", "names"),
    [
        ("linear", (9, 0), ["torch", "native", "triton"]),
        ("linear", (8, 0), ["torch", "triton", "native"]),
        ("attention", (9, 0), ["torch", "native", "triton"]),
        ("attention", (10, 0), ["torch", "triton", "native"]),
    ],
)
def test_default_order_of_kernels_that_nobody_measured(op, capability, names, monkeypatch):
    """The plain op first; then, on Hopper, what is faster by its machine code (tests/diagnostics/test_order.py)."""
    monkeypatch.setattr(registry, "backend", lambda op, name: registry.Backend(name, op, print))
    monkeypatch.setattr(registry, "proven", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    able, _ = registry.candidates(registry.Spec(op, "cuda", torch.float16, capability))
    assert [entry.name for entry in able] == names


def test_default_order_is_torch_first_where_nothing_was_measured():
    able, refused = registry.candidates(ops.Spec("linear", "cpu", torch.float32))
    assert able[0].name == "torch"
    assert {entry.name for entry in able} | set(refused) == set(ops.BACKENDS)


def test_backward_through_an_inference_op_raises():
    x = make(4, 48).requires_grad_()
    with pytest.raises(RuntimeError, match=r"autograd|backward|gradient|does not require grad"):
        ops.layer_norm(x, make(48), make(48)).sum().backward()
