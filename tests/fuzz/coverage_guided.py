"""Fuzzing guided by coverage (atheris): `python tests/fuzz/coverage_guided.py --executions N --record FILE`.

Every target runs in a process of its own, begins with the committed corpus and has an equal share of the executions.
Any exception but `HQDiTError` ends its process and leaves the input; so does one that takes too long or too much
memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve()
SECONDS_PER_INPUT, MEGABYTES = 20, 4096


def has_atheris() -> bool:
    """Whether atheris is installed."""
    return importlib.util.find_spec("atheris") is not None


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process, which does not return."""
    import warnings

    import atheris

    # By Python's own finder, because atheris cannot instrument what that of an editable install loads.
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
    sys.path[:0] = [str(PROGRAM.parent), str(PROGRAM.parents[1]), str(PROGRAM.parents[2] / "src")]
    with atheris.instrument_imports(include=["hqdit"]):
        from fuzz_targets import TARGETS, corpus
    from mutations import mutations

    seeds = corpus(name)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        """Every other mutation knows JSON and headers; libFuzzer's own know none."""
        if seed % 2:
            return next(mutations([data, *seeds], 1, seed, largest))
        return bytes(atheris.Mutate(data, largest))

    warnings.simplefilter("ignore")
    target, folder = TARGETS[name], Path(tempfile.mkdtemp())
    target.prepare(folder)
    atheris.Setup([sys.argv[0], *arguments], lambda data: target(folder, data) and None, custom_mutator=mutate)
    atheris.Fuzz()


def run_target(name: str, executions: int, seed: int, found: Path) -> dict[str, object]:
    """Fuzz one target in a child; what it found lies in `found`."""
    corpus = PROGRAM.parent / "corpus" / name
    with tempfile.TemporaryDirectory() as temporary:
        grown = Path(temporary) / "grown"
        grown.mkdir()
        options = [
            f"-runs={executions}",
            f"-seed={seed}",
            "-max_len=65536",
            f"-timeout={SECONDS_PER_INPUT}",
            f"-rss_limit_mb={MEGABYTES}",
            f"-artifact_prefix={found}/{name}-",
            "-print_final_stats=1",
        ]
        begun = time.monotonic()
        command = [sys.executable, str(PROGRAM), "--target", name, "--", *options, str(grown), str(corpus)]
        # Names of temporary folders end with the target's, so that they go with this one.
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**_environment(), "TMPDIR": temporary}
        )
        seconds = time.monotonic() - begun
        counted = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
        coverage = [int(count) for count in re.findall(r" cov: (\d+)", done.stderr)]
        result: dict[str, object] = {
            "executions": int(counted[1]) if counted else 0,
            "seeds": len(list(corpus.iterdir())),
            "corpus_at_the_end": len(list(grown.iterdir())),
            "coverage_at_first": coverage[0] if coverage else 0,
            "coverage_at_the_end": coverage[-1] if coverage else 0,
            "findings": len(list(found.glob(f"{name}-*"))),
            "seconds": round(seconds),
        }
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
    return result


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> int:
    """Run all targets, or one as a child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=50_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--found", type=Path, default=Path("fuzz-findings"), help="folder for inputs that fail")
    parser.add_argument("--target", help="fuzz this one in this process; its options follow --")
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    if given.target:
        fuzz(given.target, given.options)
    sys.path[:0] = [str(PROGRAM.parent), str(PROGRAM.parents[1])]
    from fuzz_targets import TARGETS

    from hqdit.pipeline.environment import describe_environment

    given.found.mkdir(parents=True, exist_ok=True)
    share = -(-given.executions // len(TARGETS))
    targets = {name: run_target(name, share, given.seed, given.found.resolve()) for name in sorted(TARGETS)}
    import atheris

    record = {
        "test": "tests.fuzz.test_fuzz_readers::test_coverage_guided",
        "executions": sum(int(str(result["executions"])) for result in targets.values()),
        "findings": sum(int(str(result["findings"])) for result in targets.values()),
        "seed": given.seed,
        "targets": targets,
        "atheris": getattr(atheris, "__version__", "unknown"),
        "environment": describe_environment(),
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    if given.record:
        given.record.write_text(text, encoding="utf-8")
    is_complete = all(int(str(result["executions"])) >= share for result in targets.values())
    return 0 if is_complete and not record["findings"] else 1


if __name__ == "__main__":
    sys.exit(main())
