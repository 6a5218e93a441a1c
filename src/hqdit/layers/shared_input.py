"""Layers that read one input and rotate and quantize it once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
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
        self._version = 0
        self._activation: QuantizedActivation | None = None
        self._served: tuple[str, ...] = ()

    def quantized(self, layer: HQLinear, x: Tensor) -> QuantizedActivation:
        """What `layer.quantize_input(x)` gives.

        A tensor that was written to since is quantized anew. In inference mode, where torch does not count writes,
        every layer quantizes its input by itself.
        """
        # Neither can be asked while a graph is traced, where no attention of diffusers writes to such a tensor.
        is_traced = torch.compiler.is_compiling()
        if not is_traced and x.is_inference():
            return layer.quantize_input(x)
        version = 0 if is_traced else x._version
        activation = self._activation
        is_known = self._source is x and self._version == version and layer.spec.name not in self._served
        if activation is None or not is_known:
            activation = layer.quantize_input(x)
            self._source, self._version, self._activation, self._served = x, version, activation, ()
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
