"""Quantizing float weights while diffusers loads them, one input group at a time."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from hqdit.integrations.arriving_weights import ArrivingWeights
from hqdit.integrations.model_tensors import set_tensor
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.input_group import InputGroup
from hqdit.pipeline.known_input import KnownInput
from hqdit.pipeline.plan import PlannedLayer, plan_quantization
from hqdit.pipeline.record import QuantizationRecord


class FloatWeights(ArrivingWeights):
    """Float weights, of which those of the planned layers are quantized.

    Weights and biases are kept as the file has them, which is a view of it, until all layers that read one input have
    theirs. Then these layers are quantized as `pipeline.quantize.quantize` does it. Memory: the quantized model and one
    input group in float32.

    Args:
        model: on the meta device.
        request: data-free.
        keep_in_fp32: names of modules that the model's class wants in float32.

    Raises:
        UsageError, NumericsError, CheckpointError: as `pipeline.plan.plan_quantization`.
    """

    def __init__(self, model: nn.Module, request: QuantizationConfig, keep_in_fp32: list[str]) -> None:
        super().__init__(model, keep_in_fp32)
        self._plan = plan_quantization(model, request)
        self._request = request
        self._progress = QuantizationRecord(request, parameters=sum(p.numel() for p in model.parameters()))
        self._groups: dict[str, list[PlannedLayer]] = defaultdict(list)
        for layer in sorted(self._plan.layers, key=lambda layer: (layer.site.block, layer.site.stage)):
            self._groups[layer.site.input_group].append(layer)
        self._group_of = {
            name: group for group, layers in self._groups.items() for layer in layers for name in self._tensors(layer)
        }
        self._arrived: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def _tensors(self, layer: PlannedLayer) -> list[str]:
        module = self._model.get_submodule(layer.site.name)
        return [f"{layer.site.name}.{name}" for name, _ in module.named_parameters(recurse=False)]

    def special_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {name: dtype for name in self._needed if name not in self._group_of or name.endswith(".bias")}

    @torch.no_grad()
    def _place(self, name: str, stored: Tensor, load_dtype: torch.dtype | None, device: torch.device) -> None:
        group = self._group_of.get(name)
        if group is None:
            set_tensor(self._model, name, stored.to(device, self._dtype(name, load_dtype)))
            return
        self._arrived[group][name] = stored
        layers = self._groups[group]
        if len(self._arrived[group]) < sum(len(self._tensors(layer)) for layer in layers):
            return
        for tensor_name, tensor in self._arrived.pop(group).items():
            set_tensor(self._model, tensor_name, tensor.to(device, torch.float32))
        InputGroup(self._model, self._plan, layers, self._request, None, KnownInput()).quantize(self._progress)
        for layer in layers:
            bias = self._model.get_submodule(layer.site.name).bias
            if isinstance(bias, Tensor):
                bias.data = bias.data.to(self._dtype(f"{layer.site.name}.bias", load_dtype))

    def _finished(self) -> QuantizationRecord:
        return self._progress
