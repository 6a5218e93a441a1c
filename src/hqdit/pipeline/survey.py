"""A look at every input of the float model, once, before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from hqdit.calibration.capture import BlockStream, CalibrationData
from hqdit.kernels.activation import split_means
from hqdit.models.adapter import adapter_for
from hqdit.pipeline.plan import QuantizationPlan
from hqdit.randomness import random_stream

#: Tokens of an input that are kept.
SAMPLE_TOKENS = 256


@dataclass(frozen=True, eq=False)
class InputSurvey:
    """What calibration data says of one input of the float model.

    Attributes:
        absmax: the largest magnitude of every channel, float64 (in_features,).
        mean_square: mean of the squares, float64 (in_features,).
        mean: float64 (in_features,).
        sample: `SAMPLE_TOKENS` tokens, or all if there are fewer, drawn evenly: float32 (tokens, in_features).
        rest: what the mean over all tokens of its own sample (image) leaves of each of these, float32, same shape.
        has_samples: whether samples have several tokens; otherwise all tokens together count as one for these means.
    """

    absmax: Tensor
    mean_square: Tensor
    mean: Tensor
    sample: Tensor
    rest: Tensor
    has_samples: bool

    @property
    def rms(self) -> Tensor:
        """Root mean square of every channel, float64 (in_features,)."""
        return self.mean_square.sqrt()


class TokenSample:
    """An even sample of tokens that come batch after batch, whatever the batches are.

    Args:
        count: how many are kept.
        seed: of the choice.
        stream: name of the random stream.
    """

    def __init__(self, count: int, seed: int, stream: str) -> None:
        self._count = count
        self._random = random_stream(seed, stream)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._tokens: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Consider all rows of `x`, floating point (tokens, in_features)."""
        # Those with the smallest random keys are a sample without replacement.
        together = torch.cat([self._keys, torch.from_numpy(self._random.random(len(x)))])
        chosen = together.argsort(stable=True)[: self._count]
        # Few rows of a batch are chosen: only these are copied.
        known = chosen < len(self._keys)
        new = x[(chosen[~known] - len(self._keys)).to(x.device)]
        rows = x.new_empty(len(chosen), x.shape[1])
        rows[~known] = new
        if self._tokens is not None:
            rows[known] = self._tokens[chosen[known].to(x.device)]
        self._tokens, self._keys = rows, together[chosen]

    def tokens(self, in_features: int) -> Tensor:
        """What was chosen, (tokens, in_features)."""
        return torch.empty(0, in_features) if self._tokens is None else self._tokens


@torch.no_grad()
def survey_inputs(
    model: nn.Module, plan: QuantizationPlan, calibration: CalibrationData, seed: int
) -> dict[str, InputSurvey]:
    """Input group -> its survey, for every planned layer; the model is not changed.

    Args:
        model: float, in evaluation mode.
        plan: the layers that will be quantized.
        calibration: inputs of the float model.
        seed: of the samples.
    """
    stream = BlockStream(model, calibration, seed)
    surveys: dict[str, InputSurvey] = {}
    for block in range(len(adapter_for(model).blocks(model))):
        of_block = sorted((p for p in plan.layers if p.site.block == block), key=lambda p: p.site.stage)
        for group, layers in groupby(of_block, key=lambda p: p.site.input_group):
            first = next(layers)
            found = _Survey(first.in_features, next(model.parameters()).device, seed, group)
            stream.capture_samples(first.site, found.add, f"survey of {group}")
            surveys[group] = found.survey
        stream.advance(block)
    return surveys


class _Survey:
    """Running sums of one input."""

    def __init__(self, width: int, device: torch.device, seed: int, group: str) -> None:
        self._width = width
        self._absmax = torch.zeros(width, dtype=torch.float64, device=device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._sample = TokenSample(SAMPLE_TOKENS, seed, f"survey/{group}")
        self._has_samples = True
        self._count = 0

    def add(self, x: Tensor, samples: int | None) -> None:
        wide = x.to(torch.float64)
        torch.maximum(self._absmax, wide.abs().amax(dim=0), out=self._absmax)
        self._sum += wide.sum(dim=0)
        self._squares += wide.square().sum(dim=0)
        tokens = x.to(torch.float32)
        self._has_samples &= samples is not None
        _, rest = split_means(tokens, samples or 1)
        self._sample.add(torch.cat([tokens, rest], dim=1))
        self._count += len(x)

    @property
    def survey(self) -> InputSurvey:
        count = max(self._count, 1)
        sample, rest = self._sample.tokens(2 * self._width).chunk(2, dim=1)
        moments = self._absmax, self._squares / count, self._sum / count
        return InputSurvey(*moments, sample, rest, self._has_samples)
