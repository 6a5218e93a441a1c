"""The trained table against the conditions of Lloyd and Max, and against numbers integrated by somebody else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from hqdit.formats.catalog import format_from_json
from hqdit.formats.codebooks import LARGEST_LEVEL, gaussian_centroids, gaussian_error, lloyd_max


def both_halves(levels: tuple[float, ...]) -> np.ndarray:
    return np.array([-level for level in reversed(levels)] + list(levels))


def integrated_error(levels: np.ndarray) -> float:
    edges = [-np.inf, *((levels[1:] + levels[:-1]) / 2), np.inf]
    parts = [
        integrate.quad(lambda x, level=level: (x - level) ** 2 * stats.norm.pdf(x), a, b, epsabs=1e-12)[0]
        for level, a, b in zip(levels, edges, edges[1:], strict=False)
    ]
    return math.fsum(parts)


def test_every_centroid_is_the_mean_of_its_cell() -> None:
    levels = both_halves(gaussian_centroids())
    edges = [-np.inf, *((levels[1:] + levels[:-1]) / 2), np.inf]
    for level, a, b in zip(levels, edges, edges[1:], strict=False):
        assert level == pytest.approx(stats.truncnorm.mean(a, b), abs=1e-6)


def test_the_error_is_that_of_the_literature() -> None:
    # 20.22 dB for 16 levels, as textbooks on quantization give it.
    assert -10 * math.log10(gaussian_error(gaussian_centroids())) == pytest.approx(20.22, abs=0.01)


@pytest.mark.parametrize("levels", [gaussian_centroids(), tuple(0.13 * n for n in (1, 3, 5, 7, 9, 12, 16, 21)), (1.0,)])
def test_the_error_is_the_integral(levels: tuple[float, ...]) -> None:
    assert gaussian_error(levels) == pytest.approx(integrated_error(both_halves(levels)), rel=1e-8)


def best_over_scales(levels: np.ndarray) -> float:
    top = gaussian_centroids()[-1] / levels[-1]
    half = levels[levels > 0]
    return min(gaussian_error(tuple(half * (top * s))) for s in np.linspace(0.8, 1.2, 801))


@pytest.mark.parametrize("largest", [12, LARGEST_LEVEL, 40, 127])
def test_no_neighbouring_table_is_better(largest: int) -> None:
    table = np.array(lloyd_max(largest).table)
    assert table.tolist() == sorted(set(table.tolist())) and (table == -table[::-1]).all() and table[-1] == largest
    found = best_over_scales(table)
    for k in range(8, 15):
        for step in (-1, 1):
            moved = table.copy()
            moved[k] += step
            moved[15 - k] -= step
            if len(set(moved.tolist())) == 16 and (np.diff(moved) > 0).all():
                assert best_over_scales(moved) > found * (1 - 1e-3)


def test_small_levels_cost_little_and_keep_16_bit_sums() -> None:
    small, free = (best_over_scales(np.array(lloyd_max(top).table)) for top in (LARGEST_LEVEL, 127))
    assert 0 < 10 * math.log10(small / free) < 0.2
    assert 74 * LARGEST_LEVEL**2 <= 2**15 - 1 < 75 * LARGEST_LEVEL**2


def test_it_has_a_name_and_is_stored_as_a_table() -> None:
    fmt = format_from_json("lloyd-max")
    assert fmt == lloyd_max() and fmt.to_json() == list(lloyd_max().table)
    assert format_from_json(fmt.to_json()) == fmt
