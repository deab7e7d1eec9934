"""Drop-in attention: torch's semantics in `sdpa`, flash-attn's signatures in `flash_attn`."""

from vitfast.attention.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from vitfast.attention.sdpa import Route, attention_backend, explain, scaled_dot_product_attention

__all__ = [
    "Route",
    "attention_backend",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "scaled_dot_product_attention",
]
