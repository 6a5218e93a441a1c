"""A laboratory that works within seconds: a tiny random model in the place of the bundled ones, and few samples."""

from __future__ import annotations

import json
from functools import cached_property

import pytest
from tiny import ddim, tiny_dit

from hqdit.experiments.cache import ResultCache
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.subjects import Subject
from hqdit.models.outliers import inject_outliers
from hqdit.records.run_record import RunRecord
from hqdit.records.run_record_reader import run_record_from_json
from hqdit.sampling.sampler import SamplingConfig


class TinySubject(Subject):
    """A random model on 8x8 images, so that the classifier of digits can look at them."""

    @cached_property
    def model(self):
        return inject_outliers(tiny_dit(), self.outlier_factor)

    @cached_property
    def scheduler(self):
        return ddim()


class OtherTinySubject(TinySubject):
    """Another random model, with another name."""

    @property
    def name(self):
        return "other"

    @cached_property
    def model(self):
        return inject_outliers(tiny_dit(seed=7), self.outlier_factor)


class TinyLaboratory(Laboratory):
    """3 steps, 24 calibration samples, 12 images."""

    sampling = SamplingConfig(3, 1.5)
    calibration_samples = 24
    image_count = 12


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("laboratory")
    return TinyLaboratory(ResultCache(root / "cache"), root, is_quick=True, tell=lambda _text: None)


@pytest.fixture(scope="session")
def tiny_subject():
    return TinySubject("digits")


@pytest.fixture(scope="session")
def loud_subject():
    return TinySubject("digits", 10.0)


@pytest.fixture(scope="session")
def other_subject():
    return OtherTinySubject("digits")


@pytest.fixture(scope="session")
def require_whole():
    """A check that a record says what it is, and that its JSON gives it back."""

    def check(record: RunRecord, name: str) -> None:
        assert record.name == name and record.title and record.question.endswith("?")
        assert record.answers and all(answer.endswith(".") for answer in record.answers)
        assert record.tables and record.figures and all(table.rows for table in record.tables)
        values = json.loads(json.dumps(record.to_json()))
        assert run_record_from_json(values, "record.json").to_json() == record.to_json()

    return check
