"""Other people's kernels beside ours, each optional and named.

A provider is a small function of a `Call` that gives what is timed: a function of nothing. It raises `Absent` where it
cannot run; a missing package or an error of the library's is caught and becomes the reason in its cell. To add one:

    @provider("attention", "my attention")
    def mine(call: Call) -> Callable[[], Any]:
        from mymodule import my_attention
        return functools.partial(my_attention, *call.args, **call.kwargs)

From outside, `vitfast bench kernels --op attention --provider mymodule:my_attention` does the same; the function takes
the arguments of `vitfast.ops.attention`. Work done before the function is returned (packing weights) is not timed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitfast import ops
from vitfast.benchmarks.cases import OPS, Call, Case, backend_options, gradients
from vitfast.engine import planner
from vitfast.models import vit
from vitfast.models.config import ViTConfig
from vitfast.models.weights import Block, prepare_weights
from vitfast.ops import checks, mkldnn, registry, scaled_mm
from vitfast.ops.registry import BACKENDS, backend

Thunk = Callable[[], Any]
BASELINE = "torch eager"
INTERPRETED = "Triton's interpreter is there to check kernels, not to time them"


class Absent(RuntimeError):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """`build` makes what is timed. `slow`: takes long to compile, so it runs only when asked for.

    `eight_bit`: computes in 8 bits, so that it is judged by `testing.EIGHT_BIT_RMS` and marked so.
    """

    name: str
    build: Callable[[Call], Thunk]
    slow: bool = False
    eight_bit: bool = False


PROVIDERS: dict[str, dict[str, Provider]] = {op: {} for op in OPS}


def provider(op: str, name: str, **flags: bool) -> Callable[[Callable[[Call], Thunk]], Callable[[Call], Thunk]]:
    """Register a function as a provider of an op; `flags` as in Provider."""

    def register(build: Callable[[Call], Thunk]) -> Callable[[Call], Thunk]:
        PROVIDERS[op][name] = Provider(name, build, **flags)
        return build

    return register


def providers_of(case: Case, *, slow: bool = False, extra: Mapping[str, Provider] | None = None) -> dict[str, Provider]:
    """The providers of a case: plain torch, our backends, registered providers and those given."""
    providers = {BASELINE: Provider(BASELINE, functools.partial(_plain, case))}
    if case.spec.op in registry.OPS:
        providers = {
            name: Provider(name, functools.partial(_backend, case, key)) for key, name in BACKEND_NAMES.items()
        }
    return providers | {n: p for n, p in PROVIDERS[case.op].items() if slow or not p.slow} | dict(extra or {})


BACKEND_NAMES = {name: BASELINE if name == "torch" else f"vitfast {name}" for name in BACKENDS}


def _plain(case: Case, call: Call) -> Thunk:
    """The reference, in the case's dtype."""
    return functools.partial(OPS[case.op].reference, *call.args, **call.kwargs)


def _backend(case: Case, name: str, call: Call) -> Thunk:
    """One of this project's backends, "torch" among them."""
    entry = backend(case.spec.op, name)
    if reasons := entry.why_not(case.spec):
        raise Absent("; ".join(reasons))
    if name == "triton" and case.device.type == "cpu":
        raise Absent(INTERPRETED)
    if case.op == "attention_backward":
        return functools.partial(gradients(functools.partial(ops.attention, backend=name)), *call.args, **call.kwargs)
    return functools.partial(entry.call, *call.args, **backend_options(call.kwargs))


