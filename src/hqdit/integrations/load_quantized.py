"""Loading weights that hqdit has quantized through diffusers, as strictly as `pipeline.checkpoint.load`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.errors import CheckpointError
from hqdit.integrations.model_tensors import get_tensor, set_tensor
from hqdit.layers.linear import HQLinear
from hqdit.models.adapter import adapter_for
from hqdit.models.weights import require_finite, require_float
from hqdit.pipeline.checkpoint import require_sound
from hqdit.pipeline.description import place_empty_layers, read_description
from hqdit.pipeline.record import QuantizationRecord


class QuantizedWeights:
    """Every tensor of a quantized model, on its way; those that are stored once are held once.

    Args:
        model: on the meta device; its layers are replaced by empty quantized ones.
        description: the quantization_config of the checkpoint.
        keep_in_fp32: names of modules that the model's class wants in float32.

    Raises:
        CheckpointError: a description that cannot be read or is not of this model.
    """

    def __init__(self, model: nn.Module, description: dict[str, Any], keep_in_fp32: list[str]) -> None:
        self._model = model
        self._keep_in_fp32 = set(keep_in_fp32)
        self._where = type(model).__name__
        found = read_description(description, self._where)
        place_empty_layers(model, found, self._where)
        self._record = found.record
        self._needed = model.state_dict()
        self._aliases: dict[str, list[str]] = defaultdict(list)
        for alias, stored in found.shared.items():
            if not {alias, stored} <= self._needed.keys() or stored in found.shared:
                raise CheckpointError(
                    f"{self._where}: found {alias!r} stored as {stored!r} in shared_tensors, needed two tensors of "
                    "this model, of which one is stored. Fix: quantize the model again"
                )
            self._aliases[stored].append(alias)
        #: Names of tensors that no file has to hold.
        self.not_in_files = frozenset(found.shared)

    def special_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Name -> dtype of every tensor that is no packed code."""
        return {
            name: tensor.dtype if self._is_exact(name) else dtype
            for name, tensor in self._needed.items()
            if tensor.is_floating_point()
        }

    def takes(self, name: str) -> bool:
        """Whether the tensor is one of the model's; that of an alias is not in the files."""
        if name in self.not_in_files:
            raise CheckpointError(
                f"{self._where}: found the tensor {name!r} in the weight files, needed it stored as another one, as "
                "shared_tensors says. Fix: quantize the model again"
            )
        return True

    def _is_exact(self, name: str) -> bool:
        """Whether the tensor keeps its dtype: all of a quantized layer but the bias."""
        owner, _, leaf = name.rpartition(".")
        return leaf != "bias" and isinstance(self._model.get_submodule(owner), HQLinear)

    def _dtype(self, name: str, load_dtype: torch.dtype | None) -> torch.dtype:
        """What the tensor is held in."""
        needed: torch.dtype = self._needed[name].dtype
        if self._is_exact(name) or load_dtype is None:
            return needed
        return load_dtype if self._keep_in_fp32.isdisjoint(name.split(".")) else torch.float32

    def take(self, name: str, stored: Tensor, load_dtype: torch.dtype | None, device: torch.device) -> None:
        """Put a tensor, and the equal ones that are not stored, into the model.

        Args:
            name: of the tensor.
            stored: as in the file.
            load_dtype: asked of diffusers for the unquantized rest, or None.
            device: where the layer goes.

        Raises:
            CheckpointError: a dtype that is not that of docs/checkpoint.md, NaN or infinity, or other shapes.
        """
        needed = self._needed[name]
        if not self._is_exact(name):
            require_float({name: stored}, self._where)
        elif stored.dtype != needed.dtype:
            raise CheckpointError(
                f"{self._where}: tensor {name!r} has dtype {stored.dtype}, needed {needed.dtype}. "
                "Fix: quantize the model again"
            )
        require_finite({name: stored}, self._where)
        dtype = self._dtype(name, load_dtype)
        set_tensor(self._model, name, stored.to(device, dtype))
        for alias in self._aliases[name]:
            if self._needed[alias].shape != needed.shape or self._is_exact(alias) != self._is_exact(name):
                raise CheckpointError(
                    f"{self._where}: found {alias!r} stored as {name!r} in shared_tensors, needed tensors of one shape "
                    "and dtype. Fix: quantize the model again"
                )
            alias_dtype = self._dtype(alias, load_dtype)
            is_equal = alias_dtype == dtype  # else only in the file
            set_tensor(
                self._model, alias, get_tensor(self._model, name) if is_equal else stored.to(device, alias_dtype)
            )

    def finish(self) -> QuantizationRecord:
        """The checkpoint's record, once everything has arrived.

        Raises:
            CheckpointError: scales, indices or codes that cannot be.
        """
        for name, module in self._model.named_modules():
            if isinstance(module, HQLinear):
                require_sound(name, module, self._where)
        adapter_for(self._model).fuse(self._model)
        state = self._model.state_dict()
        self._record.dtypes = {
            name: tensor.dtype
            for name, tensor in state.items()
            if tensor.is_floating_point() and not self._is_exact(name)
        }
        self._record.shared = {
            alias: name
            for name, aliases in self._aliases.items()
            for alias in aliases
            if state[alias].dtype == state[name].dtype
        }
        self._model.quantization_record = self._record  # type: ignore[assignment]
        return self._record
