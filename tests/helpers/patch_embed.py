"""Cases of patch_embed for the C++ extension, and its two calls for packed weights as one."""

import torch

from vitfast import ops, testing

GRID = [
    (2, 3, 32, 48, (16, 16), 64, 1, "/16, two rows of three patches, CLS"),
    (3, 3, 28, 28, (14, 14), 48, 5, "/14, CLS and registers"),
    (1, 3, 7, 7, (7, 7), 5, 0, "one patch, odd sizes, no prefix"),
    (5, 1, 12, 20, (4, 5), 33, 2, "one channel, oblong patch"),
    (1, 4, 3, 3, (1, 1), 7, 1, "patches of one pixel"),
    (2, 3, 32, 64, (32, 32), 165, 1, "/32, whose rows crowd a cache; more columns than meet an epilogue at once"),
    (2, 3, 224, 224, (8, 8), 16, 1, "more rows than one chunk"),
]
"""Batch, channels, height, width, patch (h, w), C, prefix tokens; and why."""


def inputs(case, dtype, pixels, channels_last):
    """Images, weight, bias, position and prefix (None where there is none) of a case, on the CPU.

    Args:
        case: of GRID. dtype: of the weights. pixels: dtype of the images.
    """
    b, channels, height, width, (ph, pw), c, prefix, _ = case
    shape = (b, height, width, channels) if channels_last else (b, channels, height, width)
    if pixels == torch.uint8:
        images = testing.make(*shape, scale=60).add_(128).clamp_(0, 255).to(torch.uint8)
    else:
        images = testing.make(*shape, dtype=pixels)
    images = images.cpu()
    k, patches = channels * ph * pw, (height // ph) * (width // pw)
    tensors = [
        testing.make(c, k, dtype=dtype, scale=k**-0.5),
        testing.make(c, dtype=dtype),
        testing.make(patches, c, dtype=dtype),
        testing.make(prefix, c, dtype=dtype) if prefix else None,
    ]
    return images, *(None if t is None else t.cpu() for t in tensors)


def packed(images, weight, *rest, **kwargs):
    """patch_embed on a weight that is packed first."""
    ready = ops.native.pack_patch_embed(weight, **kwargs, uint8=images.dtype == torch.uint8)
    return ops.native.patch_embed_packed(images, ready, *rest, **kwargs)
