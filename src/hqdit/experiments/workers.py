"""Processes that fill the cache of results side by side, each with one thread.

The models here are so small that a second thread gains nothing and a second process nearly everything. Results always
come from such a process, so that neither the number of workers nor that of threads changes a bit of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from hqdit.errors import ResourceError
from hqdit.experiments.cache import ResultCache
from hqdit.experiments.laboratory import Job, Laboratory
from hqdit.integrations.diffusers_logging import silence_diffusers
from hqdit.kernels.selection import use_backend
from hqdit.progress import quiet, track

#: Read by the libraries below torch and numpy when a process starts.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Setting:
    """What a process needs to know to work like the laboratory that it works for.

    Attributes:
        cache: folder of results.
        seed: as in `Laboratory`.
        is_quick: likewise.
        is_full: likewise.
        backend: name of the backend.
    """

    cache: Path
    seed: int
    is_quick: bool
    is_full: bool
    backend: str


class Workers:
    """Some processes, started when they are first needed, that live until `running_workers` ends.

    Args:
        count: how many, at least 1.
        setting: of the laboratory that they work for.
    """

    def __init__(self, count: int, setting: Setting) -> None:
        # Not forked: a copy of a process whose threads wait for work would wait for ever.
        context = multiprocessing.get_context("spawn")
        self._setting = setting
        self._pool = ProcessPoolExecutor(count, context, _begin)

    def run(self, jobs: Sequence[Job], what: str) -> int:
        """Run all jobs, in any order, with a progress bar called `what`; how many results they computed.

        Raises:
            ResourceError: a process ended in the middle of a job.
            Exception: the first one that a job raised; jobs that have not begun are dropped.
        """
        futures = [self._pool.submit(_work, self._setting, job) for job in jobs]
        try:
            return sum(future.result() for future in track(as_completed(futures), what, len(futures)))
        except BrokenProcessPool as error:
            raise ResourceError(
                f"worker: found that a process ended in the middle of its work ({what}), needed it to finish; memory "
                "may have run out. Fix: run the same command again, which goes on from there, with fewer --jobs"
            ) from error

    def close(self) -> None:
        """End the processes, also those in the middle of a job."""
        for process in multiprocessing.active_children():
            process.terminate()
        # Notices that its processes have ended, and then ends its own threads and queues.
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def running_workers(count: int, setting: Setting) -> Iterator[Workers]:
    """Workers for the body; whatever ends it ends them."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    # Processes start when there is work for them, and take over the environment of that moment.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    workers = Workers(count, setting)
    try:
        yield workers
    finally:
        workers.close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin() -> None:
    """Set up a new process."""
    # An interruption from the keyboard reaches every process; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ends at once where the parent's handler, if one was inherited, would unwind.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    silence_diffusers()
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a child

    def follow() -> None:
        parent.join()
        os._exit(1)

    # A parent that was killed cannot end its children.
    threading.Thread(target=follow, daemon=True).start()


@lru_cache(maxsize=1)
def _laboratory(setting: Setting) -> Laboratory:
    """This process's laboratory, which keeps models and calibration data between jobs."""
    return Laboratory(
        ResultCache(setting.cache),
        setting.cache,
        setting.seed,
        setting.is_quick,
        setting.is_full,
        tell=lambda _text: None,
    )


def _work(setting: Setting, job: Job) -> int:
    """Run `job` in this process; how many results were not in the cache."""
    lab = _laboratory(setting)
    misses = lab.cache.misses
    with use_backend(setting.backend), quiet():
        job(lab)
    return lab.cache.misses - misses
