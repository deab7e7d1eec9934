"""The CUDA patch_embed kernel without a GPU: its body under emulation, and nvcc's report of its registers."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from helpers.emulated import ROOT, library, needs_compiler, needs_nvcc

from vitfast import testing
from vitfast.ops import pack_patch_embed, reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import guarded

BF16, UINT8 = torch.bfloat16, torch.uint8
TYPES = {UINT8: "uint8", BF16: "bf16"}
# What the launcher has instances for: pixels, and the sizes of K's middle and inner axes; 0: any.
INSTANCES = [(UINT8, 16, 48), (UINT8, 14, 42), (UINT8, 0, 0), (BF16, 16, 16), (BF16, 14, 14), (BF16, 0, 0)]

# batch, channels, height, width, patch (h, w), C, prefix tokens; and why.
GRID = [
    (2, 3, 32, 48, (16, 16), 64, 1, "/16, two rows of three patches, CLS"),
    (3, 3, 28, 28, (14, 14), 48, 5, "/14, K not a multiple of 8, CLS and registers"),
    (1, 3, 7, 7, (7, 7), 6, 0, "one patch, odd sizes, no prefix"),
    (5, 1, 12, 20, (4, 5), 34, 2, "one channel, oblong patch"),
    (1, 4, 3, 3, (1, 1), 8, 1, "patches of one pixel"),
    (2, 3, 72, 64, (8, 8), 136, 1, "more rows and columns than one block"),
]

pytestmark = needs_compiler


class Params(ctypes.Structure):
    """PatchEmbedParams of csrc/cuda/patch_embed.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("images", "weight", "bias", "position", "prefix", "out")]
        + [(name, ctypes.c_int64) for name in ("image", "down", "right", "outer", "middle_stride", "inner_stride")]
        + [(name, ctypes.c_int) for name in ("middle", "inner", "rows", "tokens", "prefix_tokens", "grid_width")]
        + [(name, ctypes.c_int) for name in ("width", "k", "weight_stride")]
        + [("pairs", ctypes.c_bool)]
    )


def compiled(folder, instances, include=ROOT / "csrc"):
    listed = " ".join(f"CASE({TYPES[pixels]},{middle},{inner})" for pixels, middle, inner in instances)
    found = library("patch_embed", folder, [f"CASES={listed}"], include)
    found.patch_embed.restype = ctypes.c_char_p
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("patch_embed"), INSTANCES)


def inputs(case, pixels, channels_last):
    batch, channels, height, width, (ph, pw), c, prefix, _ = case
    shape = (batch, height, width, channels) if channels_last else (batch, channels, height, width)
    if pixels == UINT8:
        images = testing.make(*shape, scale=60).add_(128).clamp_(0, 255).to(UINT8).cpu()
    else:
        images = testing.make(*shape, dtype=BF16).cpu()
    k, patches = channels * ph * pw, height // ph * (width // pw)
    weight = testing.make(c, k, dtype=BF16, scale=k**-0.5 / (64 if pixels == UINT8 else 1)).cpu()
    rest = (testing.make(*size, dtype=BF16, seed=i).cpu() for i, size in enumerate([(c,), (patches, c), (prefix, c)]))
    return images, weight, *rest


