"""The C++ extension's CUDA patch_embed on a GPU. Without one, see test_emulated_patch_embed.py."""

import pytest
import torch
from helpers.native_cuda import why_not
from helpers.patch_embed import GRID, inputs

from vitfast.ops import reference, registry
from vitfast.testing import check_op, guarded, strided

BF16, UINT8 = torch.bfloat16, torch.uint8
WIDE = (64, 3, 224, 224, (16, 16), 768, 1, "ViT-B/16")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]


def native(*args, **kwargs):
    return registry.backend("patch_embed", "native").call(*args, **kwargs)


def on_gpu(case, pixels, channels_last):
    return [None if t is None else t.cuda() for t in inputs(case, BF16, pixels, channels_last)]


@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("pixels", [UINT8, BF16], ids=str)
@pytest.mark.parametrize("case", [*(c for c in GRID if c[5] % 2 == 0), WIDE], ids=lambda case: case[-1])
def test_sizes(case, pixels, channels_last):
    args = [None if t is None else guarded(t) for t in on_gpu(case, pixels, channels_last)]
    check_op(native, reference.patch_embed, *args, patch_size=case[4], channels_last=channels_last)


@pytest.mark.device
def test_strides_and_empty_batch():
    kwargs = {"patch_size": (16, 16), "channels_last": True}
    images, weight, *rest = on_gpu(GRID[0], UINT8, True)
    shifted = images.new_zeros(images.numel() + 1)[1:].view(images.shape).copy_(images)
    for view in (strided(images), images.transpose(1, 3).contiguous().transpose(1, 3), shifted):
        check_op(native, reference.patch_embed, view, strided(weight), *rest, **kwargs)
    assert native(images[:0], weight, *rest, **kwargs).shape == (0, 7, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, weight: (images.float(), weight), "images has dtype torch.float32, allowed: torch.uint8"),
        (lambda images, weight: (images, weight.half()), "weight has dtype torch.float16, allowed: torch.bfloat16"),
        (lambda images, weight: (images, weight[1:]), "an even number of weight rows, got 63"),
        (lambda images, weight: (images, weight.cpu()), "weight must be on cuda:0 like images, got cpu"),
        (lambda images, weight: (images[:, :31], weight), "image size 31x48 is not a positive multiple"),
    ],
)
def test_rejects(change, message):
    images, weight, *_ = on_gpu(GRID[0], UINT8, True)
    with pytest.raises(ValueError, match=message):
        native(*change(images, weight), patch_size=(16, 16), channels_last=True)


def test_never_the_unmeasured_default():
    images, weight, *_ = on_gpu(GRID[0], UINT8, True)
    able, _ = registry.candidates(registry.Spec.of("patch_embed", images, weight.dtype, width=64, patch=768))
    assert [entry.name for entry in able].index("torch") < [entry.name for entry in able].index("native")
