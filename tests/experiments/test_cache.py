"""Results are found again by everything they depend on, and by nothing else."""

from __future__ import annotations

import json

import pytest
import torch

import hqdit
from hqdit.experiments import cache as module
from hqdit.experiments.cache import ResultCache, code_digest
from hqdit.pipeline import environment


def refuse():
    raise AssertionError("computed again")


def test_a_second_run_takes_the_first_ones_result(tmp_path):
    first = ResultCache(tmp_path / "cache")
    assert first.numbers({"a": 1}, lambda: {"x": 0.1, "y": [1, None]}) == {"x": 0.1, "y": [1, None]}
    second = ResultCache(tmp_path / "cache")
    assert second.numbers({"a": 1}, refuse) == {"x": 0.1, "y": [1, None]}
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 1, 1, 0)


def test_key_order_does_not_matter_and_values_do(tmp_path):
    results = ResultCache(tmp_path)
    results.numbers({"a": 1, "b": 2}, lambda: {"found": 1})
    assert results.numbers({"b": 2, "a": 1}, refuse) == {"found": 1}
    assert results.numbers({"a": 1, "b": 3}, lambda: {"found": 2}) == {"found": 2}


@pytest.mark.parametrize("changed", ["code", "torch", "threads"])
def test_other_code_or_surroundings_compute_anew(tmp_path, monkeypatch, changed):
    results = ResultCache(tmp_path)
    results.numbers({"a": 1}, lambda: {"found": 1})
    if changed == "code":
        monkeypatch.setattr(module, "code_digest", lambda: "another")
    elif changed == "torch":
        monkeypatch.setattr(environment, "version", lambda name: f"another {name}")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert results.numbers({"a": 1}, lambda: {"found": 2}) == {"found": 2}


def test_tensors_come_back_bit_for_bit(tmp_path):
    stored = {"x": torch.randn(3, 4).T, "n": torch.arange(5)}
    results = ResultCache(tmp_path)
    for found in (results.tensors({"k": 0}, lambda: stored), results.tensors({"k": 0}, refuse)):
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


def test_an_error_leaves_nothing_that_could_be_taken_for_a_result(tmp_path):
    results = ResultCache(tmp_path / "cache")
    with pytest.raises(AssertionError):
        results.numbers({"a": 1}, refuse)
    with pytest.raises(AssertionError):
        results.tensors({"a": 1}, refuse)
    assert list((tmp_path / "cache").iterdir()) == []
    assert results.numbers({"a": 1}, lambda: {"found": 1}) == {"found": 1}


def test_a_stored_result_says_what_it_is_of(tmp_path):
    ResultCache(tmp_path).numbers({"what": "score", "subject": "digits"}, lambda: {"db": 3.0})
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"key": {"what": "score", "subject": "digits"}, "result": {"db": 3.0}}
    assert len(file.stem) == 64


def test_the_digest_covers_sources_models_and_kernels(tmp_path, monkeypatch):
    """Every file counts, by name and content, but for what Python writes by itself."""
    files = {"a.py": b"1", "data/model.safetensors": b"2", "_native.so": b"3"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(hqdit, "__path__", [str(tmp_path)])

    def digest():
        code_digest.cache_clear()
        return code_digest()

    seen = {digest()}
    for name in files:
        (tmp_path / name).write_bytes(b"changed")
        seen.add(digest())
    assert len(seen) == 4
    (tmp_path / "a.pyc").write_bytes(b"compiled")
    assert digest() in seen
    code_digest.cache_clear()
