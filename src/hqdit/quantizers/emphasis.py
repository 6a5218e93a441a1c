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
#: Rank is worth its cost while it takes at least this share from the predicted error of the whole model.
LEAST_SHARE = 0.005


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
        gradients: floating point (rows, in_features): rows whose Gram matrix is proportional to the second moment of
            the gradient of the model's output at this input, with one constant for the whole model.
        rank: the most directions.

    Attributes:
        errors: float64 (rank + 1,), what is predicted to reach the output with 0, 1, ... directions; comparable between
            inputs of one model.
    """

    def __init__(self, inputs: Tensor, gradients: Tensor, rank: int) -> None:
        x, g = inputs.to(torch.float64), gradients.to(torch.float64)
        self._power: float = float(x.square().sum(dim=1).mean()) if len(x) else 0.0
        self._sensitivity: float = float(g.square().sum())
        self._basis: Tensor = torch.linalg.svd(g, full_matrices=False)[2][:rank]
        self._along_x: Tensor = (x @ self._basis.T).square().mean(dim=0) if len(x) else torch.zeros(len(self._basis))
        self._along_g: Tensor = (g @ self._basis.T).square().sum(dim=0)
        self.errors = torch.tensor([self._error(r) for r in range(len(self._basis) + 1)], dtype=torch.float64)

    def directions(self, rank: int) -> Tensor:
        """B for the first `rank` directions, bfloat16 (rank, in_features)."""
        found: Tensor = (self._stretch(rank) - 1).sqrt().unsqueeze(1) * self._basis[:rank]
        return found.to(EMPHASIS_DTYPE)

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


def choose_emphases(candidates: Mapping[str, EmphasisCandidates]) -> dict[str, Emphasis]:
    """For every input the lowest rank that leaves hardly more of the whole model's error than the best one.

    Args:
        candidates: input -> its directions, for all inputs of one model.

    Returns:
        Input -> what was chosen, without the inputs that are left as they are.
    """
    total = math.fsum(float(found.errors[0]) for found in candidates.values())
    chosen = {}
    for name, found in candidates.items():
        best = float(found.errors.min())
        rank = next(r for r, error in enumerate(found.errors.tolist()) if error - best <= LEAST_SHARE * total)
        if rank:
            before, after = float(found.errors[0]), float(found.errors[rank])
            chosen[name] = Emphasis(found.directions(rank), before / total, 10 * math.log10(before / after))
    return chosen


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
