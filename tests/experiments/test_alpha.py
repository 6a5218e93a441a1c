"""`alpha`: range and precision of weights by hand, equal choices measured once, and the record."""

from __future__ import annotations

import copy
import math
from operator import methodcaller

import pytest
import torch

from hqdit.experiments import alpha
from hqdit.experiments.alpha import chosen_formats, weight_facts
from hqdit.experiments.image_scores import FLOAT32
from hqdit.experiments.noise_floor import FLOOR
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize

NEAREST = QuantizationConfig(gptq=False)
OCTAVES = {"e3m0": 6.0, "e2m1": math.log2(12), "e1m2": math.log2(7)}


@pytest.mark.parametrize("fmt", OCTAVES)
def test_weight_facts_from_dequantized_weights(tiny_subject, fmt):
    exact = tiny_subject.model
    model = quantize(copy.deepcopy(exact), NEAREST.replace(weights=fmt, rotation="none"))
    signal = noise = kept_signal = kept_noise = lost = total = 0.0
    for name, module in exact.named_modules():
        if hasattr(model.get_submodule(name), "dequantized_weight"):
            weight, rounded = module.weight.detach().double(), model.get_submodule(name).dequantized_weight().double()
            error, alive = (weight - rounded) ** 2, rounded != 0
            signal, noise = signal + float((weight**2).sum()), noise + float(error.sum())
            kept_signal += float((weight[alive] ** 2).sum())
            kept_noise += float(error[alive].sum())
            lost, total = lost + int((~alive).sum()), total + weight.numel()
    found = weight_facts(exact, model)
    assert found["range_octaves"] == pytest.approx(OCTAVES[fmt])
    assert found["underflow"] == pytest.approx(lost / total)
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-5)
    assert found["precision_db"] == pytest.approx(10 * math.log10(kept_signal / kept_noise), abs=1e-5)


def test_more_range_is_less_underflow_and_less_precision(tiny_subject):
    found = []
    for fmt in OCTAVES:
        model = quantize(copy.deepcopy(tiny_subject.model), NEAREST.replace(weights=fmt))
        found.append(weight_facts(tiny_subject.model, model))
    underflow, precision = ([facts[key] for facts in found] for key in ("underflow", "precision_db"))
    assert underflow == sorted(underflow) and precision == sorted(precision)


def test_formats_are_listed_for_weights_and_inputs(tiny_subject):
    model = quantize(copy.deepcopy(tiny_subject.model), NEAREST.replace(weights="e3m0", activations="int4"))
    assert chosen_formats(model) == " ".join(["e3m0/int4"] * 14)


def test_the_record(lab, tiny_subject, monkeypatch, require_whole):
    monkeypatch.setattr(alpha, "SUBJECTS", (tiny_subject,))
    record = alpha.run(lab)
    require_whole(record, "alpha")
    weights, fidelity, images = record.tables
    maps = [figure for figure in record.figures if isinstance(figure, alpha.FormatMap)]
    assert {figure.y_label for figure in maps} == {"layers (%)"} and len(maps) == 2
    assert any("one draw of" in note for note in record.notes)
    assert [row[:2] for row in weights.rows] == [
        (word, value) for word in ("rotated", "not rotated") for value in alpha.QUICK_ALPHAS
    ]
    assert images.rows[0][0] == "float32"
    assert [row[0] for row in fidelity.rows[:2]] == [FLOAT32, FLOOR]
    for of_weights, of_model in zip(weights.rows, fidelity.rows[2:], strict=True):
        assert of_weights[:2] == of_model[:2]
        assert sum(of_weights[3:6]) == pytest.approx(1.0)
        assert (of_model[4] is None) == (of_model[1] == alpha.DEFAULT)
    # What is called one choice has one row of results and one row of images.
    choices = {(row[0], row[2]): row[3:] for row in weights.rows}
    assert all(choices[row[0], row[2]] == row[3:] for row in weights.rows)
    assert len(images.rows) == len(choices) + 3  # float32 from three seeds


def test_alphas_with_equal_formats_are_measured_once(lab, tiny_subject, monkeypatch):
    asked = []
    score = lab.score

    def counted(subject, config):
        asked.append(config.alpha)
        return score(subject, config)

    monkeypatch.setattr(lab, "score", counted)
    choices = alpha._choices(lab, tiny_subject, "full", (0.24, 0.25, 0.26))
    sweep = alpha._sweep(lab, tiny_subject, choices)
    assert list(sweep) == [0.24, 0.25, 0.26]
    assert alpha.DEFAULT in asked and len(asked) == len(alpha._alike(sweep)) == len(alpha._alike(choices))
    prepared = []
    monkeypatch.setattr(type(lab), "prepare", lambda _lab, jobs, what: prepared.extend(jobs))
    alpha._prepare(lab, tiny_subject, {"full": choices})
    asked.clear()
    for job in (job for job in prepared if isinstance(job, methodcaller)):
        job(lab)
    assert len(asked) == len(set(asked)) == len(alpha._alike(choices))


@pytest.fixture
def entry_at():
    """Makes what a sweep holds of one choice of formats, with 30 trajectories of one SQNR or one for each."""

    def entry(*dbs):
        db = sum(dbs) / len(dbs)
        powers = {alpha.JUDGED: [10 ** (-dbs[k % len(dbs)] / 10) for k in range(30)]}
        score = {"eps_sqnr_db": {alpha.JUDGED: [db, db, db]}, "eps_noise_powers": powers}
        facts = {"range_octaves": 3.0, "underflow": 0.1, "precision_db": 20.0}
        return {"score": score, "weights": facts}

    return entry


def test_the_answer_can_come_out_either_way(entry_at):
    found = alpha._answer("m", "full", {0.1: entry_at(9.0), 0.25: entry_at(10.0)})
    assert "highest with the default 0.25, better than the next choice, 0.1 (+1.00 dB [+1.00, +1.00])" in found
    assert found.endswith("; worse than the default 0.25: 0.1 (-1.00 dB [-1.00, -1.00]).")
    found = alpha._answer("m", "full", {0.1: entry_at(11.0), 0.25: entry_at(10.0)})
    assert "highest with 0.1, better than the next choice, the default 0.25 (+1.00 dB" in found
    assert found.endswith("; better than the default 0.25: 0.1 (+1.00 dB [+1.00, +1.00]).")


def test_values_that_choose_as_the_default_does_are_the_default(entry_at):
    shared, unclear, worse = entry_at(10.0), entry_at(9.0, 10.8), entry_at(4.0)
    found = alpha._verdict({0.2: shared, 0.25: shared, 0.3: unclear, 0.6: worse})
    best, unknown, clear = found.split("; ")
    assert best.startswith("highest with the default 0.25 (= 0.2), not distinguishable from the next choice, 0.3 (")
    assert unknown.startswith("not distinguishable from the default 0.25: 0.3 (") and "0.2" not in unknown[45:]
    assert clear == "worse than the default 0.25: 0.6 (-6.00 dB [-6.00, -6.00])"


def test_one_choice_for_all_values_has_no_best(entry_at):
    shared = entry_at(10.0)
    assert alpha._verdict({0.2: shared, 0.25: shared}) == "all values choose the same formats"


def test_the_classifier_fits_the_tiny_images(tiny_subject):
    assert tiny_subject.classifier.classify(torch.zeros(2, 1, 8, 8)).shape == (2,)