def run(kernels, images, weight, bias, position, prefix, *, patch_size, channels_last, seed=0, general=False):
    """The kernel's output, complete and within bounds, and how many bank conflicts it met.

    Args:
        general: run the instance for any sizes and strides where there is one for these.
    """
    ph, pw = patch_size
    height, width, channels = (images.shape[i] for i in ((1, 2, 3) if channels_last else (2, 3, 1)))
    down, right, channel = (images.stride(i) for i in ((1, 2, 3) if channels_last else (2, 3, 1)))
    middle, inner, strides = ph, pw, (channel, down, right)
    if channels_last:
        middle, inner, strides = pw, channels, (down, right, channel)
        if right == channels * channel:
            middle, inner, strides = ph, pw * channels, (0, down, channel)
    pairs = inner % 2 == 0 and strides[2] == 1
    pairs &= all(s % 2 == 0 for s in (images.stride(0), ph * down, pw * right, *strides[:2]))
    asked = (middle, inner) if pairs and (images.dtype, middle, inner) in INSTANCES and not general else (0, 0)

    batch, tokens, c = images.shape[0], len(prefix) + height // ph * (width // pw), len(weight)
    k = weight.shape[1]
    padded = guarded(torch.nn.functional.pad(weight, (0, -k % 8)))
    bias, position, prefix = (None if t is None or not t.numel() else guarded(t) for t in (bias, position, prefix))
    out = guarded(torch.full((batch, tokens, c), float("nan"), dtype=BF16))
    pointers = [t.data_ptr() if t is not None else None for t in (images, padded, bias, position, prefix, out)]
    params = Params(
        *pointers, images.stride(0), ph * down, pw * right, *strides, middle, inner, batch * tokens, tokens,
        0 if prefix is None else len(prefix), width // pw, c, k, padded.shape[1], pairs,
    )  # fmt: skip
    # What the kernel may touch: from a tensor's first element to its last; of the image, whole words.
    there = [t for t in (images, padded, bias, position, prefix, out) if t is not None]
    begins = [t.data_ptr() for t in there]
    spans = [1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in there]
    sizes = [t.element_size() * span for t, span in zip(there, spans, strict=True)]
    end = -(-(begins[0] + sizes[0]) // 4) * 4
    begins[0] -= begins[0] % 4
    sizes[0] = end - begins[0]
    conflicts = ctypes.c_int64()
    error = kernels.patch_embed(
        TYPES[images.dtype].encode(), *asked, ctypes.byref(params), len(there),
        (ctypes.c_void_p * 6)(*begins), (ctypes.c_int64 * 6)(*sizes), ctypes.c_uint64(seed), ctypes.byref(conflicts),
    ).decode()  # fmt: skip
    if error:
        raise RuntimeError(error)
    return out, conflicts.value


def check(kernels, images, weight, bias, position, prefix, **kwargs):
    actual, conflicts = run(kernels, images, weight, bias, position, prefix, **kwargs)
    call = {name: kwargs[name] for name in ("patch_size", "channels_last")}
    args = (images, weight, bias, position, prefix)
    assert_close(actual, reference.patch_embed(*args, **call, upcast=True), reference.patch_embed(*args, **call))
    assert conflicts == 0
    return actual


@pytest.mark.parametrize(
    ("pixels", "channels_last"),
    [
        pytest.param(UINT8, True, id="uint8-NHWC"),
        pytest.param(BF16, False, id="bf16-NCHW"),
        pytest.param(UINT8, False, id="uint8-NCHW", marks=pytest.mark.full),
        pytest.param(BF16, True, id="bf16-NHWC", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("case", GRID, ids=lambda case: case[-1])
def test_sizes(kernels, case, pixels, channels_last):
    args = inputs(case, pixels, channels_last)
    check(kernels, guarded(args[0]), *args[1:], patch_size=case[4], channels_last=channels_last)


@pytest.mark.parametrize("pixels", [UINT8, pytest.param(BF16, marks=pytest.mark.full)], ids=str)
def test_strides_and_optional_arguments(kernels, pixels):
    images, weight, bias, position, prefix = inputs(GRID[0], pixels, True)
    kwargs = {"patch_size": (16, 16), "channels_last": True}
    for view in (testing.strided(images), images.transpose(1, 3).contiguous().transpose(1, 3)):
        check(kernels, view, weight, None, position, prefix, **kwargs)
    check(kernels, images, weight, bias, None, prefix[:0], **kwargs)
    # An image that begins at an odd address, as a crop may.
    shifted = torch.zeros(images.numel() + 8, dtype=pixels)[1 : 1 + images.numel()].view(images.shape).copy_(images)
    check(kernels, shifted, weight, bias, position, prefix, **kwargs, general=True)


def test_any_order_of_threads_and_either_instance_give_the_same_bits(kernels):
    args = inputs(GRID[0], UINT8, True)
    kwargs = {"patch_size": (16, 16), "channels_last": True}
    first, _ = run(kernels, *args, **kwargs, seed=1)
    for seed, general in ((2, False), (3, True)):
        assert torch.equal(run(kernels, *args, **kwargs, seed=seed, general=general)[0], first)


def test_with_mean_and_deviation_in_the_weight(kernels):
    """Pixels to tokens as a model has them, against the convolution of normalised floats."""
    images, _, bias, position, prefix = inputs(GRID[0], UINT8, True)
    kernel = testing.make(64, 3, 16, 16, scale=768**-0.5).cpu()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    folding = {"mean": mean, "std": std, "uint8": True, "channels_last": True, "dtype": BF16}
    weight, shift = pack_patch_embed(kernel, bias.float(), **folding)
    got, _ = run(kernels, images, weight, shift, position, prefix, patch_size=(16, 16), channels_last=True)
    floats = ((images.double() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    want = torch.nn.functional.conv2d(floats, kernel.double(), bias.double(), stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got[:, 1:].double(), want + position.double(), rtol=0, atol=0.1)


def test_shared_memory(kernels):
    """Two blocks on an SM of any GPU since sm_80, each with the 1 KiB that CUDA takes; no more than needs no leave."""
    needed = kernels.patch_embed_shared_bytes()
    assert needed == 24 * 1024 and 2 * (needed + 1024) <= 100 * 1024 and needed <= 48 * 1024


# What is changed in patch_embed.cuh, and how it must show: the trap's words, or "" for a wrong result.
BARRIER = "block_barrier();  // the weight of this step is there, and nobody reads that of the last any more"
FAULTS = {
    "no barrier": (BARRIER, "", "race|waited"),
    "no wait for the weight": ("copy_wait<kPatchEmbedStages - 2>();", "", "waited for"),
    "wait for a step too few": ("copy_wait<kPatchEmbedStages - 2>();", "copy_wait<kPatchEmbedStages - 1>();", "waited"),
    "ring of two stages": ("next % kPatchEmbedStages", "next % 2", "race|waited"),
    "wrong permutation": ("chunk ^ (row / 2 % 4)", "chunk ^ (row % 4)", "bank conflicts"),
    "permutation of reads only": ("to + stage_offset(row, chunk)", "to + 16 * (4 * row + chunk)", ""),
    "pixels of a row too many": ("row < p.rows && patch >= 0", "patch >= 0", "out of bounds"),
    "pixels of prefix rows": ("row < p.rows && patch >= 0", "row < p.rows", "out of bounds"),
    "rows stored beyond the last": ("if (row >= p.rows) continue;", "", "out of bounds"),
    "a column too many": ("if (column >= p.width) continue;", "if (column > p.width) continue;", "out of bounds"),
    "weights of a column too many": ("column < p.width && k <", "column <= p.width && k <", "out of bounds"),
    "pixel not centred": ("- 8388736.0f", "- 8388608.0f", ""),
    "rows of the product exchanged": ("2 * (c % 2) + i % 2] =", "2 * (c % 2) + 1 - i % 2] =", ""),
    "halves of a word exchanged": ("high ? word >> 16 : word", "high ? word : word >> 16", ""),
    "position of the next patch": ("static_cast<int64_t>(patch) * p.width", "(patch + 1LL) * p.width", "out of bounds"),
}  # fmt: skip


@pytest.mark.full  # each takes a compilation
@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_show(fault, tmp_path):
    old, new, trap = FAULTS[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / "patch_embed.cuh"
    text = source.read_text()
    assert text.count(old) == 1, f"patch_embed.cuh no longer contains {old!r} once"
    source.write_text(text.replace(old, new))
    kernels = compiled(tmp_path, [(UINT8, 16, 48)], tmp_path / "csrc")
    images, *rest = inputs(GRID[0], UINT8, True)
    args, kwargs = (guarded(images), *rest), {"patch_size": (16, 16), "channels_last": True}
    if not trap:
        with pytest.raises(AssertionError, match=r"error|other places"):
            check(kernels, *args, **kwargs)
    elif trap == "bank conflicts":
        assert run(kernels, *args, **kwargs)[1] > 0
    else:
        with pytest.raises(RuntimeError, match=trap):
            run(kernels, *args, **kwargs)


@needs_nvcc
@pytest.mark.full
@pytest.mark.parametrize("archs", [("80",), ("90", "100")], ids=str)
def test_registers_do_not_spill(archs, tmp_path):
    """ptxas' report: no spills, and two blocks on an SM."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = ["nvcc", "-std=c++17", *targets, "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-c", str(ROOT / "csrc" / "cuda" / "patch_embed.cu"), "-o", str(tmp_path / "patch_embed.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", result.stderr)]
    assert len(spills) == len(registers) == len(INSTANCES) * len(archs)
    assert set(spills) == {("0", "0", "0")}
    assert max(registers) <= 65536 // (2 * 128)
