"""The compiled library as a part of the process: instruction sets, threads, forks, and what happens without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import INSTRUCTION_SETS, bits, needs_native, use_threads

from hqdit.cli.main import run
from hqdit.errors import EnvironmentUnavailable, UsageError
from hqdit.kernels import native_library, native_ops
from hqdit.kernels.selection import BACKENDS, default_backend, require_backend

#: What a fresh process needs to run a product whose result is known, on `threads` threads.
PRODUCT = """
import os
import numpy as np
import torch
from hqdit.kernels import native_library, native_ops

levels = (np.arange(300 * 576) % 251 - 125).astype(np.int8).reshape(300, 576)
packed = (np.arange(200 * 288) % 241).astype(np.uint8).reshape(200, 288)
table = np.arange(-64, 64, 8, dtype=np.int8).reshape(1, 16)
weight = table[0][np.stack([packed & 15, packed >> 4], axis=2).reshape(200, 576)]
expected = levels.astype(np.int32) @ weight.astype(np.int32).T
one = torch.ones(1, 1)
tensors = [torch.from_numpy(array) for array in (levels, packed, table)]

def is_right():  # without any work that torch would spread over threads, for which a forked child would wait
    levels, packed, table = tensors
    arguments = (levels, one, [packed], [table], [None], [one], [None], None, None, None, torch.float32)
    return np.array_equal(native_ops.product(*arguments)[0].numpy(), expected.astype(np.float32))

