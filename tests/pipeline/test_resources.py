"""What there is for a process, from a system's files that a test has written, and the refusal of what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import require_complete

from hqdit.errors import ResourceError
from hqdit.pipeline.resources import (
    CLEARLY,
    Available,
    Estimate,
    available,
    available_memory,
    describe,
    require_resources,
)

GIB = 2**30


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {32 * 2**20} kB\nMemAvailable:   {16 * 2**20} kB\nSwapFree: 999 kB\n"}
INNER = "sys/fs/cgroup/user/job"
TOP = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "gibibytes"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/user/job\n", f"{INNER}/memory.max": "max\n", f"{INNER}/memory.current": "5\n"}, 16),
        # What is used counts, but for pages of files that are not in use.
        (
            {
                "proc/self/cgroup": "0::/user/job\n",
                f"{INNER}/memory.max": f"{4 * GIB}\n",
                f"{INNER}/memory.current": f"{3 * GIB}\n",
                f"{INNER}/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file 9\n",
            },
            2,
        ),
        # The least of all groups around it.
        (
            {
                "proc/self/cgroup": "0::/user/job\n",
                f"{INNER}/memory.max": f"{4 * GIB}\n",
                f"{INNER}/memory.current": "0\n",
                "sys/fs/cgroup/user/memory.max": f"{3 * GIB}\n",
                "sys/fs/cgroup/user/memory.current": f"{2 * GIB}\n",
            },
            1,
        ),
        # In a container, where only its own group is seen.
        (
            {
                "proc/self/cgroup": "0::/elsewhere\n",
                "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory.current": "0\n",
            },
            2,
        ),
        # Version 1.
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/\n3:freezer:/x\n",
                f"{TOP}/memory.limit_in_bytes": f"{6 * GIB}\n",
                f"{TOP}/memory.usage_in_bytes": f"{2 * GIB}\n",
                f"{TOP}/memory.stat": f"total_inactive_file {GIB}\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                f"{TOP}/memory.limit_in_bytes": f"{2**63 - 4096}\n",
                f"{TOP}/memory.usage_in_bytes": "0\n",
            },
            16,
        ),
        (
            {
                "proc/self/cgroup": "0::/user/job\n",
                f"{INNER}/memory.max": f"{GIB}\n",
                f"{INNER}/memory.current": f"{2 * GIB}\n",
            },
            0,
        ),
    ],
    ids=[
        "machine",
        "no limit",
        "group",
        "outer group",
        "container",
        "version 1",
        "version 1 without limit",
        "none left",
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], gibibytes: int) -> None:
    assert available_memory(system(tmp_path, {**MEMINFO, **files})) == gibibytes * GIB


def test_limits_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    root = system(tmp_path, {**MEMINFO, "proc/self/status": f"VmSize: {2**20} kB\nVmData:\t{2**19} kB\n"})
    limits = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (limits[limit], resource.RLIM_INFINITY))
    assert available_memory(root) == 16 * GIB
    limits[resource.RLIMIT_AS] = 4 * GIB
    assert available_memory(root) == 3 * GIB
    limits[resource.RLIMIT_DATA] = 2 * GIB
    assert available_memory(root) == 1.5 * GIB


def test_a_system_that_tells_nothing_else(tmp_path: Path) -> None:
    found = available_memory(tmp_path)
    assert found is not None and found > 0  # the number of free pages


def test_here(tmp_path: Path) -> None:
    there = available(tmp_path / "not" / "there" / "yet")
    assert there.memory_bytes is not None and there.memory_bytes > 0
    assert there.disk_bytes is not None and there.disk_bytes > 0


def test_what_clearly_does_not_fit(tmp_path: Path) -> None:
    there = Available(4 * GIB, 8 * GIB)
    fits = Estimate(int(CLEARLY * 4 * GIB), 99 * GIB, int(CLEARLY * 8 * GIB))
    require_resources(fits, there, "free some", tmp_path)  # pages of mapped files need not fit
    for estimate, parts in (
        (Estimate(fits.memory_bytes and fits.memory_bytes + 1, 0, 0), ("memory: found 4.3 GB", "about 5.4 GB")),
        (Estimate(0, 0, fits.disk_bytes + 1), (f"disk of {tmp_path}: found 8.6 GB", "about 10.7 GB")),
    ):
        with pytest.raises(ResourceError) as info:
            require_resources(estimate, there, "free some", tmp_path)
        assert info.value.exit_code == 5
        require_complete(info.value, *parts, "free some")
    unknown = Available(None, None)
    require_resources(Estimate(10**18, 0, 10**18), unknown, "", tmp_path)
    require_resources(Estimate(None, 0, 0), there, "", tmp_path)


def test_the_line_for_people() -> None:
    assert describe(Estimate(2 * 10**9, 3 * 10**9, 5_000_000), Available(10**10, None)) == (
        "estimate: about 2.0 GB of memory (10.0 GB available) and 3.0 GB of mapped files, about 5.0 MB of disk "
        "(an unknown amount free)"
    )
    assert (
        describe(Estimate(None, 0, 1_000_000), Available(1, 2 * 10**9))
        == "estimate: about 1.0 MB of disk (2.0 GB free)"
    )
