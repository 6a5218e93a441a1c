"""Contenders as the caller sees them: processes that prepare a model once and run it on request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hqdit.errors import EnvironmentUnavailable

#: Where `make bench-peers` puts the peers' environment and where their program lies, from the repository's root.
PEERS_PYTHON, PEERS_PROGRAM = Path(".venv-peers/bin/python"), Path("benchmarks/peers/serve_peer.py")


class Contender:
    """A process that speaks the protocol of `hqdit.benchmark.worker`.

    Attributes:
        name: for tables.
        ready: what it said when it was ready: how long it took, and its settings.
    """

    def __init__(self, name: str, command: Sequence[str | Path], log: Path) -> None:
        """Start `command` and wait until it is ready; what it prints besides goes to `log`.

        Raises:
            EnvironmentUnavailable: it ended, or said that it cannot run.
        """
        self.name = name
        self._log = log
        # The same for everybody: threads that wait sleep, as the command line has it.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        self.ready = self._read()

    @classmethod
    def ours(cls, variant: str, name: str, model: Path, inputs: Path, threads: int, log: Path) -> Contender:
        """A contender of `hqdit.benchmark.worker`, in this interpreter."""
        command: list[str | Path] = [sys.executable, "-m", "hqdit.benchmark.worker", variant]
        return cls(name, [*command, "--model", model, "--inputs", inputs, "--threads", str(threads)], log)

    @classmethod
    def peer(cls, name: str, options: Sequence[str], model: Path, inputs: Path, threads: int, log: Path) -> Contender:
        """A peer, in the peers' own interpreter."""
        command: list[str | Path] = [PEERS_PYTHON, PEERS_PROGRAM, *options]
        return cls(name, [*command, "--model", model, "--inputs", inputs, "--threads", str(threads)], log)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            EnvironmentUnavailable: the process has ended, or says that it cannot answer; it is killed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading says why
        return self._read()

    def seconds(self) -> float:
        """Time of one forward pass."""
        return float(self.ask({"op": "time", "repeats": 1})["seconds"][0])

    def write_output(self, path: Path) -> None:
        """Write the output of a forward pass as a NumPy file."""
        self.ask({"op": "output", "path": str(path)})

    def profile(self, repeats: int) -> dict[str, float]:
        """Where the time of a forward pass goes; ours only."""
        return dict(self.ask({"op": "profile", "repeats": repeats})["seconds"])

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        self._process.kill()
        with self._process:  # waits, and closes the pipes
            pass

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"exit status {self._process.wait()}"}
        if "error" in answer:
            self.kill()
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise EnvironmentUnavailable(
                f"benchmark contender {self.name}: found {answer['error']} ({' '.join(last)}), needed a process that "
                "answers. Fix: see what it prints when it is run by hand"
            )
        return answer