def from_outside(path: str) -> Provider:
    """The provider `module:function`, called as the op is.

    Raises:
        ValueError: if it does not look like that, or there is no such function.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"a provider from outside is named module:function, got {path!r}")
    try:
        run = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"provider {path!r} cannot be imported: {error}") from None
    return Provider(path, lambda call: functools.partial(run, *call.args, **call.kwargs))


def _compiled(op: str, mode: str, call: Call) -> Thunk:
    run = torch.compile(OPS[op].reference, mode=mode, fullgraph=True, dynamic=False)
    return functools.partial(run, *call.args, **call.kwargs)


for _op in OPS.keys() - {"attention_backward"}:
    PROVIDERS[_op]["torch.compile"] = Provider("torch.compile", functools.partial(_compiled, _op, "default"), slow=True)
    # Without its own CUDA graphs: every provider is captured in the same way here.
    _tuned = functools.partial(_compiled, _op, "max-autotune-no-cudagraphs")
    PROVIDERS[_op]["torch.compile max-autotune"] = Provider("torch.compile max-autotune", _tuned, slow=True)


def _packed(op: str, name: str, call: Call) -> Thunk:
    """A product, or patch_embed, on a weight that was packed once, as the engine runs it on a CPU."""
    entry, spec = backend(op, name), registry.Spec.of(op, call.args[0], call.args[1].dtype)
    if op == "quantized_linear":
        x, x_scale, weight = call.args[:3]
        asked = call.kwargs.get("activation"), call.kwargs.get("requantize", False)
        spec = checks.quantized_linear_spec(x, x_scale, weight, *asked)
    if reasons := mkldnn.why_not(spec) if name == "torch" else entry.why_not(spec):
        raise Absent("; ".join(reasons))
    if planner.packed_op(entry, spec) is None:
        raise Absent(f"packs no weight of {op} in {spec.dtype} on {spec.device}")
    if "row_stats" in call.kwargs and name == "torch":
        raise Absent("has no folded norm")
    return planner.planned_call(entry, spec, call)


for _op in ("linear", "quantized_linear"):
    PROVIDERS[_op]["oneDNN packed"] = Provider("oneDNN packed", functools.partial(_packed, _op, "torch"))
for _op in ("linear", "quantized_linear", "patch_embed"):
    _native = functools.partial(_packed, _op, "native")
    PROVIDERS[_op]["vitfast native packed"] = Provider("vitfast native packed", _native)


@provider("linear", "torchao FP8", eight_bit=True)
def torchao_fp8(call: Call) -> Thunk:
    """Weights quantised once per channel, activations on the fly per row."""
    x, weight, *bias = call.args
    if call.kwargs:
        raise Absent("is compared on the plain product and with a bias only")
    if x.dtype != torch.bfloat16:
        raise Absent("is compared in bf16 only")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    width, inner = weight.shape
    layer = torch.nn.Linear(inner, width, bias=bool(bias), device=x.device, dtype=x.dtype)
    layer.load_state_dict({"weight": weight, **({"bias": bias[0]} if bias else {})})
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return functools.partial(layer, x)


@provider("quantized_linear", "torch._scaled_mm")
def scaled_mm_linear(call: Call) -> Thunk:
    """cuBLASLt's or CUTLASS's product, with the rest of the epilogue in torch."""
    x, _, weight = call.args[:3]
    spec = registry.Spec.of("quantized_linear", x, K=x.shape[-1], N=weight.shape[0])
    if reasons := scaled_mm.why_not(spec):
        raise Absent("; ".join(reasons))
    kwargs = {name: value for name, value in call.kwargs.items() if name != "requantize"}
    if kwargs != call.kwargs:
        raise Absent("does not quantise its output")
    return functools.partial(scaled_mm.linear, *call.args, **kwargs)


def _planned_block(choice: str, call: Call) -> Thunk:
    """A block as the engine runs it, its weights packed and its norms folded as the plan has it."""
    (x, weights), heads = call.args, call.kwargs["heads"]
    batch, tokens, width = x.shape
    config = ViTConfig((tokens - 1, 1), (1, 1), width, 1, heads, weights["fc1.weight"].shape[0])
    plan = planner.build(config, device=x.device, dtype=x.dtype, backend=choice, batch=batch)
    named = {f"blocks.0.{name}": weight for name, weight in weights.items()}
    named["patch_embed.weight"] = x.new_zeros(width, 3, 1, 1)  # not part of a block
    prepared = prepare_weights(config, named, plan, device=x.device, dtype=x.dtype)
    run_block = vit.fused_block if plan.fused else vit.folded_block
    stats = vit.first_stats(plan, x)  # in a model, the block before writes them

    block = prepared.blocks[0]
    assert isinstance(block, Block)

    def run() -> Tensor:
        return run_block(config, prepared.activation, block, x, stats, plan, {}, last=False)[0]

    return run


@provider("block", "vitfast engine")
def engine_block(call: Call) -> Thunk:
    """With the backends that the planner chooses."""
    return _planned_block("auto", call)


@provider("block", "vitfast triton")
def triton_block(call: Call) -> Thunk:
    """In five launches of our Triton kernels, or four where mlp is one; only a measured plan has attention_block."""
    if call.args[0].device.type == "cpu":
        raise Absent(INTERPRETED)
    return _planned_block("triton", call)


def _apart(x, qkv_weight, qkv_bias, proj_weight, proj_bias, *, heads, weight_sum, row_stats, **epilogue) -> Tensor:
    """What attention_block does, in the three launches that it takes the place of."""
    linear: Any = functools.partial(ops.linear, backend="triton")
    qkv = linear(x, qkv_weight, qkv_bias, row_stats=row_stats, weight_sum=weight_sum)
    mixed = ops.attention(*qkv.unflatten(2, (3, heads, -1)).unbind(2), backend="triton")
    return linear(mixed.flatten(2), proj_weight, proj_bias, **epilogue)


@provider("attention_block", "vitfast triton apart")
def attention_apart(call: Call) -> Thunk:
    """In three launches; in a model, the block before writes the statistics."""
    if call.args[0].device.type == "cpu":
        raise Absent(INTERPRETED)
    stats = ops.row_stats(call.args[0], backend="triton")
    return functools.partial(_apart, *call.args, row_stats=stats, **call.kwargs)


@provider("layer_norm", "Liger")
def liger_layer_norm(call: Call) -> Thunk:
    """Liger's Triton kernel."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return functools.partial(LigerLayerNormFunction.apply, *call.args)


