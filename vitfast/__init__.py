"""vitfast: Vision Transformer inference on fused kernels."""

__version__ = "0.1.0"
