"""Why the C++ extension's CUDA kernels cannot run here."""

import importlib
import importlib.util

import torch

from vitfast.ops import registry

FP16, BF16 = DTYPES = (torch.float16, torch.bfloat16)


def why_not():
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    if importlib.util.find_spec("vitfast._C") is None:
        return "vitfast._C is not built"
    state = importlib.import_module("vitfast._C").build_info()["cuda"]
    return f"vitfast._C has no CUDA kernels: {state}" if state.startswith("not built") else ""


def why_no_linear():
    if why_not():
        return why_not()
    entry, capability = registry.backend("linear", "native"), torch.cuda.get_device_capability()
    return "; ".join(entry.why_not(registry.Spec("linear", "cuda", BF16, capability)))
