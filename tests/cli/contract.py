"""What every refused command owes: an exit code, one complete first line, and nothing that drives a terminal."""

from __future__ import annotations

from pathlib import Path

from conftest import Outcome


def require_contract(outcome: Outcome, code: int, *fragments: str) -> None:
    assert outcome.code == code, outcome.err
    line = outcome.first_line
    assert line.startswith("hqdit: error: ") and "Fix: " in line and not line.endswith("Fix: ")
    for fragment in fragments:
        assert fragment in line, f"{fragment!r} is missing in: {line}"
    assert "Traceback" not in outcome.out + outcome.err
    assert not any(0x2500 <= ord(c) <= 0x259F for c in outcome.out + outcome.err), "box"
    assert all(c.isprintable() or c == "\n" for c in outcome.out + outcome.err), "control character"
    assert len(line) < 700 and len(outcome.err.splitlines()) <= 20


def marks(folder: Path) -> dict[str, tuple[int, ...]]:
    """Relative path -> what changes when anything is written: quicker than `conftest.tree`, and as strict."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        # The times of a folder change when a temporary name comes and goes in it.
        times = () if is_folder else (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        found[str(path.relative_to(folder))] = (state.st_ino, state.st_mode, *times)
    return found
