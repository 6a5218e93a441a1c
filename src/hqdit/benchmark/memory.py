"""Peak memory of loading a transformer and running it once, in a process of its own.

`python -m hqdit.benchmark.memory FOLDER INPUTS THREADS` prints one JSON object. Linux only: the peak is the kernel's
own count of resident pages (VmHWM), reset after the imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure_here(folder: Path, inputs: Path, threads: int) -> dict[str, int]:
    """Bytes resident after the imports, at the peak, and their difference; for a fresh process."""
    from hqdit.kernels.selection import current_backend
    from hqdit.pipeline.checkpoint import load

    torch.set_num_threads(threads)
    current_backend()
    import hqdit.models.dit  # noqa: F401  # an import, not part of loading

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _status("VmRSS")
    model: Any = load(folder)
    given = load_file(inputs)
    with torch.inference_mode():
        model(given["latents"], timestep=given["timesteps"], class_labels=given["class_labels"])
    peak = _status("VmHWM")
    return {"after_imports_bytes": before, "peak_bytes": peak, "above_imports_bytes": peak - before}


def measure_memory(folder: Path, inputs: Path, threads: int) -> dict[str, int]:
    """`measure_here` in a new process."""
    command = [sys.executable, "-m", "hqdit.benchmark.memory", str(folder), str(inputs), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    print(json.dumps(measure_here(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
