"""Launches on a GPU that is not there, as a program: `python -m helpers.launched [--op OP]...`.

Prints JSON: rows (of the warm-up step), launches (case -> kernels), specialisations (kernel -> CPU seconds to compile).
`--fault KERNEL=WHAT` plants one of `standin.FAULTS`; `--shared BYTES` is the shared memory that the chip has.
A process of its own, without TRITON_INTERPRET: Triton asks for it when kernels are defined.
"""

import argparse
import json

import torch
from helpers import standin

from vitfast.benchmarks import kernels, smoke
from vitfast.benchmarks.device import open_device

GPU = torch.device("cuda", 0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--shared", type=int, default=standin.SHARED_MEMORY)
    parser.add_argument("--model", default="vit_base_patch16_224")
    arguments = parser.parse_args()
    rows, launches = [], {}
    driver = standin.start(faults=dict(fault.split("=") for fault in arguments.fault), shared=arguments.shared)

    def keep(made):
        rows.extend(made)
        launches[made[0]["case"]] = list(driver.launches)
        driver.launches.clear()

    grid = kernels.grid("quick", arguments.op, [arguments.model], [256], GPU, torch.bfloat16)
    device = open_device(GPU)
    smoke.smoke(smoke.launches(grid, "triton", device), device, compare=False, on_rows=keep)
    found = {name: list(forms.values()) for name, forms in driver.specialisations.items()}
    print(json.dumps({"rows": rows, "launches": launches, "specialisations": found}))


if __name__ == "__main__":
    main()
