"""Images as a model wants them: read, resize, crop and normalise exactly as its own processor does.

Which processor is "its own"? Two families, and each has more than one implementation:

* transformers has a PIL processor (`ViTImageProcessorPil`, ...) and a torchvision one (the "fast"
  one, its default where torchvision is installed). `Preprocess.from_transformers` gives the PIL
  processor's uint8 pixels bit for bit. The torchvision one differs from it by at most 1/255 in fewer
  than 1 % of the pixels of a photo, with two exceptions: Pillow 13 resizes tall images vertically
  first (`vitfast.images.pillow_resize.vertical_first`), which moves about a fifth of their pixels by 1/255 and a
  few by up to 6/255; and an image smaller than the crop by an odd number of pixels lies one pixel
  further left or up. DINOv3 has only the torchvision processor, which moreover resizes in floating
  point; its filter being bilinear, the bound is 1/255 for every image.
* timm's `create_transform` works on PIL images; `Preprocess.from_timm` gives its pixels bit for bit.

Sizes are (height, width) in pixels everywhere, uint8 images are [H, W, 3] in RGB order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitfast.images.pillow_resize import Resample, resize, resize_bytes, resize_window, suits_native

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
"""Pillow's resampling filters. All but nearest are antialiased: the filter widens when shrinking."""

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)

