"""Single tensors of a model by name, and those that are held once under several names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hqdit.errors import UsageError


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in the place of the parameter or buffer `name`, whose kind it takes; a parameter stays the object."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
    setattr(module, leaf, value)


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name`."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def tie(model: nn.Module, shared: dict[str, str]) -> None:
    """Hold equal tensors once: every name in `shared` gets the tensor of the name that it maps to.

    Parameters that are held for several places are frozen, because an update would reach all of them. A parameter and
    a buffer stay apart.
    """
    for alias, stored in shared.items():
        tensor = get_tensor(model, stored)
        if is_one_kind(tensor, get_tensor(model, alias)):
            set_tensor(model, alias, tensor.requires_grad_(False))


def is_one_kind(one: Tensor, other: Tensor) -> bool:
    """Whether both are parameters or both buffers."""
    return isinstance(one, nn.Parameter) == isinstance(other, nn.Parameter)


def without_aliases(tensors: dict[str, Tensor], shared: dict[str, str]) -> dict[str, Tensor]:
    """`tensors` in order of their names, without those that `shared` says are stored under another name.

    Raises:
        UsageError: two tensors that were equal are not any more.
    """
    for alias, stored in shared.items():
        if not _have_equal_bits(tensors[alias], tensors[stored]):
            raise UsageError(
                f"{alias}: found another tensor than {stored}, needed the same, because the two were equal when the "
                "model was quantized or loaded, and are stored once. Fix: hqdit.save(model, folder)"
            )
    return {name: tensors[name] for name in sorted(tensors.keys() - shared.keys())}


def _have_equal_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(
        *(tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )
