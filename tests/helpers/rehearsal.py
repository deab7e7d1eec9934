"""The campaign's launches on a GPU that is not there, as a program: `python -m helpers.rehearsal [--op OP]...`.

Prints JSON: rows (of the warm-up step), launches (case -> kernels), specialisations (kernel -> seconds to compile).
`--fault KERNEL` makes that kernel's launches fail; `--shared BYTES` is the shared memory that the chip has.
A process of its own, without TRITON_INTERPRET: Triton asks for it when kernels are defined.
"""

import argparse
import json

import torch
from helpers import standin

from vitfast.benchmarks import cases, kernels, smoke
from vitfast.benchmarks.device import CpuDevice

GPU = torch.device("cuda", 0)


class OutOfResources(Exception):
    """As Triton's: no RuntimeError."""


def backward():
    """The launches of attention's forward and backward: under fake tensors torch.ops would call none of them."""
    from vitfast.kernels import attention, attention_backward

    dims = {"batch": 256, "tokens": 197, "heads": 12, "head_dim": 64}
    q, k, v = cases.Case("attention", dims, GPU, torch.bfloat16).inputs().args
    out, stats = attention.attention_forward(q, k, v)
    attention_backward.attention_backward(torch.empty_like(out), q, k, v, out, stats)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--op", action="append")
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--shared", type=int, default=standin.SHARED_MEMORY)
    parser.add_argument("--model", default="vit_base_patch16_224")
    arguments = parser.parse_args()
    standin.SHARED_MEMORY = arguments.shared
    ops = arguments.op or list(cases.OPS)
    rows, launches = [], {}
    with standin.installed() as driver:
        driver.faults |= {name: OutOfResources("out of resource: shared memory") for name in arguments.fault}

        def keep(made):
            rows.extend(made)
            launches[made[0]["case"]] = list(driver.launches)
            driver.launches.clear()

        others = [op for op in ops if op != "attention_backward"]
        grid = kernels.grid("quick", others, [arguments.model], [256], GPU, torch.bfloat16) if others else []
        smoke.smoke(grid, "triton", CpuDevice(), compare=False, on_rows=keep)
        if "attention_backward" in ops:
            backward()
            launches["attention_backward"] = list(driver.launches)
    found = {name: list(forms.values()) for name, forms in driver.specialisations.items()}
    print(json.dumps({"rows": rows, "launches": launches, "specialisations": found}))


if __name__ == "__main__":
    main()
