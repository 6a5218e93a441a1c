"""What hqdit needs to know of an architecture: roles and names, no quantization logic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hqdit.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of a repeated block.

    Attributes:
        name: dotted module name in the model.
        role: what it computes: q, k, v, attention-out, fc1, fc2 or modulation.
        block: index of its block.
        stage: order within the block; a stage's inputs depend on earlier stages only.
        input_group: name shared by the sites that read the same input.
        head_dim: size of an attention head for the attention output, else None.
        value_site: name of the value projection whose output becomes this site's input, else None.
    """

    name: str
    role: str
    block: int
    stage: int
    input_group: str
    head_dim: int | None = None
    value_site: str | None = None

    @property
    def is_modulation(self) -> bool:
        """Whether the layer sees one vector per sample instead of one per token."""
        return self.role == "modulation"


class ModelAdapter(ABC):
    """The face of one model class. Adapters are stateless; every method gets the model."""

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter describes `model`."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks in order."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[LinearSite]:
        """Every linear layer that can be quantized, in the order of the forward pass."""

    @abstractmethod
    def kept_layers(self, model: nn.Module) -> dict[str, str]:
        """Name -> reason for every linear layer that is not a site."""

    @abstractmethod
    def block_input(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states and further arguments of the first block."""

    @abstractmethod
    def modulation_input(self, model: nn.Module, block: int, timesteps: Tensor, classes: Tensor) -> Tensor:
        """Input of a block's modulation layer: (samples, width)."""

    @abstractmethod
    def predict_noise(self, model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        """Predicted noise, shape of `latents`: a learned variance, if the model has one, is dropped."""

    def predict_noise_and_variance(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predicted noise, and where the variance lies between its bounds: -1 to 1; both of the shape of `latents`.

        Raises:
            UsageError: the model has no learned variance.
        """
        raise UsageError(
            f"--sampler: found ddpm-original for a model without a learned variance ({type(model).__name__}), needed "
            "one whose output has twice the channels of its input. Fix: use --sampler scheduler"
        )

    @abstractmethod
    def latent_shape(self, model: nn.Module) -> tuple[int, int, int]:
        """(channels, height, width) of one sample."""

    @abstractmethod
    def num_classes(self, model: nn.Module) -> int:
        """Number of classes, without the null class."""

    @abstractmethod
    def null_class(self, model: nn.Module) -> int | None:
        """The class that stands for "no class", or None if the model was not built with one."""

    @abstractmethod
    def train_timesteps(self, model: nn.Module) -> int:
        """Number of time steps that the model was trained on; its time steps are 0 .. this - 1."""

    @abstractmethod
    def fuse(self, model: nn.Module) -> None:
        """Let blocks that are quantized throughout run as fused operations, and q, k, v quantize their input once.

        The modules, their names and the state dict stay.
        """

    @abstractmethod
    def scale_modulated_channels(self, model: nn.Module, factors: Mapping[str, Tensor]) -> None:
        """Multiply channels of the modulated inputs and divide the weights that read them; the function stays.

        Args:
            model: changed in place.
            factors: input group -> positive factors (width,), for the groups of `modulated_groups`.
        """

    @abstractmethod
    def modulated_groups(self, model: nn.Module) -> list[str]:
        """Input groups that are outputs of a modulated normalisation."""


_ADAPTERS: list[ModelAdapter] = []


def register_adapter(adapter: ModelAdapter) -> None:
    """Make `adapter` known; later ones are asked first."""
    _ADAPTERS.insert(0, adapter)


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter that describes `model`.

    Raises:
        CheckpointError: none does.
    """
    import hqdit.models.dit  # noqa: F401  # registers itself

    for adapter in _ADAPTERS:
        if adapter.matches(model):
            return adapter
    raise CheckpointError(
        f"model: found class {type(model).__name__}, needed DiTTransformer2DModel, the only architecture with an "
        "adapter so far. Fix: write an adapter (CONTRIBUTING.md says how)"
    )
