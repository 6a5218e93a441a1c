"""Runs experiments one after another, keeps their records, and says how long the rest will take."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hqdit.experiments.cache import ResultCache
from hqdit.experiments.laboratory import Experiment, Laboratory
from hqdit.experiments.workers import Setting, running_workers
from hqdit.kernels.selection import current_backend
from hqdit.pipeline.environment import describe_environment
from hqdit.pipeline.publish import publish_bytes, publish_text
from hqdit.records.run_record import RECORD_NAME, RunRecord
from hqdit.report.charts import draw

CACHE_NAME = "cache"
#: Each takes about 1 GB of memory.
MOST_JOBS = 8


@dataclass(frozen=True)
class Entry:
    """One experiment by name.

    Attributes:
        module: in this package; its `run` is the experiment.
        minutes: about what it takes on two cores; only shares of the time left follow from it.
        is_of_the_paper: whether it belongs to "all": the paper's comparisons and open questions.
    """

    module: str
    minutes: float
    is_of_the_paper: bool = True

    def load(self) -> Experiment:
        """The experiment's function; its module is imported now, not with this one."""
        experiment: Experiment = importlib.import_module(f"hqdit.experiments.{self.module}").run
        return experiment


#: In the order of the report.
EXPERIMENTS: dict[str, Entry] = {
    "table-w4a4": Entry("table_w4a4", 34),
    "outliers": Entry("outliers", 1),
    "formats": Entry("formats", 1),
    "calibration": Entry("calibration_size", 1),
    "alpha": Entry("alpha", 2.5),
    "beyond-dit": Entry("beyond_dit", 4),
    "hadamard-cost": Entry("hadamard_cost", 1.5),
    "domains": Entry("domains", 2),
    "timesteps": Entry("timesteps", 1),
    "plus": Entry("plus", 12, is_of_the_paper=False),
}


def run_experiments(
    names: Sequence[str],
    out: Path,
    *,
    seed: int = 0,
    is_quick: bool = False,
    is_full: bool = False,
    jobs: int | None = None,
    tell: Callable[[str], None],
) -> list[tuple[Path, RunRecord]]:
    """Run experiments and write OUT/NAME/record.json, figures and pictures beside it; OUT/cache keeps results.

    An interrupted run is continued by the same call: what was computed is taken from the cache.

    Args:
        names: keys of `EXPERIMENTS`.
        out: made if missing; folders of other experiments in it stay.
        seed: of calibration, noise and rotations.
        is_quick: fewer samples and steps.
        is_full: the whole grid of `table-w4a4`.
        jobs: processes that compute side by side; None for one per thread that torch would use, at most `MOST_JOBS`.
        tell: gets a line before each experiment, with the time that is probably left.

    Returns:
        (folder, record) of each.
    """
    cache, threads = ResultCache(out / CACHE_NAME), torch.get_num_threads()
    count = jobs or min(threads, MOST_JOBS)
    backend = current_backend()
    environment = {**describe_environment(), "backend": backend.description, "jobs": count}
    setting = Setting(out / CACHE_NAME, seed, is_quick, is_full, backend.name)
    total, done, begun = sum(EXPERIMENTS[name].minutes for name in names), 0.0, time.monotonic()
    records = []
    with running_workers(count, setting) as workers, _one_thread():
        shared = Laboratory(cache, out, seed, is_quick, is_full, tell, workers, threads)
        for position, name in enumerate(names):
            elapsed = time.monotonic() - begun
            left = f", about {elapsed / done * (total - done) / 60:.0f} min left" if done else ""
            tell(f"{name} ({position + 1} of {len(names)}{left})")
            folder = out / name
            folder.mkdir(parents=True, exist_ok=True)
            lab = dataclasses.replace(shared, images=folder)  # with the calibration data that is there already
            start, misses = time.perf_counter(), cache.misses
            record = EXPERIMENTS[name].load()(lab)
            record = dataclasses.replace(
                record,
                seconds=time.perf_counter() - start,
                environment=environment,
                config={
                    **lab.settings,
                    "quick": is_quick,
                    "full": is_full,
                    "results_from_cache": cache.misses == misses,
                    **record.config,
                },
            )
            for number, figure in enumerate(record.figures, start=1):
                publish_bytes(folder / f"figure-{number}.svg", draw(figure))
            publish_text(folder / RECORD_NAME, record.to_text())
            records.append((folder, record))
            done += EXPERIMENTS[name].minutes
    return records


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread in this process too, so that its results are those of the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
