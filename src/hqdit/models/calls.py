"""A call of a model as data: what its forward pass was given, and its output as one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelCall:
    """The arguments of one forward pass; tensors may lie in lists, tuples and dictionaries.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> ModelCall:
        """The same call with every tensor replaced."""
        return ModelCall(map_tensors(self.args, function), map_tensors(dict(self.kwargs), function))

    def to(self, device: torch.device | str) -> ModelCall:
        """The same call on `device`."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def __call__(self, module: nn.Module) -> Any:
        """Run `module` on these arguments."""
        return module(*self.args, **self.kwargs)

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        """Everything that `model` computes for this call, as one float32 vector, for comparisons."""
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            found.append(tensor.to(torch.float32).flatten())
            return tensor

        map_tensors(self(model), collect)
        return torch.cat(found)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it replaced; containers are copied, anything else stays."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, function) for item in value]
        is_named = isinstance(value, tuple) and hasattr(value, "_fields")
        return type(value)(*items) if is_named else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value
