"""Starting noise: a function of seed, purpose and sample number, and of nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqdit.sampling.noise import CALIBRATION, EVALUATION, SAMPLE, starting_noise

SHAPE = (2, 3, 4)
PURPOSES = (SAMPLE, CALIBRATION, EVALUATION)
seeds = st.integers(0, 2**63)
each_purpose = pytest.mark.parametrize("purpose", PURPOSES)


@each_purpose
@given(seed=seeds, indices=st.lists(st.integers(0, 10**9), min_size=1, max_size=8), data=st.data())
def test_batches_do_not_matter(purpose: str, seed: int, indices: list[int], data: st.DataObject) -> None:
    whole = starting_noise(seed, purpose, indices, SHAPE)
    assert whole.dtype == torch.float32 and whole.shape == (len(indices), *SHAPE)
    cut = data.draw(st.integers(0, len(indices)))
    split = [starting_noise(seed, purpose, part, SHAPE) for part in (indices[:cut], indices[cut:])]
    assert torch.equal(torch.cat(split), whole)
    order = data.draw(st.permutations(range(len(indices))))
    shuffled = starting_noise(seed, purpose, [indices[i] for i in order], SHAPE)
    assert torch.equal(shuffled, whole[list(order)])


def test_seeds_purposes_and_numbers_are_disjoint() -> None:
    rows: set[tuple[float, ...]] = set()
    numbers: set[float] = set()
    cells = list(itertools.product(range(4), PURPOSES, range(8)))
    for seed, purpose, index in cells:
        row = tuple(starting_noise(seed, purpose, [index], SHAPE).flatten().tolist())
        rows.add(row)
        numbers |= set(row)
    assert len(rows) == len(cells)
    # Streams that overlapped, shifted, would share numbers. Of 2304 numbers with 24-bit mantissas a few may coincide:
    # about n^2 / 2 / 2^24 = 0.16 pairs are expected, and more than 5 have a probability below 1e-6.
    assert len(numbers) >= len(cells) * math.prod(SHAPE) - 5


def test_a_large_seed_is_not_truncated() -> None:
    assert not torch.equal(starting_noise(0, SAMPLE, [0], SHAPE), starting_noise(2**64, SAMPLE, [0], SHAPE))


@each_purpose
def test_standard_normal(purpose: str) -> None:
    noise = starting_noise(0, purpose, range(64), (1, 64, 64)).double()
    n = noise.numel()
    # Standard errors of mean, variance and fourth moment of n normal numbers; 5 of them is a chance of 6e-7.
    assert abs(float(noise.mean())) < 5 / math.sqrt(n)
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float(noise.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)
    # Neighbouring samples are uncorrelated.
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 5 / math.sqrt(n - 64 * 64)


def test_no_samples() -> None:
    empty = starting_noise(0, SAMPLE, [], SHAPE)
    assert empty.shape == (0, *SHAPE) and empty.dtype == torch.float32