# What each transformers processor assumes where preprocessor_config.json is silent. `square`: an
# integer size means (size, size), otherwise the shortest side. `resample`: Pillow's numbers.
_CLIP_DEFAULTS = {"size": 224, "crop_size": 224, "do_center_crop": True, "square": False, "resample": 3,
                  "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD}  # fmt: skip
_SQUARE_DEFAULTS = {"size": 224, "crop_size": 224, "do_center_crop": False, "square": True, "resample": 3,
                    "image_mean": _HALF, "image_std": _HALF}  # fmt: skip
_PROCESSOR_DEFAULTS: dict[str, dict[str, Any]] = {
    "Beit": _SQUARE_DEFAULTS,
    "Bit": _CLIP_DEFAULTS,
    "CLIP": _CLIP_DEFAULTS,
    "DeiT": {**_SQUARE_DEFAULTS, "size": 256, "do_center_crop": True},
    "DINOv3ViT": {**_SQUARE_DEFAULTS, "resample": 2, "image_mean": _IMAGENET_MEAN, "image_std": _IMAGENET_STD},
    "Siglip": {**_SQUARE_DEFAULTS, "size": {"height": 224, "width": 224}, "square": False},
    "ViT": {**_SQUARE_DEFAULTS, "resample": 2},
}
_PROCESSOR_SUFFIXES = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")
_REFUSED_KEYS = ("do_pad", "do_flip_channel_order", "do_grayscale", "do_split_image", "do_thumbnail",
                 "rescale_offset", "use_square_size", "max_num_patches", "crop_pct", "size_divisor")  # fmt: skip


@dataclass(frozen=True)
class Preprocess:
    """What happens to an image before the model sees it. Sizes are (height, width) in pixels.

    Raises:
        ValueError: if a field is out of its domain; the message names field, value and domain.
    """

    size: tuple[int, int]
    """What the model gets."""
    resize: int | tuple[int, int] | None
    """An int is the new length of the shortest side (the other: int(length * long / short)); a tuple
    is the exact new size, or with `cover` the size to cover; None leaves the image as it is."""
    interpolation: str = "bicubic"
    center_crop: bool = True
    """Cut `size` out of the middle; a smaller image is padded with black."""
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF
    """Per channel, of pixels scaled to 0..1: the model sees (pixel / 255 - mean) / std."""
    rounding: str = "floor"
    """Which way the crop goes when the margins cannot be equal. "floor" is transformers: crop offset
    floor(margin / 2), padding before the image ceil(pad / 2). "even" is torchvision and timm: offset
    round(margin / 2) to the even neighbour, padding before floor(pad / 2)."""
    cover: bool = False
    """With a tuple `resize`: keep the aspect ratio and cover that size (timm, inputs not square)."""
    draft: bool = False
    """Decode JPEG files that shrink much at a part of their size (`vitfast.images.decode.ImageFile.prepare_for`): in
    less time, and not to the bits of the model's own processor."""

    def __post_init__(self) -> None:
        resize = self.size if self.resize is None else self.resize
        for field, pair in (("size", self.size), ("resize", (resize, resize) if type(resize) is int else resize)):
            if not isinstance(pair, tuple) or len(pair) != 2 or any(type(side) is not int or side < 1 for side in pair):
                raise ValueError(f"Preprocess.{field} must be positive whole pixels, got {getattr(self, field)!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"Preprocess.interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}")
        if self.rounding not in ("floor", "even"):
            raise ValueError(f"Preprocess.rounding must be 'floor' or 'even', got {self.rounding!r}")
        if self.cover and not isinstance(self.resize, tuple):
            raise ValueError(f"Preprocess.cover needs a (height, width) resize, got {self.resize!r}")
        if type(self.draft) is not bool:
            raise ValueError(f"Preprocess.draft must be True or False, got {self.draft!r}")
        if not self.mean or len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"Preprocess needs as many positive std as mean, got mean={self.mean} std={self.std}")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Size after the resize step of an image of (height, width), before any crop."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, int):  # the same arithmetic in transformers and torchvision: truncated
            if width <= height:
                return int(self.resize * height / width), self.resize
            return self.resize, int(self.resize * width / height)
        if self.cover:
            ratio = min(height / self.resize[0], width / self.resize[1])
            return round(height / ratio), round(width / ratio)
        return self.resize

    @classmethod
    def from_transformers(
        cls,
        config: Mapping[str, Any],
        image_size: int | tuple[int, int] | None = None,
        processor: str | None = None,
    ) -> Preprocess:
        """From the contents of a preprocessor_config.json.

        Args:
            config: the parsed file. Keys that are missing or null take the default of the processor it names.
            image_size: the model's native size, used only where the file leaves the size open
                (do_resize and do_center_crop both off).
            processor: the processor's class name, for old files that name none.

        Raises:
            ValueError: for a processor that is not known, a size that is not fixed, or a setting
                (padding, channel flips, ...) that Preprocess cannot express.
        """
        config = config.get("image_processor") or config  # a processor_config.json holds it one level down
        named = config.get("image_processor_type") or config.get("feature_extractor_type") or processor
        family = str(named)
        for suffix in _PROCESSOR_SUFFIXES:
            family = family.removesuffix(suffix)
        if family not in _PROCESSOR_DEFAULTS:
            known = ", ".join(f"{name}ImageProcessor" for name in _PROCESSOR_DEFAULTS)
            raise ValueError(f"image processor {named!r} is not known; known are {known}")
        for key in _REFUSED_KEYS:
            if config.get(key):
                raise ValueError(f"{named}: {key}={config[key]!r} is not supported")

        given = {key: value for key, value in config.items() if value is not None}
        steps = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        settings: dict[str, Any] = {**steps, **_PROCESSOR_DEFAULTS[family], **given}

        resize = _read_size(settings["size"], settings["square"], "size") if settings["do_resize"] else None
        size: int | tuple[int, int] | None
        if settings["do_center_crop"]:
            size = _read_size(settings["crop_size"], True, "crop_size")
        elif settings["do_resize"]:
            size = resize
        else:
            size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if not isinstance(size, tuple):
            raise ValueError(f"{named}: size={settings['size']!r} without center crop gives no fixed size")

        names = {Image.Resampling[name.upper()].value: name for name in INTERPOLATIONS}
        if settings["resample"] not in names:
            raise ValueError(f"{named}: resample={settings['resample']!r} must be one of {sorted(names)}")
        factor = float(settings["rescale_factor"]) if settings["do_rescale"] else 1.0
        if not 0 < factor < math.inf:
            raise ValueError(f"{named}: rescale_factor must be positive, got {factor}")
        # The processor computes (pixel * factor - mean) / std; here pixels are always divided by 255.
        scale = 1.0 if math.isclose(factor, 1 / 255, rel_tol=1e-6) else 1 / (255 * factor)
        mean, std = settings["image_mean"], settings["image_std"]
        if not settings["do_normalize"]:
            mean, std = 0.0, 1.0
        return cls(
            size=size,
            resize=resize,
            interpolation=names[settings["resample"]],
            center_crop=bool(settings["do_center_crop"]),
            mean=tuple(scale * value for value in ([mean] * 3 if isinstance(mean, (int, float)) else mean)),
            std=tuple(scale * value for value in ([std] * 3 if isinstance(std, (int, float)) else std)),
        )

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> Preprocess:
        """From a timm data configuration (`timm.data.resolve_model_data_config`, or a `pretrained_cfg`).

        Reads input_size (C, H, W), interpolation, crop_pct, crop_mode, mean and std; what is missing
        takes timm's default. crop_mode "center" and "squash" are known.

        Raises:
            ValueError: for another crop_mode ("border"), or an interpolation that is not one filter ("random").
        """
        height, width = tuple(config.get("input_size") or (3, 224, 224))[1:]
        fraction = config.get("crop_pct") or 0.875
        scaled = math.floor(height / fraction), math.floor(width / fraction)
        mode = config.get("crop_mode") or "center"
        if mode not in ("center", "squash"):
            raise ValueError(f"timm crop_mode must be 'center' or 'squash', got {mode!r}")
        shortest = mode == "center" and scaled[0] == scaled[1]
        return cls(
            size=(height, width),
            resize=scaled[0] if shortest else scaled,
            interpolation=config.get("interpolation") or "bicubic",
            mean=tuple(config.get("mean") or _IMAGENET_MEAN),
            std=tuple(config.get("std") or _IMAGENET_STD),
            rounding="even",
            cover=mode == "center" and not shortest,
        )


