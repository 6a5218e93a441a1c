"""The command as a process: entry point, what it imports, streams that end, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Models, tree

import hqdit

SCRIPT = Path(sys.executable).with_name("hqdit")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FULL_DEVICE = Path("/dev/full")


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)


def test_the_installed_script() -> None:
    done = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hqdit {hqdit.__version__}\n", "")


def test_help_version_and_misuse_import_no_library() -> None:
    done = python(
        "import sys\n"
        "from hqdit.cli.main import run\n"
        "commands = ('demo', 'quantize', 'sample', 'evaluate', 'inspect', 'doctor', 'inject-outliers')\n"
        "assert [run([*command, '--help']) for command in ((), *((name,) for name in commands))] == [0] * 8\n"
        "assert run(['--version']) == 0\n"
        "assert run([]) == run(['nope']) == run(['quantize']) == run(['quantize', 'x', '--alpha', 'y']) == 2\n"
        "assert run(['quantize', 'x']) == run(['sample', 'x', '--out', 'y', '--num', '0']) == 2\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'safetensors', 'huggingface_hub', 'matplotlib', 'PIL'}\n"
        "assert heavy.isdisjoint(sys.modules), heavy & sys.modules.keys()"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: hqdit") == 8


def test_without_torch_help_works_and_doctor_explains(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # an import of torch now fails as if it were broken
        "from hqdit.cli.main import run\n"
        "assert run(['--help']) == run(['quantize', '--help']) == 0\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    done = python(code, "doctor")
    assert done.returncode == 6 and "torch: " in done.stdout and "broken" in done.stdout
    assert done.stderr.splitlines()[0].startswith("hqdit: error: torch") and "Traceback" not in done.stderr
    done = python(code, "quantize", "digits", "--out", tmp_path / "q")
    assert done.returncode == 6 and done.stderr.startswith("hqdit: error: torch") and tree(tmp_path) == {}


def test_a_reader_that_goes_away_is_no_error(models: Models) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [SCRIPT, "inspect", models.quantized], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120,
            env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_standard_output_the_work_is_done(models: Models, tmp_path: Path) -> None:
    command = 'exec "$0" quantize "$1" --out "$2" --preset minmax >&-'
    done = subprocess.run(
        ["sh", "-c", command, SCRIPT, models.transformer, tmp_path / "q"], stderr=subprocess.PIPE, text=True,
        timeout=120, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "q") == tree(models.quantized)


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="the system has no /dev/full")
def test_standard_output_that_cannot_be_written_is_an_error(models: Models) -> None:
    with FULL_DEVICE.open("w") as full:
        done = subprocess.run(
            [SCRIPT, "inspect", models.quantized], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
            env=ENVIRONMENT, check=False,
        )  # fmt: skip
    assert done.returncode == 5
    assert done.stderr.startswith("hqdit: error: ") and "No space left" in done.stderr and "Fix: " in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_output_is_written(models: Models, tmp_path: Path, number: int, code: int) -> None:
    stopped = (
        "import sys, time\n"
        "import hqdit.pipeline.publish as publish\n"
        "from hqdit.cli.main import main\n"
        "def wait(folder):\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(100)\n"
        "publish._flush_tree = wait\n"
        "main()"
    )
    arguments = ["quantize", models.transformer, "--out", tmp_path / "deep" / "q", "--preset", "minmax"]
    with subprocess.Popen(
        [sys.executable, "-c", stopped, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert "waiting\n" in iter(process.stdout.readline, "")  # after the estimate
        written = tree(tmp_path)
        assert any(".hqdit-tmp-" in name and name.endswith("config.json") for name in written)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    job = "deep/.q.hqdit-job"
    left = tree(tmp_path)
    assert left.keys() - {"deep", job} and all(name == "deep" or name.startswith(job) for name in left)
    assert not any(".hqdit-tmp-" in name for name in left) and "deep/q --preset minmax --resume" in errors
    assert number != signal.SIGINT or errors.startswith("hqdit: interrupted")
