"""The compile cases of kernels/_compile executed: each through its launcher, on a small awkward problem that it fits.

A launcher does all that it would; what it launches is then the case itself and not a specialisation of the problem's.
"""

import contextlib
import importlib
import itertools
import re
from unittest import mock

import torch
from helpers import attention_gradients
from helpers.ptx.device import Device, executing, known

from vitfast import ops
from vitfast.diagnostics import compiled
from vitfast.images import pillow_resize
from vitfast.kernels import (
    attention,
    attention_backward,
    attention_block,
    layer_norm,
    linear,
    mlp,
    patch_embed,
    quantize,
    quantized_linear,
    resample,
)
from vitfast.kernels._compile.case import CompileCase
from vitfast.ops import reference
from vitfast.ops.accuracy import E4M3_PRODUCTS, GATED_E4M3_PRODUCTS, TOLERANCES, assert_close
from vitfast.testing import check_op, guarded, make

BF16 = torch.bfloat16
KINDS = {"fp8e4nv": torch.float8_e4m3fn, "i8": torch.int8, "bf16": BF16, "fp32": torch.float32, "u8": torch.uint8}
FILES = (
    "attention", "attention_backward", "attention_block", "attention_short", "layer_norm", "linear", "mlp",
    "patch_embed", "quantize", "quantized_linear", "resample",
)  # fmt: skip


INNER, TOKENS = 528, 133
"""Of a product, and of attention, where the case does not say otherwise."""


def cases_of(file: str, arch: int) -> list[CompileCase]:
    """The cases of a file of kernels/ for a chip."""
    module = importlib.import_module(f"vitfast.kernels._compile.{file}")
    return [case for case in module.compile_cases() if arch in case.archs]


def run(case: CompileCase, arch: int, seed: int = 0, change=None, **problem) -> Device:
    """Launch the case and compare what it gives with the oracle, under the bounds of a GPU.

    Args:
        change: see `Device`. problem: sizes other than the kernel's usual ones, for those whose check takes them.

    Raises:
        AssertionError: if it is wrong, traps, or is not what the launcher launches.
    """
    with executing(arch, seed) as device, _in_place(case, arch, device):
        if change:
            device.change = change
        CHECKS[case.kernel](case, **problem)
    launches = [launch for launch in device.launches if launch.kernel == case.fn.__name__]
    assert launches, "the case was not launched"
    # Triton's promotion of e4m3 sums reads them before any wait, and leaves that to the assembler.
    promotes = "fp8e4nv" in str(case.signature.get("x")) and not case.constexprs["GROUPED"]
    waits = sum(launch.counts["implied_waits"] for launch in launches)
    assert promotes or not waits, f"sums of products under way were used {waits} times"
    return device


@contextlib.contextmanager
def _in_place(case: CompileCase, arch: int, device: Device):
    """The case where the JIT would have compiled a launch of its kernel."""
    made = known(compiled._compile(case, arch))
    original = device.launch

    def launch(key, signature, metadata, grid, args):
        if metadata.name != case.fn.__name__:
            return original(key, signature, metadata, grid, args)
        values = dict(zip(case.fn.arg_names, args, strict=True))
        for path, want in case.constexprs.items():
            name, _, entry = path.partition(".")
            got = values[name][int(entry)] if entry else values[name]
            assert got == want, f"the case has {path} = {want!r}, the launch {got!r}"
        for path in case.aligned:
            name, _, entry = path.partition(".")
            got = values[name][int(entry)] if entry else values[name]
            got = got.data_ptr() if isinstance(got, torch.Tensor) else got
            assert got % 16 == 0, f"the case has {path} divisible by 16, the launch {got}"
        kinds = [case.signature.get(name, "constexpr") for name in case.fn.arg_names]
        return original(made.metadata.hash, kinds, made.metadata, grid, args)

    compile_kernel = importlib.import_module("triton.runtime.jit")

    def compile_or_case(src, *args, **kwargs):
        return made if src.fn is case.fn else noted(src, *args, **kwargs)

    case.fn.device_caches.clear()
    import triton

    holder, name = (compile_kernel, "compile") if hasattr(compile_kernel, "compile") else (triton.compiler, "compile")
    noted = getattr(holder, name)
    made._run = None
    made.module = None
    try:
        with mock.patch.object(device, "launch", launch), mock.patch.object(holder, name, compile_or_case):
            yield
    finally:
        case.fn.device_caches.clear()