def _read_size(value: Any, square: bool, name: str) -> int | tuple[int, int]:
    """A transformers size (int, pair or dict) as Preprocess.resize understands it."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return int(value[0]), int(value[1])
    if isinstance(value, Mapping):
        keys = {key for key, side in value.items() if side is not None}
        if keys == {"height", "width"}:
            return int(value["height"]), int(value["width"])
        if keys == {"shortest_edge"}:
            return int(value["shortest_edge"])
    raise ValueError(f"{name} must hold height and width, or shortest_edge alone, got {value!r}")


def _crop_window(preprocess: Preprocess, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Per axis: (padding before the image, offset of the crop in the padded image)."""
    windows = []
    for have, want in zip((height, width), preprocess.size, strict=True):
        missing, margin = max(want - have, 0), max(have - want, 0)
        if preprocess.rounding == "floor":
            windows.append(((missing + 1) // 2, margin // 2))
        else:
            windows.append((missing // 2, round(margin / 2)))
    return windows[0], windows[1]


def _resized_size(preprocess: Preprocess, height: int, width: int) -> tuple[int, int]:
    """Size after resizing, refused where it is absurdly large or cannot become preprocess.size."""
    rows, columns = preprocess.resized(height, width)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and rows * columns > limit:
        raise ValueError(
            f"{height}x{width} pixels would be resized to {rows}x{columns}, over the limit of {limit} pixels"
        )
    if not preprocess.center_crop and (rows, columns) != preprocess.size:
        want = "x".join(map(str, preprocess.size))
        raise ValueError(f"image is {rows}x{columns} after resizing, the model needs {want} and does not crop")
    return rows, columns


def memory(preprocess: Preprocess, height: int, width: int) -> int:
    """Bytes that `resize_and_crop` takes at most for an image of this size, estimated before anything is done."""
    rows, columns = preprocess.resized(height, width)
    return resize_bytes((height, width), (rows, columns), preprocess.interpolation) + 8 * rows * columns


def resize_and_crop(image: np.ndarray | Image.Image, preprocess: Preprocess) -> np.ndarray:
    """One image to the model's size, bit for bit as the processor `preprocess` was made from.

    Args:
        image: uint8 [H, W, 3], or a Pillow image in RGB.
        preprocess: sizes and filter; mean and std play no part here.

    Returns:
        uint8 [h, w, 3] with (h, w) = preprocess.size.

    Raises:
        ValueError: if the image is not uint8 [H, W, 3], has no pixels, would exceed Pillow's pixel
            limit when resized (a very long, very thin image), or ends up with another size.
    """
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"a Pillow image must be in RGB, got {image.mode}")
        shape = image.height, image.width
    else:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"image must be uint8 [H, W, 3] with pixels, got {image.dtype} {list(image.shape)}")
        shape = image.shape[0], image.shape[1]
    height, width = _resized_size(preprocess, *shape)
    (pad_y, top), (pad_x, left) = _crop_window(preprocess, height, width)
    rows, columns = preprocess.size
    window = (top, min(top + rows, height)), (left, min(left + columns, width))
    if (height, width) != shape and suits_native(shape, (height, width), preprocess.interpolation):
        part = resize_window(image, (height, width), preprocess.interpolation, window)
    else:
        if (height, width) != shape:
            picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
            image = picture.resize((width, height), Image.Resampling[preprocess.interpolation.upper()])
        pixels = np.array(image) if isinstance(image, Image.Image) else image
        if (height, width) == preprocess.size:
            return pixels
        part = pixels[slice(*window[0]), slice(*window[1])]
    canvas = np.zeros((rows, columns, 3), np.uint8)
    canvas[pad_y : pad_y + part.shape[0], pad_x : pad_x + part.shape[1]] = part
    return canvas


def preprocess_batch(images: Tensor, preprocess: Preprocess, *, resample: Resample | None = None) -> Tensor:
    """Images of one size, resized and cropped to the model's size.

    On the CPU each image goes through Pillow; elsewhere `vitfast.images.pillow_resize` computes the same pixels
    in integer arithmetic on the device. Either way the result is that of `resize_and_crop`, exactly.

    Args:
        images: uint8 [B, H, W, 3].
        preprocess: sizes and filter; mean and std play no part here.
        resample: `vitfast.ops.resample` or one of its backends, which resizes what is not on the CPU.

    Returns:
        uint8 [B, h, w, 3] on the same device; `images` itself where nothing is to be done.

    Raises:
        ValueError: as `resize_and_crop`; for images on a device without `resample`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images must be uint8 [B, H, W, 3] with pixels, got {images.dtype} {list(images.shape)}")
    size = (images.shape[1], images.shape[2])
    if size == preprocess.size == _resized_size(preprocess, *size):
        return images
    if len(images) == 0:
        return images.new_empty(0, *preprocess.size, 3)
    if images.device.type == "cpu":
        return torch.stack([torch.from_numpy(resize_and_crop(i, preprocess)) for i in images.numpy()])
    if resample is None:
        raise ValueError(f"images on {images.device} need resample, as in resample=vitfast.ops.resample")
    return _resize_and_crop_tensor(images, preprocess, resample)


def _resize_and_crop_tensor(images: Tensor, preprocess: Preprocess, resample: Resample) -> Tensor:
    """`resize_and_crop` in torch, for uint8 [B, H, W, 3] on any device."""
    height, width = _resized_size(preprocess, *images.shape[1:3])
    images = resize(images, (height, width), preprocess.interpolation, resample)
    (pad_y, top), (pad_x, left) = _crop_window(preprocess, height, width)
    rows, columns = preprocess.size
    part = images[:, top : top + rows, left : left + columns]
    canvas = images.new_zeros(len(images), rows, columns, 3)
    canvas[:, pad_y : pad_y + part.shape[1], pad_x : pad_x + part.shape[2]] = part
    return canvas


def normalize(images: Tensor, preprocess: Preprocess, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, h, w, C] -> (pixel / 255 - mean) / std as [B, C, h, w], computed in float32.

    Raises:
        ValueError: if the images are not uint8 [B, h, w, C] with one channel per mean.
    """
    channels = len(preprocess.mean)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != channels:
        raise ValueError(f"images must be uint8 [B, h, w, {channels}], got {images.dtype} {list(images.shape)}")
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return images.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std).contiguous().to(dtype)
