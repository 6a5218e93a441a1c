"""The Triton kernels as a GPU gets them: they compile, fit, and fuse no product with a sum."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from compile_triton_kernels import CASES
from triton_cases import needs_triton

pytestmark = needs_triton

PROGRAM = Path(__file__).with_name("compile_triton_kernels.py")
#: Shared memory of a program, in bytes, by compute capability: A100, Ada, Hopper.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def check(cases: Sequence[str], capability: int, folder: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "HQDIT_TRITON_TILES": str(folder / "none")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(PROGRAM), str(capability), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        found = json.loads(line)
        assert found["shared"] <= SHARED[capability], case
        # The order of the float operations is that of the definition only if each of them rounds by itself.
        assert found["fused"] == 0, case


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    check(("product in groups", "full 1152"), 90, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    # Too long for one program on Ada: the torch backend's operations serve it there.
    check([case for case in CASES if (case, capability) != ("full 12288", 89)], capability, tmp_path)
