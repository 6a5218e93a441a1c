"""Layers that read one input and rotate and quantize it once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hqdit.kernels.activation import QuantizedActivation

if TYPE_CHECKING:
    from hqdit.layers.linear import HQLinear


class SharedInput:
    """The quantized input of a group of layers, from the first of them that reads it to the last.

    Modules such as attention call their projections one after the other with one and the same tensor. What the first
    call has computed is kept for the others, as long as they really get that tensor, and let go with the last one.

    Args:
        readers: how many layers there are.
    """

    def __init__(self, readers: int) -> None:
        self._readers = readers
        self._source: Tensor | None = None
        self._activation: QuantizedActivation | None = None
        self._served: tuple[str, ...] = ()

    def quantized(self, layer: HQLinear, x: Tensor) -> QuantizedActivation:
        """What `layer.quantize_input(x)` gives.

        A layer that asks a second time starts anew: the tensor may have been written to since.
        """
        activation = self._activation
        if activation is None or self._source is not x or layer.spec.name in self._served:
            activation = layer.quantize_input(x)
            self._source, self._activation, self._served = x, activation, ()
        self._served = (*self._served, layer.spec.name)
        if len(self._served) == self._readers:
            self._source, self._activation, self._served = None, None, ()
        return activation


def share_input(layers: Sequence[HQLinear]) -> None:
    """Let `layers`, which read one input, quantize it once, if all of them turn it into the same levels."""
    is_shared = len(layers) > 1 and all(layers[0].shares_input_with(layer) for layer in layers[1:])
    shared = SharedInput(len(layers)) if is_shared else None
    for layer in layers:
        layer.shared_input = shared
