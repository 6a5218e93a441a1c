"""Checks of the tensors that kernels read through pointers; the kernels check nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT32 = (torch.float32,)


def require_tensor(
    what: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[int | None],
    device: torch.device,
    rows: bool = False,
) -> None:
    """Raise unless `tensor` is as a kernel needs it.

    Args:
        what: operation and argument, for the message.
        tensor: to be looked at.
        dtypes: those allowed.
        shape: sizes; None for any.
        device: where it has to lie.
        rows: rows may lie apart or overlap (a stride of 0), as long as each lies in one piece.

    Raises:
        TypeError: no tensor, another dtype or device.
        ValueError: another shape, strides that the kernels cannot follow, or an address between two elements.
    """
    if not isinstance(tensor, Tensor):  # torch lets None pass for a tensor
        raise TypeError(f"{what}: found {type(tensor).__name__}, needed a tensor")
    if tensor.device != device:
        raise TypeError(f"{what}: found device {tensor.device}, needed {device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{what}: found {tensor.dtype}, needed {' or '.join(str(dtype) for dtype in dtypes)}")
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(w is not None and f != w for f, w in zip(found, shape, strict=True)):
        needed = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what}: found shape {found}, needed ({needed})")
    in_one_piece = (tensor.shape[-1] <= 1 or tensor.stride(-1) == 1) if rows else tensor.is_contiguous()
    if tensor.numel() and not in_one_piece:
        raise ValueError(f"{what}: found strides {tensor.stride()}, needed elements that follow each other")
    if tensor.data_ptr() % tensor.element_size():
        raise ValueError(f"{what}: found an address that is no multiple of {tensor.element_size()}, needed one that is")


def require_one_device(op: str, *tensors: Tensor | Sequence[Tensor | None] | None) -> None:
    """Raise TypeError if tensors for tracing, which have no data, come together with others.

    torch asks for shapes alone as soon as one tensor is on the meta device, and would return memory without contents.
    """
    devices = set()
    for entry in tensors:
        parts = [entry] if isinstance(entry, Tensor) else entry or ()
        devices |= {part.device for part in parts if part is not None}
    if len(devices) > 1:
        raise TypeError(f"{op}: found devices {', '.join(sorted(map(str, devices)))}, needed one")