def _tensor(*shape, dtype=BF16, seed=0, scale=1.0):
    return guarded(make(*shape, dtype=dtype, seed=seed, scale=scale))


def _present(case: CompileCase, *names: str) -> list[str]:
    return [name for name in names if name in case.signature]


def _named(configs, name: str):
    found = [config for config in configs if config.name == name]
    assert found, f"there is no config {name!r} among {[config.name for config in configs]}"
    return found[0]


def _layer_norm(case):
    width = case.constexprs["BLOCK_COLUMNS"] * 3 // 4
    x, weight, bias = _tensor(13, width), _tensor(width, seed=1), _tensor(width, seed=2)
    if "residual" in case.signature:
        check_op(layer_norm.add_layer_norm, reference.add_layer_norm, x, _tensor(13, width, seed=3), weight, bias, 1e-6)
    else:
        check_op(layer_norm.layer_norm, reference.layer_norm, x, weight, bias, 1e-6)


def _row_stats(case):
    check_op(layer_norm.row_stats, reference.row_stats, _tensor(13, 528))


def _quantize(case):
    width = case.constexprs["BLOCK_COLUMNS"] * 3 // 4
    norm = (_tensor(width, seed=1), _tensor(width, seed=2)) if "weight" in case.signature else ()
    kind = KINDS[case.signature["values"][1:]]
    check_op(quantize.quantize, reference.quantize, _tensor(13, width), *norm, dtype=kind)


def _resample(case):
    axis = 1 if case.config == "across_rows" else 2
    size = (70, 40) if axis == 1 else (21, 60)
    images = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tables = [torch.from_numpy(table) for table in pillow_resize.taps(size[axis - 1], 23, "bicubic")]
    check_op(resample.resample, reference.resample, *map(guarded, (images, *tables)), axis=axis)


def _patch_embed(case):
    side = case.constexprs["PATCH_H"]
    channels_last = case.constexprs["INNER"] == 3 * side
    pixel, element = (KINDS[case.signature[name][1:]] for name in ("images", "weight"))
    height, width, channels = 9 * side, 8 * side, case.constexprs["BLOCK_N"] + 16
    shape = (2, height, width, 3) if channels_last else (2, 3, height, width)
    images = make(*shape, scale=60).add_(128).clamp_(0, 255) if pixel == torch.uint8 else make(*shape)
    inputs = (
        guarded(images.to(pixel)),
        _tensor(channels, 3 * side**2, dtype=element, seed=1, scale=(3 * side**2) ** -0.5),
        *(_tensor(*size, dtype=element, seed=i) for i, size in enumerate(((channels,), (72, channels), (5, channels)))),
    )
    config = _named(patch_embed.CONFIGS, re.match(r"(float32_)?\d+x\d+x\d+", case.config)[0])
    with mock.patch.object(patch_embed, "pick_config", return_value=config):
        options = {"patch_size": (side, side), "channels_last": channels_last}
        with _summed_in_order(element):
            baseline = reference.patch_embed(*inputs, **options)
        oracle = reference.patch_embed(*inputs, **options, upcast=True)
        assert_close(patch_embed.patch_embed(*inputs, **options), oracle, baseline)


def _folded(x, weight, bias):
    """A LayerNorm of x folded into weight and bias: both, and the weight's sums."""
    width = x.shape[-1]
    gamma, beta = 1 + make(width, dtype=x.dtype, seed=7, scale=0.2), make(width, dtype=x.dtype, seed=8, scale=0.2)
    weight, weight_sum, bias = ops.fold_norm(weight, bias, gamma, beta)
    return guarded(weight), guarded(bias), guarded(weight_sum)


def _linear(case):
    element = torch.float32 if case.config.startswith("float32") else BF16
    m, n, inner = case.constexprs.get("BLOCK_M", 64) + 9, case.constexprs.get("BLOCK_N", 64) + 16, INNER
    gated = case.constexprs["ACTIVATION"] == "swiglu"
    x = _tensor(m, inner, dtype=element)
    weight = _tensor(2 * n if gated else n, inner, dtype=element, seed=1, scale=inner**-0.5)
    bias = _tensor(weight.shape[0], dtype=element, seed=2, scale=0.3)
    options = {"activation": case.constexprs["ACTIVATION"] or None}
    sums = _named(linear.CONFIGS, "64x64x64_split8") if case.kernel == "linear_sum" else None
    config = sums or next(config for config in linear.CONFIGS[::-1] if case.config.startswith(f"{config.name}_"))
    if "row_stats" in case.signature:
        weight, bias, options["weight_sum"] = _folded(x, weight, bias)
        options["row_stats"] = guarded(ops.row_stats(x, backend="torch"))
    if "layer_scale" in case.signature:
        options |= {"layer_scale": _tensor(n, dtype=element, seed=3), "residual": _tensor(m, n, dtype=element, seed=4)}
    arguments = (x, weight) if config is not sums and linear.split_of(config) > 1 else (x, weight, bias)
    _check_with_stats(case, linear.linear, reference.linear, *arguments, config=config, **options)


