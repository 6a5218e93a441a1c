"""The ablation: rows that really build up to the presets, and a record that says what was measured."""

from __future__ import annotations

import math

import pytest

from hqdit.experiments import plus
from hqdit.experiments.laboratory import eps_gain
from hqdit.pipeline.config import QuantizationConfig
from hqdit.records.run_record import Interval
from hqdit.records.run_record_reader import run_record_from_json


@pytest.fixture(scope="module")
def record(lab, tiny_subject):
    with pytest.MonkeyPatch.context() as patch:
        kind = type(tiny_subject)
        patch.setattr(plus, "SUBJECTS", (tiny_subject, kind("digits", 10.0)))
        patch.setattr(plus, "OUTLIERS", (kind("digits", 30.0),))
        short = dict(list(plus.steps().items())[:1])
        for row in (plus.TOKEN_ROW, plus.PLUS_ROW):
            short[row] = plus.steps()[row]
        patch.setattr(plus, "steps", lambda: short)
        return plus.run(lab)


def test_each_step_adds_something_up_to_the_presets():
    rows = plus.steps()
    names = list(rows)
    assert rows[plus.PAPER] == QuantizationConfig.preset("hqdit") and names[0] == plus.PAPER
    assert rows[plus.TOKEN_ROW] == QuantizationConfig.preset("hqdit-plus-token")
    assert rows[plus.PLUS_ROW] == QuantizationConfig.preset("hqdit-plus")
    assert len({str(config.to_json()) for config in rows.values()}) == len(rows)
    base, token = rows[plus.PAPER].to_json(), rows[plus.TOKEN_ROW].to_json()
    before: set[tuple[str, str]] = set()
    for name in names[1 : names.index(plus.TOKEN_ROW)]:
        found = rows[name].to_json()
        # Static means come a step before means of samples.
        differing = {(key, str(found[key])) for key in found if found[key] != base.get(key)}
        assert differing != before and {key for key, _ in differing} >= {key for key, _ in before}
        assert all(found[key] == token[key] or (key, value) == ("centring", "static") for key, value in differing)
        before = differing


def test_the_record(record, lab, tiny_subject):
    assert run_record_from_json(record.to_json(), "here").tables == record.tables
    step_by_step = record.tables[0]
    by_row = {row[0]: row for row in step_by_step.rows}
    titles = [column.title for column in step_by_step.columns]
    score, paper = (lab.score(tiny_subject, plus.steps()[row]) for row in (plus.PLUS_ROW, plus.PAPER))
    row = by_row[plus.PLUS_ROW]
    assert row[titles.index("Gain")] == eps_gain(score, paper, "guided 1.5")
    assert row[titles.index("Guided 1.5")] == Interval(*score["eps_sqnr_db"]["guided 1.5"])
    assert row[titles.index("Bits per weight")] == score["bits_per_weight"]
    assert by_row["float32"][titles.index("Guided 4")] == math.inf
    steps = score["eps_sqnr_db_by_timestep"]["guided 1.5"]
    assert row[titles.index("Mean over steps")] == pytest.approx(sum(steps) / len(steps))
    outliers = next(table for table in record.tables if "outliers" in table.title)
    assert [row[1] for row in outliers.rows] == [1.0, 10.0, 30.0] and outliers.rows[0][3] == 0


def test_verdicts_say_what_the_numbers_say(record, lab, tiny_subject):
    gain = eps_gain(*(lab.score(tiny_subject, plus.steps()[row]) for row in (plus.PLUS_ROW, plus.PAPER)), "guided 1.5")
    (answer,) = [a for a in record.answers if a.startswith("hqdit-plus against hqdit on digits:")]
    assert f"{gain.value:+.2f} dB" in answer
    assert ("reached" in answer) == (gain.value >= 4) and ("missed" in answer) == (gain.value < 4)
