"""Weights on their way from files into a model that diffusers loads."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from hqdit.errors import CheckpointError
from hqdit.layers.linear import HQLinear
from hqdit.models.adapter import adapter_for
from hqdit.models.weights import require_finite, require_float
from hqdit.pipeline.record import QuantizationRecord


class ArrivingWeights(ABC):
    """Takes every tensor of a model, one after the other, and finishes the model with the last one.

    That is before diffusers spreads it over devices, where tensors may be out of reach.

    Args:
        model: on the meta device, with the modules that the files have tensors for.
        keep_in_fp32: names of modules that the model's class wants in float32.
        not_in_files: names of tensors that come with others.

    Attributes:
        record: what happened, once everything has arrived; None before.
    """

    def __init__(self, model: nn.Module, keep_in_fp32: list[str], not_in_files: frozenset[str] = frozenset()) -> None:
        self._model, self._where = model, type(model).__name__
        self._keep_in_fp32 = set(keep_in_fp32)
        self._needed = model.state_dict()
        self.not_in_files = not_in_files
        self._awaited = set(self._needed) - not_in_files
        self.record: QuantizationRecord | None = None

    def take(self, name: str, stored: Tensor, load_dtype: torch.dtype | None, device: torch.device) -> None:
        """One tensor.

        Args:
            name: of the tensor.
            stored: as in the file.
            load_dtype: asked of diffusers for the unquantized rest, or None.
            device: where it goes.

        Raises:
            CheckpointError: a tensor that cannot be, or with the last one, a model that cannot be.
        """
        if self._needed[name].is_floating_point() and not self._is_exact(name):
            require_float({name: stored}, self._where)
        require_finite({name: stored}, self._where)
        self._place(name, stored, load_dtype, device)
        self._awaited.discard(name)
        if not self._awaited:
            record = self._finished()
            adapter_for(self._model).fuse(self._model)
            record.dtypes = {
                name: tensor.dtype
                for name, tensor in self._model.state_dict().items()
                if tensor.is_floating_point() and not self._is_exact(name)
            }
            self._model.quantization_record = record  # type: ignore[assignment]
            self.record = record

    def require_complete(self) -> None:
        """Raise `CheckpointError` if something has not arrived."""
        if self.record is None:
            names = ", ".join(sorted(self._awaited)[:3])
            raise CheckpointError(
                f"{self._where}: found no {names} ({len(self._awaited)} tensors missing), needed all of them, in "
                "memory. Fix: load the whole checkpoint, without offload_state_dict"
            )

    def _dtype(self, name: str, load_dtype: torch.dtype | None) -> torch.dtype:
        """What a tensor is held in."""
        needed: torch.dtype = self._needed[name].dtype
        if self._is_exact(name) or not needed.is_floating_point or load_dtype is None:
            return needed
        return load_dtype if self._keep_in_fp32.isdisjoint(name.split(".")) else torch.float32

    @abstractmethod
    def special_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Name -> dtype of every tensor that will not have half a byte per number; `dtype` is that of the rest."""

    def _is_exact(self, name: str) -> bool:
        """Whether the tensor keeps the dtype that it was stored in: all of a quantized layer but the bias."""
        owner, _, leaf = name.rpartition(".")
        return leaf != "bias" and isinstance(self._model.get_submodule(owner), HQLinear)

    @abstractmethod
    def _place(self, name: str, stored: Tensor, load_dtype: torch.dtype | None, device: torch.device) -> None:
        """Put a tensor into the model, or keep it until the others that it is needed with are there."""

    @abstractmethod
    def _finished(self) -> QuantizationRecord:
        """The record, after a last look at the model."""
