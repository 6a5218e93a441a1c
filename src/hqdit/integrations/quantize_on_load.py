"""Quantizing float weights while diffusers loads them, one input group at a time."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from hqdit.errors import CheckpointError
from hqdit.integrations.model_tensors import set_tensor
from hqdit.layers.linear import HQLinear
from hqdit.models.adapter import adapter_for
from hqdit.models.weights import require_finite, require_float
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.input_group import InputGroup
from hqdit.pipeline.plan import PlannedLayer, plan_quantization
from hqdit.pipeline.record import QuantizationRecord


class FloatWeights:
    """The float weights of the planned layers, on their way.

    Weights and biases are kept as the file has them, which is a view of it, until all layers that read one input have
    theirs. Then these layers are quantized as `pipeline.quantize.quantize` does it. Memory: the quantized model and one
    input group in float32.

    Args:
        model: on the meta device.
        request: data-free.
        keep_in_fp32: names of modules that the model's class wants in float32; no layer inside them is quantized.

    Raises:
        UsageError, NumericsError, CheckpointError: as `pipeline.plan.plan_quantization`.
    """

    #: Names of tensors that no file has to hold.
    not_in_files: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, request: QuantizationConfig, keep_in_fp32: list[str]) -> None:
        self._model = model
        self._where = type(model).__name__
        self._plan = plan_quantization(model, request)
        kept = [layer.site.name for layer in self._plan.layers if set(keep_in_fp32) & set(layer.site.name.split("."))]
        if kept:
            self._plan = plan_quantization(model, request.replace(exclude=(*request.exclude, *kept)))
        self._request = request
        self._record = QuantizationRecord(request, parameters=sum(p.numel() for p in model.parameters()))
        self._groups: dict[str, list[PlannedLayer]] = defaultdict(list)
        for layer in sorted(self._plan.layers, key=lambda layer: (layer.site.block, layer.site.stage)):
            self._groups[layer.site.input_group].append(layer)
        #: Tensor name -> its input group, for every tensor that is waited for.
        self._awaited = {
            name: group for group, layers in self._groups.items() for layer in layers for name in self._tensors(layer)
        }
        self._arrived: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def _tensors(self, layer: PlannedLayer) -> list[str]:
        module = self._model.get_submodule(layer.site.name)
        return [f"{layer.site.name}.{name}" for name, _ in module.named_parameters(recurse=False)]

    def special_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Name -> dtype of every tensor that stays as it is."""
        names = self._model.state_dict().keys()
        return {name: dtype for name in names if name not in self._awaited or name.endswith(".bias")}

    def takes(self, name: str) -> bool:
        """Whether the tensor belongs to a planned layer."""
        return name in self._awaited

    @torch.no_grad()
    def take(self, name: str, stored: Tensor, load_dtype: torch.dtype | None, device: torch.device) -> None:
        """Keep a tensor; quantize its input group with the last one.

        Args:
            name: of the tensor.
            stored: as in the file.
            load_dtype: asked of diffusers for the unquantized rest, the biases among it, or None.
            device: where the layer goes.

        Raises:
            CheckpointError: no float numbers, or NaN or infinity among them.
        """
        require_float({name: stored}, self._where)
        require_finite({name: stored}, self._where)
        group = self._awaited[name]
        self._arrived[group][name] = stored
        layers = self._groups[group]
        if len(self._arrived[group]) < sum(len(self._tensors(layer)) for layer in layers):
            return
        for tensor_name, tensor in self._arrived.pop(group).items():
            set_tensor(self._model, tensor_name, tensor.to(device, torch.float32))
        InputGroup(self._model, self._plan, layers, self._request, None, None).quantize(self._record)
        for layer in layers:
            bias = self._model.get_submodule(layer.site.name).bias
            if isinstance(bias, Tensor) and load_dtype is not None:
                bias.data = bias.data.to(load_dtype)

    def finish(self) -> QuantizationRecord:
        """What happened, once everything has arrived.

        Raises:
            CheckpointError: layers that are incomplete, or NaN or infinity in the unquantized rest.
        """
        if self._arrived or len(self._record.layers) < len(self._plan.layers):
            waiting = sorted({layer.site.name for layer in self._plan.layers} - self._record.layers.keys())
            raise CheckpointError(
                f"{self._where}: found no complete weights for {len(waiting)} layers ({', '.join(waiting[:3])}), "
                "needed all of them, in memory. Fix: load the whole checkpoint, without offload_state_dict"
            )
        adapter_for(self._model).fuse(self._model)
        layers = {name for name, module in self._model.named_modules() if isinstance(module, HQLinear)}
        for name, tensor in self._model.state_dict().items():
            if name.rpartition(".")[0] not in layers:
                require_finite({name: tensor}, self._where)
            if tensor.is_floating_point() and (name.rpartition(".")[0] not in layers or name.endswith(".bias")):
                self._record.dtypes[name] = tensor.dtype
        self._model.quantization_record = self._record  # type: ignore[assignment]
        return self._record
