"""How a tiny model and a call of it are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from hqdit.models.calls import ModelCall

BATCH, TEXT, TEXT_WIDTH = 2, 5, 20

#: Width 24 = 2 * 12.
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12}
#: Latents of 4 channels.
CHANNELS: dict[str, Any] = {"in_channels": 4, "out_channels": 4}


@dataclass(frozen=True)
class TinyTransformer:
    """How to make one model and one call of it.

    Attributes:
        class_name: a class of `diffusers`.
        config: its arguments.
        arguments: keyword arguments of its forward pass, from a source of random numbers.
    """

    class_name: str
    config: dict[str, Any]
    arguments: Callable[[Noise], dict[str, Any]]

    def model(self, seed: int = 0) -> nn.Module:
        """The model, float32 and in evaluation mode.

        Every parameter is random, also those that its class sets to zero or one, so that no contribution vanishes.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = getattr(diffusers, self.class_name)(**self.config)
        noise = Noise(seed)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
                parameter.copy_(noise(*parameter.shape) / fan_in**0.5)
            for module in model.modules():
                if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor):
                    module.weight += 1
        return model.eval()

    def call(self, seed: int = 1) -> ModelCall:
        """A call of the model."""
        return ModelCall((), self.arguments(Noise(seed)))


class Noise:
    """Normal numbers of any shape, from a seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def timesteps(self, largest: float = 1000) -> Tensor:
        """Numbers between 0 and `largest`, (BATCH,)."""
        return torch.rand(BATCH, generator=self._generator) * largest

    def text(self, width: int = TEXT_WIDTH) -> Tensor:
        """Embeddings (BATCH, TEXT, width)."""
        return self(BATCH, TEXT, width)


def mask() -> Tensor:
    """Which tokens of the texts there are, (BATCH, TEXT)."""
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def positions(tokens: int, axes: int) -> Tensor:
    """Positions (tokens, axes) of tokens that lie in a row."""
    found = torch.zeros(tokens, axes)
    found[:, -1] = torch.arange(tokens)
    return found
