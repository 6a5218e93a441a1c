"""README's numbers are those of the committed records, and its example runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from tiny import tiny_flux

from hqdit.pipeline.checkpoint import quantized_layers

ROOT = Path(__file__).parents[2]


def test_tables_come_from_the_records():
    script = ROOT / "benchmarks" / "update_readme.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def python_examples():
    """The python blocks of README, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_python_example_runs_in_its_smallest_size(tmp_path, monkeypatch):
    code, _ = python_examples()
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    smaller = code.replace("samples=512", "samples=32, sampling=small").replace("steps=50", "steps=2")
    assert smaller.count("small") == 1 and "steps=2" in smaller  # the example still has what is made smaller
    monkeypatch.chdir(tmp_path)
    from hqdit.sampling.sampler import SamplingConfig

    exec(compile(smaller, "README.md", "exec"), {"small": SamplingConfig(steps=2)})
    assert (tmp_path / "zero.png").is_file()
    assert (tmp_path / "digits-w4a4" / "transformer" / "config.json").is_file()


def test_the_diffusers_example_runs_on_a_tiny_model(tmp_path, monkeypatch):
    _, code = python_examples()
    tiny_flux().save_pretrained(tmp_path / "path/or/hub-id" / "transformer")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(quantized_layers(names["transformer"])) > 20
    assert names["transformer"].dtype == torch.bfloat16
