"""Directions of an input in which the model's output is most sensitive, and how far to emphasise them.

A rotation spreads the rounding error of an input evenly over all directions. Where the model's output depends on a few
of them far more than on the rest, most of the final error comes from these few. With T = I + B^T B, x' = x T and
W' = W T^-1 the product stays, x' W'^T = x W^T, while errors along the rows of B shrink.

With A the power of x and G the power of the gradient of the model's output, rounding adds about
D tr(T A T) tr(T^-1 G T^-1) / K to the error of the output, D being the format's relative error. Along a direction u
with powers a and g, against A_0 and G_0 of everything outside the chosen directions, the least is reached where T
stretches u by c with c^4 = (A_0 / a) (g / G_0) (Cauchy and Schwarz).

Source: docs/method.md, "Sensitive directions". Related: concentration and alignment, CAT (arXiv 2603.04359).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: The dtype in which B is stored.
EMPHASIS_DTYPE = torch.bfloat16
#: A direction is stretched by at most this.
LARGEST_STRETCH = 32.0
#: Directions are worth their time while they take at least this share from the predicted error of the whole model.
LEAST_SHARE = 0.005
#: What a bit more for every weight would take from the error: numbers of b bits have errors of power 4^-b, and the
#: derivative of its logarithm is this. Bits that go into directions have to take as much.
SHARE_PER_BIT = 2 * math.log(2)


@dataclass(frozen=True)
class Emphasis:
    """What was chosen for one input.

    Attributes:
        directions: B, bfloat16 (rank, in_features).
        share: of the model's predicted error that reaches the output through this input, before.
        gain_db: by how much that part is predicted to fall, in dB.
    """

    directions: Tensor
    share: float
    gain_db: float


class EmphasisCandidates:
    """The directions of one input, by falling gradient, and what emphasising them would leave of its error.

    Args:
        inputs: x, floating point (tokens, in_features), as they come before the rotation.
        gradients: floating point (rows, in_features), at least two: rows whose Gram matrix is proportional to the
            second moment of the gradient of the model's output at this input, with one constant for the whole model;
            the odd rows and the even ones come from different tokens.
        rank: the most directions.
        readers: how many layers read the input, each of which stores its directions.

    Attributes:
        errors: float64 (rank + 1,), what is predicted to reach the output with 0, 1, ... directions; comparable between
            inputs of one model.
    """

    def __init__(self, inputs: Tensor, gradients: Tensor, rank: int, readers: int = 1) -> None:
        x, g = inputs.to(torch.float64), gradients.to(torch.float64)
        self._readers = readers
        self._power: float = float(x.square().sum(dim=1).mean()) if len(x) else 0.0
        self._sensitivity: float = float(g.square().sum())
        self._along_g: Tensor = _held_out_powers(g, rank)
        self._basis: Tensor = torch.linalg.svd(g, full_matrices=False)[2][: len(self._along_g)]
        self._along_x: Tensor = (x @ self._basis.T).square().mean(dim=0) if len(x) else torch.zeros(len(self._basis))
        self.errors = torch.tensor([self._error(r) for r in range(len(self._basis) + 1)], dtype=torch.float64)

    @property
    def direction_bits(self) -> int:
        """What one direction takes in the checkpoint."""
        return self._readers * self._basis.shape[1] * EMPHASIS_DTYPE.itemsize * 8

    def directions(self, rank: int) -> Tensor:
        """B for the first `rank` directions, bfloat16 (rank, in_features)."""
        found: Tensor = (self._stretch(rank) - 1).sqrt().unsqueeze(1) * self._basis[:rank]
        return found.to(EMPHASIS_DTYPE).contiguous()

    def _stretch(self, rank: int) -> Tensor:
        along_x, along_g = self._along_x[:rank], self._along_g[:rank]
        rest_x = max(self._power - float(along_x.sum()), self._power * 1e-6)
        # A gradient that lies in a few directions altogether would ask for an infinite stretch of them.
        rest_g = max(self._sensitivity - float(along_g.sum()), self._sensitivity * 1e-3)
        wanted: Tensor = (rest_x / along_x.clamp_min(self._power * 1e-12)) * (along_g / rest_g)
        return wanted.pow(0.25).clamp(1.0, LARGEST_STRETCH)

    def _error(self, rank: int) -> float:
        if not self._power > 0 or not self._sensitivity > 0:
            return 0.0
        squares = self._stretch(rank).square()
        power = self._power + float(((squares - 1) * self._along_x[:rank]).sum())
        sensitivity = self._sensitivity - float(((1 - 1 / squares) * self._along_g[:rank]).sum())
        return float(power * sensitivity / self._basis.shape[1])


def _held_out_powers(gradients: Tensor, rank: int) -> Tensor:
    """The power of the gradients along the first directions that other gradients of the same input give, (rank,).

    Along the directions that fit a few rows best, these rows have more power than others, even if no direction is
    special: the largest of n singular values of a random (m, n) matrix is 1 + sqrt(n / m) times the common one.
    """
    halves = gradients[0::2], gradients[1::2]
    rank = min(rank, len(halves[1]))
    bases = [torch.linalg.svd(half, full_matrices=False)[2][:rank] for half in halves]
    found = [(other @ basis.T).square().sum(dim=0) for other, basis in zip(reversed(halves), bases, strict=True)]
    powers: Tensor = found[0] + found[1]
    return powers


def choose_emphases(candidates: Mapping[str, EmphasisCandidates], weights: int) -> dict[str, Emphasis]:
    """For every input the rank that pays best: the share of the whole model's error that it takes, less its price.

    Args:
        candidates: input -> its directions, for all inputs of one model.
        weights: how many numbers the weights of the model's quantized layers have.

    Returns:
        Input -> what was chosen, without the inputs that are left as they are.
    """
    # What is left with the best of everything: the less that is, the more a share of it matters.
    total = math.fsum(float(found.errors.min()) for found in candidates.values())
    before_all = math.fsum(float(found.errors[0]) for found in candidates.values())
    chosen = {}
    for name, found in candidates.items():
        price = SHARE_PER_BIT * found.direction_bits / weights
        costs = [error + total * price * rank for rank, error in enumerate(found.errors.tolist())]
        best = min(costs)
        rank = next(r for r, cost in enumerate(costs) if cost - best <= LEAST_SHARE * total)
        if rank:
            before, after = float(found.errors[0]), float(found.errors[rank])
            chosen[name] = Emphasis(found.directions(rank), before / before_all, 10 * math.log10(before / after))
    return chosen


def predicted_errors(candidates: Mapping[str, EmphasisCandidates], chosen: Mapping[str, Emphasis]) -> dict[str, float]:
    """Input -> the error that is predicted to reach the model's output with what was chosen, up to one constant."""
    return {
        name: float(found.errors[len(chosen[name].directions) if name in chosen else 0])
        for name, found in candidates.items()
    }


def emphasise(x: Tensor, directions: Tensor) -> Tensor:
    """X T = x + (x B^T) B, in float32.

    Args:
        x: float32 (..., in_features).
        directions: B, (rank, in_features).
    """
    b = directions.to(torch.float32)
    return x + (x @ b.T) @ b


def deemphasise_weight(weight: Tensor, directions: Tensor) -> Tensor:
    """W T^-1, float64: the weight that takes emphasised inputs.

    By the identity of Sherman, Morrison and Woodbury T^-1 = I - B^T (I + B B^T)^-1 B, exact for the stored B.

    Args:
        weight: (out_features, in_features).
        directions: B, (rank, in_features).
    """
    w, b = weight.to(torch.float64), directions.to(torch.float64)
    inner = torch.eye(len(b), dtype=torch.float64, device=b.device) + b @ b.T
    solved: Tensor = torch.linalg.solve(inner, (w @ b.T).T)
    return w - solved.T @ b
