"""The quantized layers of one block as plain data, so that a run can go on where an earlier one was stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from hqdit.layers.linear import HQLinear
from hqdit.layers.pointwise_conv import quantized_class
from hqdit.pipeline.record import QuantizationRecord
from hqdit.quantizers.spec import LinearSpec


@dataclass(frozen=True)
class FinishedBlock:
    """What quantizing a block gave: all that it changed in the model and in the record.

    Attributes:
        layers: layer name -> its entry as in a checkpoint: the spec, `bias` and `record`.
        tensors: the layers' state, under the names that it has in the model's.
    """

    layers: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str], record: QuantizationRecord) -> FinishedBlock:
        """The quantized layers `names` of `model`."""
        layers = {name: cast(HQLinear, model.get_submodule(name)) for name in names}
        entries = {
            name: {**layer.spec.to_json(), "bias": layer.bias is not None, "record": record.layers[name]}
            for name, layer in layers.items()
        }
        tensors = {
            f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.state_dict().items()
        }
        return cls(entries, tensors)

    def put_into(self, model: nn.Module, record: QuantizationRecord) -> None:
        """Do to a float model and to the record what quantizing the block did."""
        for name, entry in self.layers.items():
            float_layer = model.get_submodule(name)
            facts = {key: value for key, value in entry.items() if key not in ("bias", "record")}
            layer = quantized_class(float_layer)(LinearSpec.from_json(name, facts), bias=entry["bias"], device="meta")
            device = float_layer.get_parameter("weight").device
            state = {key: self.tensors[f"{name}.{key}"].to(device) for key in layer.state_dict()}
            layer.load_state_dict(state, assign=True)
            model.set_submodule(name, layer.eval())
            record.layers[name] = dict(entry["record"])


class BlockStore(Protocol):
    """Keeps finished blocks, and has those of an earlier run."""

    def finished(self, block: int) -> FinishedBlock | None:
        """What quantizing the block with this number gave, or None."""

    def keep(self, block: int, finished: FinishedBlock) -> None:
        """Keep it."""