def _check_with_stats(case, op, oracle, *arguments, config, **options):
    if "y_stats" not in case.signature and arguments[0].dtype != torch.float32:
        return check_op(lambda *a, **k: op(*a, config=config, **k), oracle, *arguments, **options)
    stats = "y_stats" in case.signature
    result = op(*arguments, config=config, **options, **({"stats": True} if stats else {}))
    y = result[0] if stats else result
    with _summed_in_order(y.dtype):
        baseline = oracle(*arguments, **options)
    assert_close(y, oracle(*arguments, **options, upcast=True), baseline)
    if stats:
        assert_close(result[1], reference.row_stats(y, upcast=True), reference.row_stats(y))


def _summed_in_order(dtype):
    """In fp32 x Wᵀ is summed one after the other as a GPU does: torch on a CPU sums in blocks, with less error."""

    def linear(x, weight, bias=None):
        y = torch.zeros(*x.shape[:-1], len(weight), dtype=x.dtype)
        for k in range(x.shape[-1]):
            y = torch.addcmul(y, x[..., k, None], weight[:, k])
        return y if bias is None else y + bias

    exact = dtype == torch.float32
    return mock.patch.object(torch.nn.functional, "linear", linear) if exact else contextlib.nullcontext()


def _mlp(case):
    width = 192 if case.config.startswith("width192") else 384
    rows, units, activation = case.constexprs["BLOCK_M"] + 3, 144, case.constexprs["ACTIVATION"]
    x = _tensor(rows, width)
    fc1 = _tensor(2 * units if activation == "swiglu" else units, width, seed=1, scale=width**-0.5)
    options = {
        "activation": activation,
        "layer_scale": _tensor(width, seed=5),
        "residual": _tensor(rows, width, seed=6),
    }
    bias = _tensor(len(fc1), seed=2, scale=0.3)
    if "weight_sum" in case.signature:
        fc1, bias, options["weight_sum"] = _folded(x, fc1, bias)
    rest = (_tensor(width, units, seed=3, scale=units**-0.5), _tensor(width, seed=4, scale=0.3))
    names = [config.name for config in mlp.CONFIGS]
    config = _named(mlp.CONFIGS, case.config if case.config in names else case.config.removesuffix(f"_{activation}"))
    _check_with_stats(case, mlp.mlp, reference.mlp, x, fc1, bias, *rest, config=config, **options)


def _attention_block(case, heads=2):
    width, head_dim = 192 if case.config.startswith("width192") else 384, case.constexprs["HEAD_DIM"]
    inner, tokens = heads * head_dim, 69
    x = _tensor(2, tokens, width)
    qkv, bias, weight_sum = _folded(
        x, _tensor(3 * inner, width, seed=1, scale=width**-0.5), _tensor(3 * inner, seed=2, scale=0.3)
    )
    proj = (_tensor(width, inner, seed=3, scale=inner**-0.5), _tensor(width, seed=4, scale=0.3))
    config = _named(attention_block.CONFIGS, case.config.split()[0])
    _check_with_stats(
        case, attention_block.attention_block, reference.attention_block, x, qkv, bias, *proj, config=config,
        heads=heads, weight_sum=weight_sum, layer_scale=_tensor(width, seed=5),
        residual=_tensor(2, tokens, width, seed=6),
    )  # fmt: skip


