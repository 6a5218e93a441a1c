"""README's numbers are those of the committed records, and its example runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_come_from_the_records():
    script = ROOT / "benchmarks" / "update_readme.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_python_example_runs_in_its_smallest_size(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    code = blocks[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    smaller = code.replace("samples=512", "samples=32, sampling=small").replace("steps=50", "steps=2")
    assert smaller.count("small") == 1 and "steps=2" in smaller  # the example still has what is made smaller
    monkeypatch.chdir(tmp_path)
    from hqdit.sampling.sampler import SamplingConfig

    exec(compile(smaller, "README.md", "exec"), {"small": SamplingConfig(steps=2)})
    assert (tmp_path / "zero.png").is_file()
    assert (tmp_path / "digits-w4a4" / "transformer" / "config.json").is_file()
