"""Emphasis keeps the product, and its prediction is what white noise does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hqdit.quantizers.emphasis import (
    LARGEST_STRETCH,
    LEAST_SHARE,
    EmphasisCandidates,
    choose_emphases,
    deemphasise_weight,
    emphasise,
    predicted_errors,
)

WIDTH = 24


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 6), size=st.floats(1e-3, 30.0))
def test_the_product_stays(seed: int, rank: int, size: float) -> None:
    directions = (normal(seed, rank, WIDTH) * size).to(torch.bfloat16)
    x, weight = normal(seed + 1, 5, WIDTH), normal(seed + 2, 7, WIDTH)
    # In float64, so that what is left is the inverse and not rounding.
    b = directions.to(torch.float64)
    stretched = x + (x @ b.T) @ b
    found = stretched @ deemphasise_weight(weight, directions).T
    condition = float(1 + (b @ b.T).diagonal().sum())
    assert torch.allclose(found, x @ weight.T, rtol=0, atol=1e-13 * condition * 100)
    assert torch.allclose(emphasise(x.float(), directions).double(), stretched, rtol=1e-4, atol=1e-4 * condition)


def sensitive(seed: int, strength: float, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Inputs, and gradients that are `strength` times larger along one direction, and half that along another."""
    x = normal(seed, 400, WIDTH) * torch.linspace(0.5, 2.0, WIDTH)
    basis = torch.linalg.qr(normal(seed + 1, WIDTH, 2))[0]
    g = normal(seed + 2, rows, WIDTH)
    return x, g + (g @ basis) * torch.tensor([strength - 1, strength / 2 - 1]) @ basis.T


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_prediction_is_what_white_noise_does(rank: int) -> None:
    x, g = sensitive(3, 20.0, rows=4000)
    found = EmphasisCandidates(x, g, rank)
    b = found.directions(rank).to(torch.float64)
    stretch = torch.eye(WIDTH, dtype=torch.float64) + b.T @ b

    def output_error(t: Tensor) -> float:
        # After a rotation the noise of x T is white, with the mean power of x T; what reaches the output is g T^-1.
        power = (x @ t).square().sum(dim=1).mean() / WIDTH
        return float(power * (g @ torch.linalg.inv(t)).square().sum())

    identity = torch.eye(WIDTH, dtype=torch.float64)
    assert float(found.errors[0]) == pytest.approx(output_error(identity), rel=1e-9)
    # bfloat16 keeps three digits of the stretch; the power along a direction is that of rows that did not choose it.
    assert float(found.errors[rank]) == pytest.approx(output_error(stretch), rel=0.03)
    other = torch.eye(WIDTH, dtype=torch.float64) + 1.3 * b.T @ b
    assert output_error(other) > 0.999 * output_error(stretch)


def test_the_directions_of_the_gradient_are_found_and_pay() -> None:
    x, g = sensitive(5, 30.0)
    errors = EmphasisCandidates(x, g, 8).errors
    assert 10 * math.log10(float(errors[0] / errors[2])) > 5
    assert 10 * math.log10(float(errors[2] / errors[8])) < 1  # the rest is as good as white


def test_rank_goes_where_the_error_of_the_model_comes_from() -> None:
    loud, quiet = sensitive(7, 30.0), sensitive(8, 30.0)
    candidates = {
        "loud": EmphasisCandidates(*loud, 8),
        "quiet": EmphasisCandidates(quiet[0], quiet[1] * 0.01, 8),
        "white": EmphasisCandidates(normal(9, 400, WIDTH), normal(10, 4000, WIDTH), 8),
    }
    chosen = choose_emphases(candidates, weights=10**9)
    assert list(chosen) == ["loud"] and 2 <= len(chosen["loud"].directions) <= 4
    total = math.fsum(float(found.errors[0]) for found in candidates.values())
    left = float(candidates["loud"].errors[len(chosen["loud"].directions)])
    best = math.fsum(float(found.errors.min()) for found in candidates.values())
    assert left - float(candidates["loud"].errors.min()) <= LEAST_SHARE * best * 1.001
    errors = predicted_errors(candidates, chosen)
    assert errors["loud"] == left and errors["white"] == float(candidates["white"].errors[0])
    assert chosen["loud"].share == pytest.approx(float(candidates["loud"].errors[0]) / total)


@pytest.mark.parametrize(
    "x, g", [(torch.zeros(4, WIDTH), normal(1, 4, WIDTH)), (normal(1, 4, WIDTH), torch.zeros(4, WIDTH))]
)
def test_silent_inputs_and_outputs_are_left_alone(x: Tensor, g: Tensor) -> None:
    found = EmphasisCandidates(x, g, 4)
    assert found.errors.tolist() == [0.0] * len(found.errors)
    assert choose_emphases({"a": found}, weights=100) == {}


@pytest.mark.parametrize("width", [24, 128])
def test_gradients_without_structure_promise_nothing(width: int) -> None:
    # 64 rows of a wide white gradient have directions with several times the common power, by chance.
    x, g = normal(11, 400, width), normal(12, 64, width)
    in_sample = torch.linalg.svdvals(g).square()
    assert float(in_sample[0] / in_sample.mean()) > 2
    errors = EmphasisCandidates(x, g, 8).errors
    assert float(errors.min() / errors[0]) > 0.98


def test_directions_have_to_pay_for_their_bits() -> None:
    x, g = sensitive(13, 6.0)
    candidates = {"a": EmphasisCandidates(x, g, 8)}
    ranks = {}
    for weights in (10**9, 2000, 500):
        chosen = choose_emphases(candidates, weights)
        ranks[weights] = len(chosen["a"].directions) if chosen else 0
    assert ranks[10**9] >= 2 > ranks[500] == 0
    # Each of several readers stores the directions.
    many = {"a": EmphasisCandidates(x, g, 8, readers=1000)}
    assert many["a"].direction_bits == 1000 * candidates["a"].direction_bits == 1000 * 16 * WIDTH
    assert not choose_emphases(many, 500_000) and choose_emphases(candidates, 500_000)


def test_a_gradient_in_one_direction_only_asks_for_a_finite_stretch() -> None:
    x, g = normal(1, 100, WIDTH), torch.zeros(3, WIDTH, dtype=torch.float64)
    g[:, 0] = 5.0
    b = EmphasisCandidates(x, g, 2).directions(1).to(torch.float64)
    assert 1 < float(1 + b.square().sum()) <= LARGEST_STRETCH * 1.01