def _quantized_linear(case):
    kind = KINDS[re.search(r"(fp8e4nv|i8)", str(case.signature["x"]))[0]]
    m, n, inner = case.constexprs["BLOCK_M"] + 9, case.constexprs["BLOCK_N"] + 16, INNER
    gated, activation = case.constexprs["ACTIVATION"] == "swiglu", case.constexprs["ACTIVATION"] or None
    group = case.constexprs["BLOCK_K"] if case.constexprs["GROUPED"] else 0
    if group:
        parts = [reference.quantize(part, dtype=kind) for part in make(m, inner).split(group, dim=-1)]
        values, scales = zip(*parts, strict=True)
        x = (guarded(torch.cat([v.view(torch.int8) for v in values], -1).view(kind)), guarded(torch.stack(scales, -1)))
    else:
        x = tuple(guarded(t) for t in reference.quantize(make(m, inner), dtype=kind))
    rows = 2 * n if gated else n
    weight = [guarded(t) for t in reference.quantize(make(rows, inner, seed=1, scale=inner**-0.5), dtype=kind)]
    options = {"activation": activation, "requantize": "y_scale" in case.signature}
    if "residual" in case.signature:
        options |= {"layer_scale": _tensor(n, seed=3), "residual": _tensor(m, n, seed=4)}
    config = next(c for c in quantized_linear.CONFIGS if case.config.startswith(f"{c.name}_"))
    inputs = (*x, *weight, _tensor(rows, seed=2, scale=0.3))
    result = quantized_linear.quantized_linear(*inputs, config=config, **options)
    oracle, baseline = (reference.quantized_linear(*inputs, **options, upcast=upcast) for upcast in (True, False))
    bounds = TOLERANCES
    if kind == torch.float8_e4m3fn:  # tensor cores here as on a GPU
        bounds = GATED_E4M3_PRODUCTS if gated else E4M3_PRODUCTS
    assert_close(result, oracle, baseline, tolerances=bounds)