def in_child(body):  # exit code of a forked child that runs `body`
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = 0 if body() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def python(code: str, **environment: str) -> str:
    """Standard output of a program that must end well; torch starts with one thread."""
    plain = {name: value for name, value in os.environ.items() if name != native_library.ISA_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT + code], capture_output=True, text=True, timeout=120,
        env={**plain, "OMP_NUM_THREADS": "1", **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# Instruction sets


@needs_native
def test_instruction_sets_are_in_ascending_order() -> None:
    names = native_library.instruction_sets()
    assert names == ["portable", "avx2", "avx512_vnni", "amx"][: len(names)]
    assert native_library.current_instruction_set() in names
    assert BACKENDS["native"].description == f"native ({native_library.current_instruction_set()})"


@needs_native
def test_use_instruction_set_nests_and_ends_on_errors() -> None:
    before = native_library.current_instruction_set()
    with native_library.use_instruction_set("portable"):
        assert native_library.current_instruction_set() == "portable"
        with native_library.use_instruction_set(INSTRUCTION_SETS[-1]):
            assert native_library.current_instruction_set() == INSTRUCTION_SETS[-1]
        assert native_library.current_instruction_set() == "portable"
    with pytest.raises(RuntimeError, match="body"), native_library.use_instruction_set("portable"):
        raise RuntimeError("body")
    assert native_library.current_instruction_set() == before


@needs_native
@pytest.mark.parametrize("name", ["", "sse2", "AVX2", "avx512"])
def test_unknown_instruction_set_is_refused(name: str) -> None:
    before = native_library.current_instruction_set()
    with (
        pytest.raises(UsageError, match=f"{name!r}, needed one of portable.*Fix"),
        native_library.use_instruction_set(name),
    ):
        pytest.fail("entered")
    assert native_library.current_instruction_set() == before


@needs_native
def test_environment_variable_picks_the_instruction_set() -> None:
    # It is read when the library is loaded, so each name gets a process of its own, forked before that.
    code = """
for name in NAMES:
    def body():
        os.environ["HQDIT_CPU_ISA"] = name
        wanted = name or native_library.instruction_sets()[-1]
        return native_library.current_instruction_set() == wanted and is_right()
    print(name, in_child(body))
"""
    names = [*INSTRUCTION_SETS, ""]
    found = python(code.replace("NAMES", repr(names)))
    assert found.splitlines() == [f"{name} 0" for name in names]


@needs_native
def test_unusable_environment_variable_is_an_error_of_the_environment(tmp_path: Path) -> None:
    code = """
from hqdit.cli.main import run
from hqdit.kernels.selection import BACKENDS
print(BACKENDS["native"].unavailable_reason())
arguments = ["sample", "digits", "--num", "1", "--steps", "1", "--out", FOLDER]
print([run([*arguments, "--backend", "native"]), run(arguments), os.path.exists(FOLDER)])
"""
    found = python(code.replace("FOLDER", repr(str(tmp_path / "s"))), HQDIT_CPU_ISA="avx9")
    reason = f"HQDIT_CPU_ISA: found 'avx9', needed one of {', '.join(INSTRUCTION_SETS)} on this machine"
    assert found.splitlines() == [reason, "[6, 6, False]"]


# Threads


@needs_native
def test_threads_are_those_of_torch() -> None:
    code = """
def threads():
    return len(os.listdir("/proc/self/task"))

assert native_library.shares_threads_with_torch()
torch.set_num_threads(1)
assert is_right()
before = threads()
for _ in range(3):
    assert is_right()
assert threads() == before, "one thread was asked for"
torch.set_num_threads(3)
assert is_right()
started = threads() - before
assert started == 2, started
torch.randn(4_000_000).exp_()  # torch's own work finds the same threads
assert is_right()
assert threads() - before == 2, "two pools"
print("done")
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the system does not list a process's threads")
    if not native_library.shares_threads_with_torch():
        pytest.skip("torch's threads are not those of GNU OpenMP or of a compatible runtime")
    assert python(code) == "done\n"


@needs_native
def test_forked_child_computes_too() -> None:
    # A child has none of its parent's threads, and OpenMP would wait for them for ever.
    code = """
for threads in (1, 2):
    torch.set_num_threads(threads)
    assert is_right()
    print(in_child(is_right), in_child(lambda: in_child(is_right) == 0), is_right())
"""
    assert python(code) == "0 0 True\n" * 2


@needs_native
def test_threads_of_its_own_give_the_same_bits() -> None:
    # Where torch runs on another kind of runtime, each call starts and ends threads.
    arguments = [torch.randn(2, 65, 3, 36, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = native_ops.attention(*arguments)
    library = native_library.library()
    shared = native_library.shares_threads_with_torch()
    library.hqdit_set_gomp_parallel(None)
    try:
        assert not native_library.shares_threads_with_torch()
        for threads in (1, 2, 5):
            with use_threads(threads):
                assert np.array_equal(bits(native_ops.attention(*arguments)), bits(expected))
    finally:
        library.hqdit_set_gomp_parallel(native_library._gomp_parallel_of_torch())
    assert native_library.shares_threads_with_torch() == shared


@needs_native
def test_memory_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        @staticmethod
        def hqdit_attention(*_: Any) -> bool:
            return False

    monkeypatch.setattr(native_library, "library", Exhausted)
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(MemoryError, match="hqdit_attention: no working memory"):
        native_ops.attention(x, x, x)


# Doctor, and machines without the library


@dataclass(frozen=True)
class Doctor:
    out: str
    record: dict[str, Any]


@pytest.fixture
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def call() -> Doctor:
        capsys.readouterr()
        assert run(["doctor", "--json", str(tmp_path / "d.json")]) == 0
        return Doctor(capsys.readouterr().out, json.loads((tmp_path / "d.json").read_text()))

    return call


@needs_native
def test_doctor_names_the_instruction_set_and_the_threads(doctor: Any) -> None:
    found = doctor()
    current = native_library.current_instruction_set()
    assert found.record["native"]["instruction_set"] == current
    assert found.record["native"]["instruction_sets"] == INSTRUCTION_SETS
    assert found.record["backends"]["native"] == "available"
    assert f"native kernels: {current} (of {', '.join(INSTRUCTION_SETS)})" in found.out
    shared = native_library.shares_threads_with_torch()
    assert found.record["native"]["threads"] == ("torch's" if shared else "started for each call")
    assert f"native threads: {found.record['native']['threads']}" in found.out
    assert f"{torch.get_num_threads()} threads" in found.out


@pytest.fixture
def _reloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the library be looked for again, in the test and after it."""
    monkeypatch.delenv(native_library.ISA_VARIABLE, raising=False)
    native_library._load.cache_clear()
    yield
    monkeypatch.undo()
    native_library._load.cache_clear()


def require_torch_instead(doctor: Any, reason: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """Everything runs on torch, says why, and does not run when native is asked for."""
    assert reason in (native_library.unavailable_reason() or "")
    assert default_backend() == "torch"
    found = doctor()
    assert reason in found.record["backends"]["native"]
    assert "native" not in found.record
    assert reason in found.out
    for call in (native_library.library, native_library.instruction_sets, lambda: require_backend("native")):
        with pytest.raises(EnvironmentUnavailable, match=r"native.*Fix: ") as info:
            call()
        assert reason in str(info.value)
    arguments = ["sample", "digits", "--num", "1", "--steps", "1", "--out", str(folder / "s")]
    capsys.readouterr()
    assert run([*arguments, "--backend", "native"]) == 6
    assert reason in capsys.readouterr().err
    assert not (folder / "s").exists()


@pytest.mark.usefixtures("_reloaded")
def test_installation_without_a_compiler(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(native_library, "library_path", lambda: None)
    require_torch_instead(doctor, "it was not compiled", capsys, tmp_path)


@pytest.mark.usefixtures("_reloaded")
def test_library_that_cannot_be_loaded(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / native_library.LIBRARY_FILE
    broken.write_bytes(b"\x7fELF and then nothing")
    monkeypatch.setattr(native_library, "library_path", lambda: broken)
    require_torch_instead(doctor, "_native.so cannot be loaded", capsys, tmp_path)


@needs_native
@pytest.mark.usefixtures("_reloaded")
def test_library_of_other_sources(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Longer(native_library.ProductArgs):
        _fields_ = [("more", native_library._int64)]

    monkeypatch.setattr(native_library, "ProductArgs", Longer)
    require_torch_instead(doctor, "compiled from other sources", capsys, tmp_path)


@needs_native
@pytest.mark.usefixtures("_reloaded")
def test_library_is_found_again() -> None:
    assert native_library.unavailable_reason() is None
    assert default_backend() == "native"
