"""The C++ extension under hostile calls: a right result or a clear refusal, never a crash or uninitialised memory."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitfast
from vitfast import ops, testing
from vitfast.ops import native, reference

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vitfast._C") is None,
    reason="vitfast._C is not built (a C++ compiler builds it on install)",
)

SCRIPT = Path(__file__).parents[1] / "helpers" / "hostile_calls.py"
OPS = ("attention", "layer_norm", "pack_linear", "linear", "patch_embed", "pack_patch_embed", "quantized_linear")


def sanitized() -> bool:
    from vitfast import _C

    return "-fsanitize" in _C.build_info()["flags"]


def make_calls(*arguments) -> subprocess.CompletedProcess:
    environment = importlib.import_module("helpers.hostile_calls").environment(sanitized())
    environment["PYTHONPATH"] = str(Path(vitfast.__file__).parents[1])
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)


def last_call(result: subprocess.CompletedProcess) -> str:
    """The call during which a process ended, and what it said about that."""
    calls = list(re.finditer(r"^call \d+ of seed .*$", result.stderr, re.MULTILINE))
    return f"exit status {result.returncode} in {result.stderr[calls[-1].start() :] if calls else result.stderr}"


def test_hostile_calls():
    """A few hundred; 5,000 where the extension is built with the sanitizers (`make sanitize`)."""
    count = 5000 if sanitized() else 200
    result = make_calls("vitfast", count)
    assert result.returncode == 0, last_call(result)
    report = json.loads(result.stdout.splitlines()[-1])
    print(report["counts"])
    assert not report["wrong"], "\n".join(report["wrong"])
    assert sum(sum(counts.values()) for counts in report["counts"].values()) == count
    for op in OPS:  # neither all served nor all refused, or the calls would show little
        counts = report["counts"][op]
        assert counts["refused"], op
        assert op == "quantized_linear" or counts["right"] > sum(counts.values()) / 4, op


def test_a_crash_has_a_name_and_unwritten_memory_shows():
    result = make_calls("vitfast", 3, "planted")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "call 1 of seed vitfast: planted: wrong: infinity or NaN in other places" in result.stderr
    assert "call 2 of seed vitfast: planted" in last_call(result)


FAR = 384307168202282336  # 48 times as many is 2^64 + 512


def freed(*shape: int) -> torch.Tensor:
    tensor = torch.ones(*shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(*shape: int) -> torch.Tensor:
    tensor = torch.ones(*shape)
    tensor.untyped_storage().resize_(tensor.numel() * 4 - 1)
    return tensor


def misaligned(*shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(4 * size + 1), dtype=torch.float32, offset=1).view(shape)


def many_keys():
    q, k = torch.zeros(1, 5, 1, 8), torch.zeros(1, 1, 1, 8)
    return ops.attention(q, *[k.expand(1, FAR, 1, 8)] * 2, backend="native")


def many_scores():
    q, k = torch.zeros(1, 1, 1, 8).expand(1, 2**40, 1, 8), torch.zeros(1, 1, 1, 8).expand(1, 2**40, 1, 8)
    return ops.attention(q, k, k, bias=torch.zeros(1), backend="native")


def embed(images, weight, **options):
    return ops.patch_embed(images, weight, patch_size=(4, 4), backend="native", **options)


REFUSED = {
    "attention: the sizes are too large: .* is more than 64 bits hold": many_keys,
    "attention: the sizes are too large: 1099511627776 \\* 1099511627776": many_scores,
    "attention: q of shape .* needs a storage of 4096 bytes, but its storage has 0": lambda: ops.attention(
        *[freed(1, 16, 1, 64)] * 3, backend="native"
    ),
    "attention: v of shape .* needs a storage of 4096 bytes, but its storage has 4095": lambda: ops.attention(
        *[torch.ones(1, 16, 1, 64)] * 2, shrunk(1, 16, 1, 64), backend="native"
    ),
    "attention: bias of shape .* needs a storage": lambda: ops.attention(
        *[torch.ones(1, 4, 1, 8)] * 3, bias=freed(4, 4), backend="native"
    ),
    "attention: q is not aligned to the 4 bytes of its torch.float32": lambda: ops.attention(
        *[misaligned(1, 4, 1, 8)] * 3, backend="native"
    ),
    "pack_patch_embed: the sizes are too large: 4294967296 \\* 4294967296": lambda: native.pack_patch_embed(
        torch.zeros(4, 12), patch_size=(2**32, 2**32)
    ),
    "why_no_integers: the sizes are too large: 4294967296 \\* 4294967296": lambda: native.why_no_integers(
        torch.zeros(4, 12), patch_size=(2**32, 2**32)
    ),
    "pack_patch_embed: weight must be .* a multiple of the patch 0x4, got shape \\(4, 12\\)": lambda: (
        native.pack_patch_embed(torch.zeros(4, 12), patch_size=(0, 4))
    ),
    "why_no_integers: weight must be .* a multiple of the patch 4x0, got shape \\(4, 12\\)": lambda: (
        native.why_no_integers(torch.zeros(4, 12), patch_size=(4, 0))
    ),
    "patch_embed: images .*\\(2, 0, 8, 8\\) have no channels": lambda: embed(
        torch.zeros(2, 0, 8, 8), torch.zeros(16, 0)
    ),
    "patch_embed: images .*\\(2, 8, 8, 0\\) have no channels": lambda: torch.ops.vitfast_native.patch_embed(
        torch.zeros(2, 8, 8, 0), torch.zeros(16, 0), patch_size=(4, 4), channels_last=True
    ),
    "patch_embed: images of shape .* needs a storage": lambda: embed(freed(2, 3, 8, 8), torch.zeros(16, 48)),
    "pack_patch_embed: weight of shape .* needs a storage": lambda: embed(torch.ones(2, 3, 8, 8), freed(16, 48)),
    "linear: bias of shape .* needs a storage": lambda: ops.linear(
        torch.ones(2, 8), torch.ones(4, 8), freed(4), backend="native"
    ),
    "pack_linear: weight of shape .* needs a storage": lambda: native.pack(freed(4, 8)),
    "layer_norm: x of shape .* needs a storage": lambda: ops.layer_norm(
        freed(3, 8), torch.ones(8), torch.ones(8), backend="native"
    ),
    "add_layer_norm: residual of shape .* needs a storage": lambda: ops.add_layer_norm(
        torch.ones(3, 8), shrunk(3, 8), torch.ones(8), torch.ones(8), backend="native"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    try:
        REFUSED[message]()
    except Exception as error:  # not pytest.raises: it would print the tensors, which torch does not survive
        said = f"{type(error).__name__}: {error}"
    else:
        said = "nothing"
    assert re.match(f"ValueError: {message}", said), said


def test_a_packed_weight_of_bytes_is_whole_and_aligned():
    weight = testing.make(16, 48).cpu().sign_()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    layout = {"patch_size": (4, 4)}
    packed = native.pack_patch_embed(weight, **layout, uint8=True)
    if packed.dtype != torch.int8:
        pytest.skip(native.why_no_integers(weight, **layout))
    buffer = torch.zeros(packed.numel() + 1, dtype=torch.int8)
    moved = buffer[1:].view(packed.shape).copy_(packed)
    with pytest.raises(ValueError, match="weight that pack_patch_embed returned is not aligned to 4 bytes"):
        native.patch_embed_packed(images, moved, **layout)
    with pytest.raises(ValueError, match=r"needs K = 3\*4\*4 = 48"):  # two columns more: not a whole number of digits
        native.patch_embed_packed(images, torch.nn.functional.pad(packed, (0, 2)), **layout)


def test_small_operands_need_no_alignment():
    """A weight or bias that is not aligned is copied, as one that is not contiguous is."""
    x, weight, bias = torch.randn(5, 8), misaligned(4, 8), misaligned(4)
    weight.copy_(torch.randn(4, 8)), bias.copy_(torch.randn(4))
    torch.testing.assert_close(ops.linear(x, weight, bias, backend="native"), reference.linear(x, weight, bias))


def test_strides_of_axes_of_one_do_not_matter():
    """They may be anything, and a product with one of them may wrap round."""
    images = torch.randn(1, 3, 4, 4).as_strided((1, 3, 4, 4), (2**62, 16, 4, 1))
    weight = torch.randn(8, 48)
    torch.testing.assert_close(embed(images, weight), embed(images.contiguous(), weight))
    q = torch.randn(1, 1, 1, 8).as_strided((1, 1, 1, 8), (2**62, 2**62 - 1, 2**61, 1))
    torch.testing.assert_close(ops.attention(q, q, q, backend="native"), q.contiguous())


def test_empty_weights_of_any_size_end():
    assert native.pack(torch.empty(2**62, 0)).shape == (2**62, 0)
    assert native.pack(torch.empty(0, 2**62)).shape == (0, 2**62)


SOURCES = sorted(path for path in SCRIPT.parents[2].glob("csrc/**/*") if path.suffix in (".cpp", ".h"))


def test_the_checking_accessor_is_the_only_one():
    """To inputs: `mutable_data_ptr` is that of results and buffers, which the op has just allocated."""
    assert len(SOURCES) > 20
    users = {path.name for path in SOURCES if re.search(r"(?<!mutable_)data_ptr", path.read_text())}
    assert users == {"guards.h"}
