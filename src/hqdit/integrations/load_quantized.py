"""Loading weights that hqdit has quantized through diffusers, as strictly as `pipeline.checkpoint.load`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.errors import CheckpointError
from hqdit.integrations.arriving_weights import ArrivingWeights
from hqdit.integrations.model_tensors import get_tensor, is_one_kind, set_tensor
from hqdit.layers.linear import HQLinear
from hqdit.pipeline.checkpoint import require_sound
from hqdit.pipeline.description import place_empty_layers, read_description
from hqdit.pipeline.record import QuantizationRecord


class QuantizedWeights(ArrivingWeights):
    """Weights in the form of docs/checkpoint.md; those that are stored once are held once.

    Args:
        model: on the meta device; its layers are replaced by empty quantized ones.
        description: the quantization_config of the checkpoint.
        keep_in_fp32: names of modules that the model's class wants in float32.

    Raises:
        CheckpointError: a description that cannot be read or is not of this model.
    """

    def __init__(self, model: nn.Module, description: dict[str, Any], keep_in_fp32: list[str]) -> None:
        where = type(model).__name__
        found = read_description(description, where)
        place_empty_layers(model, found, where)
        super().__init__(model, keep_in_fp32, frozenset(found.shared))
        self._found = found
        self._aliases: dict[str, list[str]] = defaultdict(list)
        for alias, stored in found.shared.items():
            if not {alias, stored} <= self._needed.keys() or stored in found.shared:
                raise CheckpointError(
                    f"{where}: found {alias!r} stored as {stored!r} in shared_tensors, needed two tensors of this "
                    "model, of which one is stored. Fix: quantize the model again"
                )
            self._aliases[stored].append(alias)

    def special_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {
            name: tensor.dtype if self._is_exact(name) else dtype
            for name, tensor in self._needed.items()
            if tensor.is_floating_point()
        }

    def _place(self, name: str, stored: Tensor, load_dtype: torch.dtype | None, device: torch.device) -> None:
        needed = self._needed[name]
        if name in self.not_in_files:
            raise CheckpointError(
                f"{self._where}: found the tensor {name!r} in the weight files, needed it stored as another one, as "
                "shared_tensors says. Fix: quantize the model again"
            )
        if self._is_exact(name) and stored.dtype != needed.dtype:
            raise CheckpointError(
                f"{self._where}: tensor {name!r} has dtype {stored.dtype}, needed {needed.dtype}. "
                "Fix: quantize the model again"
            )
        dtype = self._dtype(name, load_dtype)
        set_tensor(self._model, name, stored.to(device, dtype))
        for alias in self._aliases[name]:
            if self._needed[alias].shape != needed.shape or self._is_exact(alias) != self._is_exact(name):
                raise CheckpointError(
                    f"{self._where}: found {alias!r} stored as {name!r} in shared_tensors, needed tensors of one shape "
                    "and dtype. Fix: quantize the model again"
                )
            alias_dtype = self._dtype(alias, load_dtype)
            # Of two that are equal in the file only one may have to stay in float32.
            held = get_tensor(self._model, name)
            is_held = alias_dtype == dtype and is_one_kind(held, get_tensor(self._model, alias))
            set_tensor(
                self._model, alias, held.requires_grad_(False) if is_held else stored.to(device, alias_dtype, copy=True)
            )

    def _finished(self) -> QuantizationRecord:
        for name, module in self._model.named_modules():
            if isinstance(module, HQLinear):
                require_sound(name, module, self._where)
        record = self._found.record
        record.shared = {
            alias: stored
            for alias, stored in self._found.shared.items()
            if get_tensor(self._model, alias).dtype == get_tensor(self._model, stored).dtype
        }
        return record
