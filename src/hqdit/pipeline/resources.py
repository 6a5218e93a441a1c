"""How much memory and disk there is for this process, and the refusal of work that clearly needs more."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hqdit.errors import ResourceError

#: Work is refused whose estimate is this many times what there is: estimates are not exact (docs/jobs.md says how
#: good they are), and a run that would have fitted is worse to refuse than one that stops and can be resumed.
CLEARLY = 1.25

#: A limit of a version 1 control group that nobody has set is a number near 2^63.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Estimate:
    """What a piece of work will probably need.

    Attributes:
        memory_bytes: memory of its own at the peak, beyond what the process has when it begins; None where that is not
            known, as on a GPU.
        mapped_bytes: pages of mapped files at the peak, which are resident but which the system can take back.
        disk_bytes: on the output's file system at the peak, the output included.
    """

    memory_bytes: int | None
    mapped_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Available:
    """What there is; None for what the system does not tell.

    Attributes:
        memory_bytes: that this process can still take.
        disk_bytes: free where the output goes.
    """

    memory_bytes: int | None
    disk_bytes: int | None


def available(place: Path) -> Available:
    """What there is for this process, and on the file system of `place`, a path that need not exist."""
    existing = next(path for path in (place, *place.parents) if path.is_dir())
    try:
        disk = shutil.disk_usage(existing).free
    except OSError:
        disk = None
    return Available(available_memory(), disk)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take: the least that the machine, its control groups and its limits leave.

    Swap space does not count. None where nothing is known.

    Args:
        root: where the system's folders `proc` and `sys` are.
    """
    found = [_of_machine(root), *_of_control_groups(root), *_of_limits(root)]
    known = [bytes_left for bytes_left in found if bytes_left is not None]
    return max(0, min(known)) if known else None


def _of_machine(root: Path) -> int | None:
    kilobytes = _lines(root / "proc" / "meminfo").get("MemAvailable")
    if kilobytes is not None:
        return kilobytes * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_control_groups(root: Path) -> list[int]:
    """What every group around this process leaves, version 2 and 1; cached pages can be taken back."""
    try:
        groups = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in groups:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, limit_name, used_name, cached = (
                root / "sys/fs/cgroup",
                "memory.max",
                "memory.current",
                "inactive_file",
            )
        elif "memory" in controllers.split(","):
            base, cached = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limit_name, used_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = Path(name.lstrip("/"))
        # In a container the files of its own group lie at the top, whatever the name says.
        for group in (inner, *inner.parents):
            limit, used = _number(base / group / limit_name), _number(base / group / used_name)
            if limit is not None and limit < _NO_LIMIT and used is not None:
                left.append(limit - used + _lines(base / group / "memory.stat").get(cached, 0))
    return left


def _of_limits(root: Path) -> list[int]:
    """What the limits on address space and data leave (`ulimit -v`, `ulimit -d`)."""
    try:
        import resource
    except ImportError:  # a system without such limits
        return []
    status = _lines(root / "proc" / "self" / "status")
    left = []
    for limit, key in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            left.append(soft - status.get(key, 0) * 1024)
    return left


def _number(path: Path) -> int | None:
    """A file that holds one number; None for one that is missing or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> dict[str, int]:
    """Name -> number for lines such as "MemAvailable: 123 kB" or "inactive_file 123"; empty without the file."""
    try:
        words = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def require_resources(estimate: Estimate, there: Available, fix: str, where: Path) -> None:
    """Refuse work that clearly does not fit.

    Args:
        estimate: of the work.
        there: what there is.
        fix: how to make it fit, and how to go on all the same; ends the message.
        where: the output.

    Raises:
        ResourceError: memory or disk of which the estimate is more than `CLEARLY` times what there is.
    """
    for what, needed, left in (
        ("memory", estimate.memory_bytes, there.memory_bytes),
        (f"disk of {where}", estimate.disk_bytes, there.disk_bytes),
    ):
        if needed is not None and left is not None and needed > CLEARLY * left:
            raise ResourceError(f"{what}: found {_size(left)}, needed about {_size(needed)}. Fix: {fix}")


def describe(estimate: Estimate, there: Available) -> str:
    """Both in a line for people."""
    parts = [f"about {_size(estimate.disk_bytes)} of disk ({_size(there.disk_bytes)} free)"]
    if estimate.memory_bytes is not None:
        mapped = f" and {_size(estimate.mapped_bytes)} of mapped files" if estimate.mapped_bytes else ""
        parts.insert(
            0, f"about {_size(estimate.memory_bytes)} of memory ({_size(there.memory_bytes)} available){mapped}"
        )
    return f"estimate: {', '.join(parts)}"


def _size(count: int | None) -> str:
    if count is None:
        return "an unknown amount"
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
