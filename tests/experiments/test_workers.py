"""Worker processes: what they compute, what they pass on, and that none of them outlives the run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from functools import partial
from operator import methodcaller

import pytest
import torch

from hqdit.errors import NumericsError, ResourceError
from hqdit.experiments.cache import ResultCache
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.subjects import Subject
from hqdit.experiments.workers import THREAD_VARIABLES, Setting, running_workers
from hqdit.kernels.selection import current_backend, use_backend
from hqdit.pipeline.config import QuantizationConfig

NEAREST = QuantizationConfig.preset("minmax")


def describe(lab: Laboratory, number: int) -> dict:
    """A result that says where it was made."""
    return lab.cache.numbers(
        {"what": "describe", "number": number},
        lambda: {
            "process": os.getpid(),
            "threads": torch.get_num_threads(),
            "environment": [os.environ.get(name) for name in THREAD_VARIABLES],
            "backend": current_backend().name,
            "laboratory": [lab.seed, lab.is_quick, lab.is_full],
        },
    )


def fail(lab: Laboratory) -> None:
    raise NumericsError("layer: found a NaN, needed numbers. Fix: none")


def die(lab: Laboratory) -> None:
    os._exit(3)


def wait_for_ever(lab: Laboratory) -> None:
    threading.Event().wait()


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path / "cache", seed=3, is_quick=True, is_full=False, backend="reference")


def test_results_lie_in_the_cache_and_are_counted(setting):
    jobs = [partial(describe, number=number) for number in range(6)]
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    with running_workers(2, setting) as workers:
        assert workers.run(jobs, "jobs") == 6
        assert workers.run(jobs, "jobs") == 0
    assert {name: os.environ.get(name) for name in THREAD_VARIABLES} == before
    lab = Laboratory(ResultCache(setting.cache), setting.cache, seed=3, is_quick=True)
    with use_backend("reference"):
        found = [describe(lab, number) for number in range(6)]
    assert lab.cache.misses == 0
    assert os.getpid() not in {result.pop("process") for result in found}
    expected = {"threads": 1, "environment": ["1"] * 3, "backend": "reference", "laboratory": [3, True, False]}
    assert found == [expected] * 6


def test_an_error_arrives_as_it_was_raised_and_nobody_works_on(setting):
    with pytest.raises(NumericsError, match="found a NaN"), running_workers(2, setting) as workers:
        workers.run([wait_for_ever, fail], "jobs")
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_is_an_error_with_a_way_on(setting):
    with pytest.raises(ResourceError, match="jobs of the test.*Fix: run the same command again"):
        with running_workers(1, setting) as workers:
            workers.run([die], "jobs of the test")
    assert multiprocessing.active_children() == []


def test_an_interruption_ends_the_workers(setting, monkeypatch):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hqdit.experiments.workers.as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt), running_workers(1, setting) as workers:
        workers.run([wait_for_ever], "jobs")
    assert multiprocessing.active_children() == []


def test_a_worker_gets_the_numbers_that_this_process_gets(setting):
    subject = Subject("digits")
    score = methodcaller("score", subject, NEAREST)
    with use_backend(setting.backend):
        with running_workers(1, setting) as workers:
            lab = Laboratory(ResultCache(setting.cache), setting.cache, 3, is_quick=True, workers=workers)
            lab.prepare([score], "scores")
            assert lab.cache.misses == 1
            there = lab.score(subject, NEAREST)
            assert (lab.cache.misses, lab.cache.hits) == (1, 1)
        other = Laboratory(ResultCache(setting.cache.parent / "other"), setting.cache, 3, is_quick=True)
        other.prepare([score], "scores")
        here = other.score(subject, NEAREST)
    for found in (there, here):
        assert found.pop("quantize_seconds") > 0
    assert there == here


def test_a_subject_travels_without_its_model():
    subject = Subject("digits", 10.0)
    assert subject.model is not None
    sent = pickle.dumps(subject)
    assert len(sent) < 1000
    first, second = pickle.loads(sent), pickle.loads(sent)
    assert first is second
    assert first == subject
