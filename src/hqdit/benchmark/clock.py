"""Seconds of a call on a device, and calls in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from hqdit.progress import track

#: Written before each timed call, so that it finds nothing of the last one in the L2 cache (50 MB on an H200).
FLUSHED_BYTES = 256 * 1024**2
#: Cycles that a GPU waits, about a millisecond, while Python queues the call behind them.
HEAD_START_CYCLES = 2_000_000


class Clock:
    """Times single calls: CUDA events on a GPU, the clock on the wall elsewhere."""

    def __init__(self, device: torch.device) -> None:
        """A clock for calls that run on `device`."""
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._flushed = torch.empty(FLUSHED_BYTES if self._is_cuda else 0, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], object], has_head_start: bool = False) -> float:
        """Time of one call on the device.

        Args:
            run: what is timed.
            has_head_start: let the device wait until the call is queued, so that the time is that of the kernels and
                not of the Python code that starts them.
        """
        if not self._is_cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flushed.zero_()
        torch.cuda.synchronize(self.device)
        if has_head_start:
            torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end)) * 1e-3

    def turns(
        self, runs: Mapping[str, Callable[[], object]], repeats: int, what: str, has_head_start: bool = False
    ) -> dict[str, list[float]]:
        """Seconds of each of `runs`, taken in turns after two calls that count for nothing; a bar called `what`."""
        for run in runs.values():
            for _ in range(2):
                run()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in track(range(repeats), what):
            for name, run in runs.items():
                seconds[name].append(self.seconds(run, has_head_start))
        return seconds
