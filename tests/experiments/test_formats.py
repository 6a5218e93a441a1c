"""`formats`: how often the rule is right, by hand and by brute force, and the record."""

from __future__ import annotations

import pytest
import torch

from hqdit.experiments import formats
from hqdit.experiments.formats import (
    FIXED,
    PER_CHANNEL,
    PER_LAYER,
    channel_picks,
    configurations,
    rounding_errors,
    rule_against_best,
)
from hqdit.experiments.image_scores import FLOAT32
from hqdit.experiments.noise_floor import FLOOR
from hqdit.quantizers.format_selection import range_statistic

LEVELS = {"e3m0": [0, 1, 2, 4, 8, 16, 32, 64], "e2m1": [0, 1, 2, 3, 4, 6, 8, 12], "e1m2": list(range(8))}


def brute_force_error(row, magnitudes):
    """Squared error with an absmax scale, by distance to every level."""
    scale = row.abs().max() / magnitudes[-1]
    grid = torch.tensor(sorted({sign * level for level in magnitudes for sign in (-1, 1)}), dtype=torch.float64) * scale
    return float(((row.unsqueeze(1) - grid).abs().min(dim=1).values ** 2).sum())


def test_rounding_errors_against_brute_force():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[3] = weight[3] ** 5  # heavy tails
    found = rounding_errors(weight)
    assert found.shape == (6, 3)
    for row, errors in zip(weight, found, strict=True):
        expected = [brute_force_error(row, LEVELS[name]) for name in ("e3m0", "e2m1", "e1m2")]
        # Scales and levels are float32: each of 40 errors moves by at most a few 2^-24 of the weight.
        assert errors.tolist() == pytest.approx(expected, rel=1e-4)


def test_rule_against_best_by_hand():
    def scored(**by_layer):
        return {"layer_sqnr_db": by_layer, "formats": {}}

    by_format = {
        PER_LAYER: {"formats": {"x": {"e2m1": 1.0}, "y": {"e3m0": 1.0}}},
        "e3m0": scored(x=10.0, y=12.0),
        "e2m1": scored(x=15.0, y=14.0),
        "e1m2": scored(x=14.0, y=16.5),
        "int4": scored(x=99.0, y=99.0),  # not one that the rule can choose
    }
    assert rule_against_best(by_format) == {"x": 0.0, "y": 4.5}


def test_channel_picks_by_brute_force(tiny_subject):
    found = channel_picks(tiny_subject, "none", 0)
    hits = channels = 0
    picked = least = 0.0
    borders = [(9.165151389911680, "e1m2"), (27.712812921102035, "e2m1"), (float("inf"), "e3m0")]
    for name, module in tiny_subject.model.named_modules():
        inside = name.startswith("transformer_blocks") and ".emb." not in name
        if not (inside and isinstance(module, torch.nn.Linear)):
            continue
        weight = module.weight.detach().double()
        for row, statistic in zip(weight, range_statistic(weight, 0.25), strict=True):
            errors = {fmt: brute_force_error(row, magnitudes) for fmt, magnitudes in LEVELS.items()}
            chosen = next(fmt for border, fmt in borders if statistic <= border)
            hits += errors[chosen] == min(errors.values())
            channels += 1
            picked += errors[chosen]
            least += min(errors.values())
    assert found["hit_share"] == pytest.approx(hits / channels, abs=2 / channels)
    assert found["regret_db"] == pytest.approx(float(10 * torch.log10(torch.tensor(picked / least))), abs=1e-3)


def test_all_configurations_round_to_nearest_and_differ_in_formats_only():
    for rotation in ("full", "none"):
        found = configurations(rotation)
        assert list(found) == [PER_LAYER, PER_CHANNEL, *FIXED]
        assert len({config.replace(weights="fp4", format_granularity="layer") for config in found.values()}) == 1
        assert all(not config.gptq and config.rotation == rotation for config in found.values())


def test_the_record(lab, tiny_subject, monkeypatch, require_whole):
    monkeypatch.setattr(formats, "SUBJECTS", (tiny_subject,))
    record = formats.run(lab)
    require_whole(record, "formats")
    table, picks = record.tables
    assert [row[1] for row in table.rows[:2]] == [FLOAT32, FLOOR]
    methods = table.rows[2:]
    assert [(row[0], row[1]) for row in methods] == [
        (word, name) for word in ("rotated", "not rotated") for name in (PER_LAYER, PER_CHANNEL, *FIXED)
    ]
    for row in methods:
        shares = row[5:]
        assert sum(shares) == pytest.approx(1.0)
        if row[1] in FIXED:
            assert shares[FIXED.index(row[1])] == 1.0
        assert (row[4] is None) == (row[1] == PER_LAYER)
    for rotated in (methods[:6], methods[6:]):
        by_name = {row[1]: row for row in rotated}
        assert by_name["int4"][2:5] == by_name["e1m2"][2:5]  # the same numbers, -8 is never reached
    for row in picks.rows:
        assert 0 <= row[3] <= row[2] and 0 <= row[4] <= row[5] and 0 <= row[6] <= 1 and row[7] >= 0
