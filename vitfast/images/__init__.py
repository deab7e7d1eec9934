"""Images: which files are some, what their pixels are, and what a model's own processor makes of them."""

from vitfast.images.decode import ImageError, open_image
from vitfast.images.files import InputError, collect, find_images, path_text
from vitfast.images.formats import FORMATS
from vitfast.images.preprocess import Preprocess, normalize, preprocess_batch, resize_and_crop

__all__ = [
    "FORMATS",
    "ImageError",
    "InputError",
    "Preprocess",
    "collect",
    "find_images",
    "normalize",
    "open_image",
    "path_text",
    "preprocess_batch",
    "resize_and_crop",
]
