"""`import hqdit` is cheap, and everything public is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hqdit

HEAVY = ("torch", "diffusers", "numpy", "safetensors", "matplotlib", "typer")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    probe = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_import_loads_neither_torch_nor_diffusers() -> None:
    found = modules_after("import hqdit\nhqdit.__version__, hqdit.__all__, dir(hqdit)")
    assert "hqdit" in found and found.isdisjoint(HEAVY)


@pytest.mark.parametrize("name", hqdit.__all__)
def test_every_public_name_resolves(name: str) -> None:
    found = getattr(hqdit, name)
    assert found is getattr(hqdit, name)
    assert isinstance(found, str) or (callable(found) and found.__name__ == name and found.__doc__)
    assert name in dir(hqdit)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quantise.*public names.*quantize"):
        _ = hqdit.quantise  # type: ignore[attr-defined]
    assert not hasattr(hqdit, "torch")
