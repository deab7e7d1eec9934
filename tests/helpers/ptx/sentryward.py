"""A compile case as SentryWard takes it, which proves kernels without wgmma free of races: its PTX and its launch.

`python -m helpers.ptx.sentryward ARCH FILE CASE FOLDER` executes the case and writes kernel.ptx and input.json for one
block of it, the first.
"""

import json
import re
import sys
from pathlib import Path

from helpers.ptx import cases

from vitfast import testing


def main(arch: int, file: str, config: str, folder: Path) -> None:
    case = next(case for case in cases.cases_of(file, arch) if case.config.startswith(config))
    with testing.poisoned_allocations():
        device = cases.run(case, arch)
    launch = next(launch for launch in device.launches if launch.kernel == case.fn.__name__)
    program = device.program(launch.hash)
    text = "\n".join(program.kernel.text)
    # Pointers are left out: .ptr stands between their type and name.
    types = {name: kind for kind, name in re.findall(r"\.param \.(\w+) (\w+)", text)}
    arguments = [
        {"parameter": name, "type": types[name], "value": int.from_bytes(launch.parameters[at : at + size], "little")}
        for name, (at, size) in program.kernel.parameters.items()
        if name in types
    ]
    block = [program.kernel.threads, 1, 1]
    launched = {"grid_dim": [1, 1, 1], "block_dim": block, "dynamic_shared_bytes": program.shared_bytes}
    given = {"schema": "spverify.kernel-input/v1", "launch": launched, "arguments": arguments}
    (folder / "kernel.ptx").write_text(text + "\n")
    (folder / "input.json").write_text(json.dumps(given))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
