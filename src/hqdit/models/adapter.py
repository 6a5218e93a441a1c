"""What hqdit needs to know of an architecture: roles and names, no quantization logic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

from hqdit.errors import CheckpointError
from hqdit.layers.linear import HQLinear
from hqdit.layers.matrix_layers import is_matrix_layer
from hqdit.layers.shared_input import share_input
from hqdit.models.calls import ModelCall


@dataclass(frozen=True)
class LinearSite:
    """One linear layer, or 1x1 convolution, of a repeated block.

    Attributes:
        name: dotted module name in the model.
        role: what it computes, one of `ROLES`.
        block: index of its block in `ModelAdapter.blocks`.
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


#: fc1 is the first layer of an MLP and gate the one whose activated output multiplies fc1's; fused-in and fused-out
#: are layers that compute several of these at once; other is a layer that no adapter has described.
ROLES = ("q", "k", "v", "attention-out", "fc1", "gate", "fc2", "fused-in", "fused-out", "modulation", "other")


class ModelAdapter(ABC):
    """The face of one or several model classes. Adapters are stateless; every method gets the model."""

    #: Whether blocks read outputs of blocks other than the one before them, as with long skip connections.
    has_long_skips = False

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter describes `model`."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks in the order in which they run."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[LinearSite]:
        """Every layer that can be quantized, in the order of the forward pass."""

    def kept_layers(self, model: nn.Module) -> dict[str, str]:
        """Name -> reason for every linear layer that is not a site."""
        sites = {site.name for site in self.sites(model)}
        inside = {name for block in self.blocks(model) for name in _names_below(model, block)}
        return {
            name: "embedder or unknown layer inside a block" if name in inside else "outside the repeated blocks"
            for name, module in model.named_modules()
            if is_matrix_layer(module) and name not in sites
        }

    def fuse(self, model: nn.Module) -> None:
        """Let a quantized model run with fewer operations; modules, their names and the state dict stay.

        Here: layers that read one input rotate and quantize it once.
        """
        sites = sorted(self.sites(model), key=lambda site: site.input_group)
        for _, group in groupby(sites, key=lambda site: site.input_group):
            share_input([layer for site in group if isinstance(layer := model.get_submodule(site.name), HQLinear)])

    def modulated_groups(self, model: nn.Module) -> list[str]:
        """Input groups that are outputs of a modulated normalisation which `scale_modulated_channels` can change."""
        return []

    def scale_modulated_channels(self, model: nn.Module, factors: Mapping[str, Tensor]) -> None:
        """Multiply channels of the modulated inputs and divide the weights that read them; the function stays.

        Args:
            model: changed in place.
            factors: input group -> positive factors (width,), for the groups of `modulated_groups`.

        Raises:
            ValueError: a group that is not one of them.
        """
        if factors:
            raise ValueError(f"found factors for {', '.join(factors)}, which are no modulated groups of this model")


class ClassConditionalAdapter(ModelAdapter):
    """The face of a model on latents, a time step and a class, so that hqdit can sample from it by itself."""

    @abstractmethod
    def call(self, model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor) -> ModelCall:
        """The arguments of the model's forward pass for latents (n, channels, height, width), time steps, classes."""

    @abstractmethod
    def modulation_input(self, model: nn.Module, block: int, timesteps: Tensor, classes: Tensor) -> Tensor:
        """Input of a block's modulation layer: (samples, width)."""

    @abstractmethod
    def predict_noise(self, model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        """Predicted noise, shape of `latents`: a learned variance, if the model has one, is dropped."""

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


def _names_below(model: nn.Module, block: nn.Module) -> list[str]:
    prefix = next(name for name, module in model.named_modules() if module is block)
    return [f"{prefix}.{name}" for name, _ in block.named_modules() if name]


_ADAPTERS: list[ModelAdapter] = []


def register_adapter(adapter: ModelAdapter) -> None:
    """Make `adapter` known; later ones are asked first."""
    _ADAPTERS.insert(0, adapter)


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter that describes `model`; one that finds repeated blocks by itself if none was written for its class.

    Raises:
        CheckpointError: none does, and the model has no repeated blocks.
    """
    import hqdit.models.dit
    import hqdit.models.families  # noqa: F401  # both register themselves
    from hqdit.models.generic import GenericAdapter

    for adapter in (*_ADAPTERS, GenericAdapter()):
        if adapter.matches(model):
            return adapter
    raise CheckpointError(
        f"model: found class {type(model).__name__} without repeated blocks of linear layers, needed a diffusion "
        "transformer. Fix: write an adapter (CONTRIBUTING.md says how)"
    )


def class_conditional_adapter(model: nn.Module) -> ClassConditionalAdapter:
    """As `adapter_for`, for what only models on latents, time step and class can do.

    Raises:
        CheckpointError: another kind of model.
    """
    adapter = adapter_for(model)
    if not isinstance(adapter, ClassConditionalAdapter):
        raise CheckpointError(
            f"model: found class {type(model).__name__}, which hqdit cannot sample from by itself, needed a model on "
            "latents, time step and class (DiTTransformer2DModel). Fix: use its diffusers pipeline from Python"
        )
    return adapter
