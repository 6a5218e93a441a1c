"""What is needed to repeat a run: versions, machine, threads."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import hqdit


def cpu_name() -> str:
    """The processor's model name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def source_commit() -> str | None:
    """Commit of the checkout that this package runs from, or None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():  # installed, perhaps inside somebody else's checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


@cache
def code_digest() -> str:
    """SHA-256 over every file of the package: sources, bundled models and classifiers, compiled kernels.

    A result of other code, another model or other kernels is not taken for one of these.
    """
    digest = hashlib.sha256()
    for root in sorted(map(Path, hqdit.__path__)):
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic a result depends on."""
    return {name: version(name) for name in ("torch", "diffusers", "numpy")}


def describe_environment() -> dict[str, Any]:
    """Versions of the libraries that compute, processor, accelerator and threads."""
    return {
        "hqdit": hqdit.__version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "processor": cpu_name(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
