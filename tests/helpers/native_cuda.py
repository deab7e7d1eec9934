"""Whether the C++ extension's CUDA kernels can run here."""

import importlib
import importlib.util

import torch

from vitfast.ops import registry

FP16, BF16 = DTYPES = (torch.float16, torch.bfloat16)


def why_not() -> str:
    """Why none of them can, "" if they can."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    if importlib.util.find_spec("vitfast._C") is None:
        return "vitfast._C is not built"
    state = importlib.import_module("vitfast._C").build_info()["cuda"]
    return f"vitfast._C has no CUDA kernels: {state}" if state.startswith("not built") else ""


def why_no_linear() -> str:
    """The same of `linear`, which runs on Hopper alone."""
    if reason := why_not():
        return reason
    entry, capability = registry.backend("linear", "native"), torch.cuda.get_device_capability()
    return "; ".join(entry.why_not(registry.Spec("linear", "cuda", BF16, capability)))
