"""The Inception Score of ADM's evaluation suite, from class probabilities, in float64.

With probabilities of another network than Inception-v3 the number must carry that extractor's name.

Source: Salimans et al. 2016 (arXiv 1606.03498), section 4, for the score; guided-diffusion's evaluation suite
(Dhariwal and Nichol 2021, arXiv 2105.05233) for the splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hqdit.errors import NumericsError, UsageError

#: Images per split. A score rises with the number of images in a split, so it is part of the definition.
SPLIT_SIZE = 5000

# Rows of float32 probabilities sum to 1 within about 1e-6; anything further off was never a distribution.
_SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class InceptionScore:
    """The score and how it was taken.

    Attributes:
        value: from 1 (every image alike) to the number of classes; higher is better.
        splits: over how many consecutive parts of the set the mean was taken; the last one may be shorter.
        count: images in all.
    """

    value: float
    splits: int
    count: int


def inception_score(probabilities: npt.ArrayLike, split_size: int = SPLIT_SIZE) -> InceptionScore:
    """Mean over consecutive splits of exp(mean KL(p(y|x) || p(y))), with 0 log 0 = 0.

    The order of the images matters where there is more than one split: it decides which images share one.

    Args:
        probabilities: (n, classes), n >= 1, each row a distribution.
        split_size: images per split, at least 1.

    Raises:
        UsageError: another shape, no rows, or a split size below 1.
        NumericsError: values that are not finite or negative, or rows that do not sum to 1.
    """
    rows = np.asarray(probabilities, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape or split_size < 1:
        raise UsageError(
            f"Inception Score: found probabilities of shape {rows.shape} and split size {split_size}, needed"
            " (n, classes) with n >= 1 and a size of at least 1. Fix: pass one row per image"
        )
    wrong = ~(np.isfinite(rows).all(axis=1) & (rows >= 0).all(axis=1))
    wrong |= ~(np.abs(rows.sum(axis=1) - 1) <= _SUM_TOLERANCE)
    if wrong.any():
        raise NumericsError(
            f"Inception Score: found {int(wrong.sum())} of {len(rows)} rows that are no distribution, needed values in"
            " [0, 1] that sum to 1. Fix: take the softmax of the logits"
        )
    scores = [_split_score(rows[start : start + split_size]) for start in range(0, len(rows), split_size)]
    return InceptionScore(float(np.mean(scores)), len(scores), len(rows))


def _split_score(part: npt.NDArray[np.float64]) -> float:
    marginal = part.mean(axis=0)
    # Where p is 0 its term is 0; where the marginal is 0 every p is.
    ratio = np.divide(part, marginal, out=np.ones_like(part), where=part > 0)
    return float(np.exp((part * np.log(ratio)).sum(axis=1).mean()))
