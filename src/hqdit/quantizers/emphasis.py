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
from dataclasses import dataclass

import torch
from torch import Tensor

#: The dtype in which B is stored.
EMPHASIS_DTYPE = torch.bfloat16
#: A direction is stretched by at most this.
LARGEST_STRETCH = 32.0
#: What all directions together have to gain to be worth a pass over the input, in dB.
LEAST_GAIN_DB = 0.5
#: A lower rank is taken where it loses at most this against the highest one, in dB.
RANK_TOLERANCE_DB = 0.25


@dataclass(frozen=True)
class Emphasis:
    """What was chosen for one input.

    Attributes:
        directions: B, bfloat16 (rank, in_features).
        gain_db: by how much the rounding error of the input is predicted to reach the output less, in dB.
    """

    directions: Tensor
    gain_db: float


def choose_emphasis(inputs: Tensor, gradients: Tensor, rank: int) -> Emphasis | None:
    """The directions of largest gradient, each with the stretch that pays best; None where little is to be gained.

    Args:
        inputs: x, floating point (tokens, in_features), centred as the layer will centre them.
        gradients: floating point (rows, in_features): rows whose Gram matrix is proportional to the second moment of
            the gradient of the model's output at this input.
        rank: the most directions.
    """
    x, g = inputs.to(torch.float64), gradients.to(torch.float64)
    power, sensitivity = float(x.square().sum()), float(g.square().sum())
    if not power > 0 or not sensitivity > 0:
        return None
    _, _, right = torch.linalg.svd(g, full_matrices=False)
    basis = right[:rank]
    along_x = (x @ basis.T).square().sum(dim=0)
    along_g = (g @ basis.T).square().sum(dim=0)
    gains = [_gain_db(power, sensitivity, along_x[:r], along_g[:r]) for r in range(1, len(basis) + 1)]
    if max(gains) < LEAST_GAIN_DB:
        return None
    chosen = next(r for r, gain in enumerate(gains, start=1) if gain >= max(gains) - RANK_TOLERANCE_DB)
    stretch = _stretch(power, sensitivity, along_x[:chosen], along_g[:chosen])
    directions = (stretch - 1).sqrt().unsqueeze(1) * basis[:chosen]
    return Emphasis(directions.to(EMPHASIS_DTYPE), gains[chosen - 1])


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


def _stretch(power: float, sensitivity: float, along_x: Tensor, along_g: Tensor) -> Tensor:
    rest_x = max(power - float(along_x.sum()), power * 1e-6)
    # A gradient that lies in a few directions altogether would ask for an infinite stretch of them.
    rest_g = max(sensitivity - float(along_g.sum()), sensitivity * 1e-3)
    wanted: Tensor = (rest_x / along_x.clamp_min(power * 1e-12)) * (along_g / rest_g)
    return wanted.pow(0.25).clamp(1.0, LARGEST_STRETCH)


def _gain_db(power: float, sensitivity: float, along_x: Tensor, along_g: Tensor) -> float:
    stretch = _stretch(power, sensitivity, along_x, along_g)
    new_power = power + float(((stretch.square() - 1) * along_x).sum())
    new_sensitivity = sensitivity - float(((1 - stretch.pow(-2)) * along_g).sum())
    return 10 * math.log10(power * sensitivity / (new_power * new_sensitivity))
