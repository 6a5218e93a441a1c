"""LLM-FP4's search: formats and real-valued exponent biases that keep a layer's output, weight and input together.

A floating point number with a real exponent bias b is a level times 2^(1 - M - b), so that a bias is another word for
a scale. The search follows the paper: every pair of formats, one bias per output channel and one per input tensor,
candidates that are fractions of the min-max bias, and alternation between the two sides, judged by the squared error of
the layer's output. Fractions of the *bias*, not of the scale: their steps depend on the unit, as published.

Channels of the input differ by powers of two before that ("pre-shifted exponent bias"): the powers move into the
weight, which is exact.

Source: LLM-FP4 (arXiv 2310.16836), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hqdit.errors import NumericsError
from hqdit.formats.number_format import FloatFormat
from hqdit.numerics.rounding import nearest_levels
from hqdit.quantizers.scaling import MIN_SCALE, absmax_scale

#: Candidates as fractions of the min-max bias.
BIAS_FRACTIONS = tuple(0.01 + (1.2 - 0.01) * step / 99 for step in range(100))
#: Alternations between weight and input.
ROUNDS = 3
#: Largest exponent of a channel's shift: what three bits hold.
MAX_SHIFT = 7


@dataclass(frozen=True)
class SearchResult:
    """What the search found for one input and the weights that read it.

    Attributes:
        weight_format: of every output channel.
        activation_format: of the input.
        weight_scale: float32 (out_features,), of the shifted weight.
        activation_scale: float32 (), of the shifted input.
        error: squared error of the output over the tokens, relative to the output's power.
    """

    weight_format: FloatFormat
    activation_format: FloatFormat
    weight_scale: Tensor
    activation_scale: Tensor
    error: float


def channel_shifts(absmax: Tensor) -> Tensor:
    """Powers of two 2^e_j that bring every channel's range within a factor of two of the widest, e_j at most 7.

    Rounded down, so that no shifted channel is wider than the widest one. A silent channel is not shifted.

    Args:
        absmax: floating point (in_features,), the largest magnitude of every channel over calibration data.

    Returns:
        float32 (in_features,), each a power of two from 1 to 2^`MAX_SHIFT`.
    """
    largest = absmax.to(torch.float64)
    shift = torch.log2(largest.max() / largest).floor().clamp(0, MAX_SHIFT)
    return torch.where(largest > 0, torch.exp2(shift), 1.0).to(torch.float32)


def candidate_scales(widest: Tensor, fmt: FloatFormat) -> Tensor:
    """The scales of the biases g * b, g in `BIAS_FRACTIONS`, after the min-max scale itself.

    Args:
        widest: float32 (n,), scales that map the largest magnitude to the largest level.
        fmt: with M mantissa bits; b = 1 - M - log2(scale).

    Returns:
        float32 (1 + fractions, n), at least `MIN_SCALE`.
    """
    first_exponent = 1 - fmt.mantissa_bits
    bias = first_exponent - torch.log2(widest.to(torch.float64))
    fractions = torch.tensor(BIAS_FRACTIONS, dtype=torch.float64, device=widest.device)
    scales = torch.exp2(first_exponent - fractions.unsqueeze(1) * bias).to(torch.float32)
    return torch.cat([widest.unsqueeze(0), scales]).clamp_min(MIN_SCALE)


def search_exponents(
    x: Tensor, weight: Tensor, weight_formats: Sequence[FloatFormat], activation_formats: Sequence[FloatFormat]
) -> SearchResult:
    """Formats and scales of least squared output error that alternating search finds from the min-max scales.

    Within a round the weight's scales are searched against the quantized input, channel by channel, then the input's
    against the quantized weight. The scale in use stays unless a candidate is better, so that the error never grows;
    the result is not worse than min-max in any of the formats.

    Args:
        x: float32 (tokens, in_features), shifted.
        weight: float32 (out_features, in_features), shifted the other way.
        weight_formats: candidates.
        activation_formats: candidates.

    Raises:
        NumericsError: NaN or infinity in either.
    """
    if not bool(torch.isfinite(x).all() and torch.isfinite(weight).all()):
        raise NumericsError(
            "exponent search: found NaN or infinity in calibration inputs or weights, needed finite numbers. "
            "Fix: check the calibration data and the float model"
        )
    weights = {fmt: _Side(weight, absmax_scale(weight, fmt), fmt) for fmt in weight_formats}
    inputs = {fmt: _Side(x, absmax_scale(x.reshape(1, -1), fmt), fmt) for fmt in activation_formats}
    pairs = [_Pair(x, weight, w, a) for w in weights.values() for a in inputs.values()]
    for _ in range(ROUNDS):
        before = [pair.error for pair in pairs]
        for side in weights.values():
            _search_weight(side, [pair for pair in pairs if pair.weight is side])
        for side in inputs.values():
            _search_input(side, [pair for pair in pairs if pair.input is side])
        if [pair.error for pair in pairs] == before:
            break
    best = min(pairs, key=lambda pair: pair.error)
    power = float((x @ weight.T).to(torch.float64).square().sum())
    return SearchResult(
        best.weight.format,
        best.input.format,
        best.weight_scale,
        best.input_scale.reshape(()),
        best.error / power if power > 0 else 0.0,
    )


class _Side:
    """One operand in one format, with its candidates."""

    def __init__(self, numbers: Tensor, widest: Tensor, fmt: FloatFormat) -> None:
        self.numbers = numbers
        self.format = fmt
        self.candidates = candidate_scales(widest, fmt)

    def quantized(self, scale: Tensor) -> Tensor:
        """The rounded numbers, float32; `scale` is (rows,) or (1,)."""
        unit = scale.unsqueeze(1)
        return nearest_levels(self.numbers / unit, self.format).to(torch.float32) * unit


class _Pair:
    """The state of the search for one pair of formats."""

    def __init__(self, x: Tensor, weight: Tensor, weight_side: _Side, input_side: _Side) -> None:
        self.weight, self.input = weight_side, input_side
        self.weight_scale, self.input_scale = weight_side.candidates[0], input_side.candidates[0]
        self.exact = x @ weight.T  # (tokens, out_features)
        rounded = input_side.quantized(self.input_scale) @ weight_side.quantized(self.weight_scale).T
        self.error = float((self.exact - rounded).to(torch.float64).square().sum())


class _Problem:
    """|target - design m|^2 column by column, for many m: (n, columns).

    Where `design` has more rows than columns it is replaced by its triangular factor, which has the same Gram matrix:
    what `target` has outside the span of `design` is a constant that no m can change.
    """

    def __init__(self, design: Tensor, target: Tensor) -> None:
        self.design, self.target = design, target.contiguous()
        self.constant = torch.zeros(target.shape[1], dtype=torch.float64, device=target.device)
        if design.shape[0] > design.shape[1]:
            orthogonal, self.design = torch.linalg.qr(design)
            self.target = orthogonal.T @ target
            self.constant = (target - orthogonal @ self.target).to(torch.float64).square().sum(dim=0)

    def errors(self, m: Tensor) -> Tensor:
        """Float64 (columns,)."""
        residual = torch.addmm(self.target, self.design, m, alpha=-1)
        return self.constant + residual.square_().sum(dim=0)


def _search_weight(side: _Side, pairs: list[_Pair]) -> None:
    """The best candidate of every output channel against each pair's quantized input."""
    problems = [_Problem(pair.input.quantized(pair.input_scale), pair.exact) for pair in pairs]
    scales = [pair.weight_scale for pair in pairs]
    errors = [problem.errors(side.quantized(scale).T) for problem, scale in zip(problems, scales, strict=True)]
    for candidate in side.candidates:
        rounded = side.quantized(candidate).T
        for position, problem in enumerate(problems):
            found = problem.errors(rounded)
            is_better = found < errors[position]
            errors[position] = torch.where(is_better, found, errors[position])
            scales[position] = torch.where(is_better, candidate, scales[position])
    for pair, scale, error in zip(pairs, scales, errors, strict=True):
        pair.weight_scale, pair.error = scale, float(error.sum())


def _search_input(side: _Side, pairs: list[_Pair]) -> None:
    """The best candidate of the input against each pair's quantized weight."""
    problems = [_Problem(pair.weight.quantized(pair.weight_scale), pair.exact.T) for pair in pairs]
    for pair, problem in zip(pairs, problems, strict=True):
        pair.error = float(problem.errors(side.quantized(pair.input_scale).T).sum())
    for candidate in side.candidates:
        rounded = side.quantized(candidate).T
        for pair, problem in zip(pairs, problems, strict=True):
            error = float(problem.errors(rounded).sum())
            if error < pair.error:
                pair.input_scale, pair.error = candidate, error