def _packed_qkv(batch, tokens, heads, head_dim, group=1):
    """q, k, v as they lie in what a block's first product gives."""
    qkv = _tensor(batch, tokens, heads + 2 * heads // group, head_dim)
    return qkv.split([heads, heads // group, heads // group], dim=2)


def _attention_options(case, batch, tokens, heads):
    head_dim, options = case.constexprs["HEAD_DIM"], {}
    if "bias" in case.signature:
        options["bias"] = _tensor(batch, heads, tokens, tokens, seed=5)
    if "mask" in case.signature:
        options["mask"] = attention_gradients.random_mask(batch, heads, tokens, tokens)
    if "slopes" in case.signature:
        options["slopes"] = guarded(make(heads, seed=6).abs() * 0.1)
    options |= {
        name: value for name, value in (("left", 40), ("right", 20), ("softcap", 5.0)) if name in case.signature
    }
    if "cos" in case.signature:
        angles = make(tokens - 5, head_dim, seed=7)
        half = angles[:, : head_dim // 2].repeat(1, 2)
        options |= {"cos": guarded(half.cos()), "sin": guarded(half.sin())}
        options["interleaved"] = case.constexprs["INTERLEAVED"]
        if options["interleaved"]:
            pairs = angles[:, : head_dim // 2].repeat_interleave(2, dim=1)
            options |= {"cos": guarded(pairs.cos()), "sin": guarded(pairs.sin())}
    if "q_weight" in case.signature:
        options |= {f"{t}_weight": _tensor(head_dim, seed=i) for i, t in enumerate("qk", 8)}
        options |= {f"{t}_bias": _tensor(head_dim, seed=i) for i, t in enumerate("qk", 10)}
    return options


SEQUENCES = (0, 37, 133, 150)


def _by_sequence(function, *tensors, upcast=False, **options):
    """A function of the reference on each packed sequence by itself; results along the rows."""
    parts = [
        function(*(t[:, begin:end] for t in tensors), upcast=upcast, **options)
        for begin, end in itertools.pairwise(SEQUENCES)
    ]
    return (
        torch.cat(parts, 1)
        if isinstance(parts[0], torch.Tensor)
        else [torch.cat(p, 1) for p in zip(*parts, strict=True)]
    )


def _attention(case):
    head_dim, group = case.constexprs["HEAD_DIM"], case.constexprs["GROUP"]
    packed, heads = "cu_keys" in case.signature, 4 if group > 1 else 2
    batch, tokens = (1, SEQUENCES[-1]) if packed else (2, TOKENS)
    q, k, v = _packed_qkv(batch, tokens, heads, head_dim, group)
    options = _attention_options(case, batch, tokens, heads)
    lengths, oracle = {}, reference.attention
    if packed:
        cu = torch.tensor(SEQUENCES, dtype=torch.int32)
        lengths = {"cu_queries": cu, "cu_keys": cu, "max_queries": 96, "max_keys": 96}

        def oracle(q, k, v, **kwargs):
            return _by_sequence(reference.attention, q, k, v, **kwargs)

    config = _named(attention.CONFIGS, case.config.removesuffix("_in_8_bits"))
    with mock.patch.object(attention, "pick_config", return_value=config):
        if "out_scale" in case.signature:
            options["quantize"] = KINDS[case.signature["out"][1:]]
        if "max_out" in case.signature:
            check_op(lambda *a, **k: attention.attention_forward(*a, **k, **lengths)[0], oracle, q, k, v, **options)
        else:
            check_op(lambda *a, **k: attention.attention(*a, **k, **lengths), oracle, q, k, v, **options)


def _attention_short(case):
    head_dim, tokens = case.constexprs["HEAD_DIM"], int(re.search(r"N=(\d+)", case.config)[1])
    q, k, v = _packed_qkv(1, tokens, 2, head_dim)
    config = _named(attention.attention_short.CONFIGS, case.config.split()[0])
    options = {"quantize": KINDS[case.signature["out"][1:]]} if "out_scale" in case.signature else {}
    check_op(lambda *a, **k: attention.attention(*a, config=config, **k), reference.attention, q, k, v, **options)


def _attention_backward(case):
    head_dim, group = case.constexprs["HEAD_DIM"], case.constexprs["GROUP"]
    packed, heads = "cu_keys" in case.signature, 4 if group > 1 else 2
    batch, tokens = (1, SEQUENCES[-1]) if packed else (2, TOKENS)
    q, k, v = _packed_qkv(batch, tokens, heads, head_dim, group)
    options = _attention_options(case, batch, tokens, heads)
    dout = _tensor(batch, tokens, heads, head_dim, seed=12)
    forward, lengths = _forward, {}
    if packed:
        cu = torch.tensor(SEQUENCES, dtype=torch.int32)
        lengths = {"cu_queries": cu, "cu_keys": cu, "max_queries": 96, "max_keys": 96}
        parts = [_forward(*(t[:, i:j] for t in (q, k, v)), **options) for i, j in itertools.pairwise(SEQUENCES)]
        out, stats = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], -1)
    else:
        out, stats = forward(q, k, v, **options)
    grads = attention_backward.attention_backward(
        dout, q, k, v, guarded(out), guarded(stats), bias_grad="dbias" in case.signature, **options, **lengths
    )
    if packed:
        want = attention_gradients.autograd
        oracle, baseline = (_by_sequence(want, dout, q, k, v, **options, upcast=upcast) for upcast in (True, False))
        return assert_close(list(grads[:3]), oracle, baseline, what="gradient")
    bias = options.pop("bias", None)
    if bias is None or grads[3] is None:
        want = attention_gradients.autograd
        oracle, baseline = (
            list(want(dout, q, k, v, bias=bias, **options, upcast=upcast))[:3] for upcast in (True, False)
        )
        return assert_close(list(grads[:3]), oracle, baseline, what="gradient")
    return attention_gradients.compare(grads, dout, q, k, v, bias=bias, **options)


def _forward(q, k, v, *, bias=None, mask=None, slopes=None, softcap=0.0, left=None, right=None):
    """What the forward gives its backward: out, and the largest score and the sum of each row."""
    out = reference.attention(
        q, k, v, bias=bias, mask=mask, slopes=slopes, softcap=softcap, left=left, right=right, upcast=True
    ).to(q.dtype)
    group = q.shape[2] // k.shape[2]
    q, k = q.double().transpose(1, 2), k.double().repeat_interleave(group, dim=2).transpose(1, 2)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias.double()
    position, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * (key - position).abs()
    seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    if left is not None:
        seen = seen & (key >= position - left)
    if right is not None:
        seen = seen & (key <= position + right)
    scores = scores.masked_fill(~seen, float("-inf"))
    largest = scores.amax(-1)
    shift = largest.masked_fill(largest == float("-inf"), 0.0)[..., None]
    return out, torch.stack([largest, (scores - shift).exp().sum(-1)]).float()


CHECKS = {
    "layer_norm": _layer_norm, "add_layer_norm": _layer_norm, "row_stats": _row_stats, "quantize": _quantize,
    "patch_embed": _patch_embed, "linear": _linear, "linear_sum": _linear, "mlp": _mlp,
    "attention_block": _attention_block, "quantized_linear": _quantized_linear, "attention": _attention,
    "attention_short": _attention_short, "attention_dq": _attention_backward, "attention_dkdv": _attention_backward,
    "resample": _resample,
}  # fmt: skip