def _sdpa(kind: SDPBackend, q, k, v, *, bias=None, mask=None, causal=False):
    with sdpa_kernel(kind):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        added = mask if bias is None else bias
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=causal)
    return out.transpose(1, 2).contiguous()


def _plain_attention(call: Call, *allowed: str, gpu_only: bool = True) -> dict[str, Any]:
    """The options of a call, if a library that takes no others can run it."""
    if others := call.kwargs.keys() - set(allowed):
        raise Absent(f"takes no {', '.join(sorted(others))}")
    if gpu_only and call.args[0].device.type != "cuda":
        raise Absent("runs on a GPU only")
    return call.kwargs


def _first(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The output alone, of functions some of whose versions also give statistics."""
    out = run(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def flash_attn_2(call: Call) -> Callable[..., Any]:
    """Dao's flash-attn, second generation."""
    _plain_attention(call, "causal")
    from flash_attn import flash_attn_func

    return flash_attn_func


def flash_attn_3(call: Call) -> Callable[..., Any]:
    """The third, for Hopper."""
    _plain_attention(call, "causal")
    from flash_attn_interface import flash_attn_func

    return functools.partial(_first, flash_attn_func)


def flash_attn_4(call: Call) -> Callable[..., Any]:
    """The fourth, in the CuTe DSL."""
    _plain_attention(call, "causal")
    from flash_attn.cute import flash_attn_func

    return functools.partial(_first, flash_attn_func)


def xformers_attention(call: Call) -> Callable[..., Any]:
    """xformers' choice of kernel."""
    _plain_attention(call, "causal", "bias")
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    def run(q, k, v, *, bias=None, causal=False):
        if bias is not None:
            bias = bias.expand(q.shape[0], -1, -1, -1)
        return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if causal else bias)

    return run


@provider("attention", "SageAttention", eight_bit=True)
def sage_attention(call: Call) -> Thunk:
    """Scores in INT8."""
    options = _plain_attention(call, "causal")
    from sageattention import sageattn

    return functools.partial(sageattn, *call.args, tensor_layout="NHD", is_causal=options.get("causal", False))


def _register_attention(name: str, choose: Callable[[Call], Callable[..., Any]]) -> None:
    """An attention function as a provider of the forward, and of forward and backward."""

    @provider("attention", name)
    def forward(call: Call) -> Thunk:
        return functools.partial(choose(call), *call.args, **call.kwargs)

    @provider("attention_backward", name)
    def forward_and_backward(call: Call) -> Thunk:
        return functools.partial(gradients(choose(call)), *call.args, **call.kwargs)


def _sdpa_choice(kind: SDPBackend, gpu_only: bool, call: Call) -> Callable[..., Any]:
    _plain_attention(call, "bias", "mask", "causal", gpu_only=gpu_only)
    return functools.partial(_sdpa, kind)


for _name, _kind, _gpu_only in (
    ("SDPA flash", SDPBackend.FLASH_ATTENTION, False),
    ("SDPA efficient", SDPBackend.EFFICIENT_ATTENTION, True),
    ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, True),
    ("SDPA math", SDPBackend.MATH, False),
):
    _register_attention(_name, functools.partial(_sdpa_choice, _kind, _gpu_only))
for _name, _choose in (
    ("flash-attn 2", flash_attn_2),
    ("flash-attn 3", flash_attn_3),
    ("flash-attn 4", flash_attn_4),
    ("xformers", xformers_attention),
):
    _register_attention(_name, _choose)
