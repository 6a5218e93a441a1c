"""The pipeline's steps for one linear layer by itself, and for the blocks of a small network.

`pipeline.quantize` walks through the blocks of a diffusion transformer with its adapter; here the same functions
rotate, choose the format, scale and round, for networks that have no adapter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqdit.experiments.small_networks.networks import SmallNetwork
from hqdit.formats.number_format import FloatFormat
from hqdit.gptq.hessian import HessianAccumulator
from hqdit.gptq.solver import gptq_quantize
from hqdit.kernels.activation import quantize_activation
from hqdit.layers.linear import HQLinear
from hqdit.quantizers.format_selection import range_statistic, select_format
from hqdit.quantizers.quantized_tensor import round_to_nearest, weight_scales
from hqdit.quantizers.spec import ActivationSpec, LinearSpec, WeightSpec
from hqdit.transforms.rotation import plan_rotation, random_signs, rotate, rotate_online

#: Quantile of the format statistic: the paper's.
ALPHA = 0.25


@dataclass(frozen=True)
class Setting:
    """How every layer is quantized: W4A4, weights per output channel and inputs per token, scales by absmax.

    Attributes:
        rotation: "none", "block:B" or "full".
        candidates: formats that the statistic chooses among; with one there is no choice.
        has_gptq: round weights by GPTQ, otherwise to nearest.
        seed: of the rotation's signs.
    """

    rotation: str
    candidates: tuple[FloatFormat, ...]
    has_gptq: bool
    seed: int = 0


@torch.no_grad()
def quantize_linear(linear: nn.Linear, name: str, setting: Setting, inputs: Tensor | None) -> HQLinear:
    """A quantized copy of one layer.

    Args:
        linear: float32.
        name: for messages, and for the random signs.
        setting: what to do.
        inputs: float32 (..., in_features), what the layer reads during calibration; needed with GPTQ, else not looked
            at.

    Raises:
        UsageError: a block that does not divide the width.
        NumericsError: a width without a Hadamard matrix, or a Hessian that cannot be factored.
        ValueError: GPTQ without inputs.
    """
    rotation = plan_rotation(setting.rotation, linear.in_features, name)
    signs = None if rotation.is_identity else random_signs(linear.in_features, setting.seed, f"signs/{name}")
    rotated = rotate(linear.weight.detach().to(torch.float64), rotation, signs).to(torch.float32)
    fmt = select_format(range_statistic(rotated.reshape(1, -1), ALPHA)[0], setting.candidates)
    weight, activation = WeightSpec((fmt,)), ActivationSpec(fmt)
    spec = LinearSpec(name, linear.in_features, linear.out_features, weight, activation, rotation)
    scale = weight_scales(rotated, weight, None, "absmax")
    if not setting.has_gptq:
        quantized = round_to_nearest(rotated, scale, weight, None)
    elif inputs is None:
        raise ValueError(f"{name}: GPTQ needs the layer's inputs")
    else:
        seen = rotate_online(inputs.reshape(-1, linear.in_features).to(torch.float32), rotation, signs)
        hessian = HessianAccumulator(linear.in_features)
        hessian.add(quantize_activation(seen, activation).dequantize())
        quantized, _ = gptq_quantize(rotated, hessian.hessian, scale, weight, name=name)
    return HQLinear.from_quantized(spec, quantized, linear.bias, signs).eval()


@torch.no_grad()
def quantize_network(network: SmallNetwork, setting: Setting, calibration: Tensor) -> SmallNetwork:
    """A copy whose blocks are quantized layer by layer, in the order in which they run.

    As in the pipeline, what GPTQ sees of a layer's input has passed through quantized predecessors.

    Args:
        network: float32.
        setting: what to do.
        calibration: inputs of the network; not looked at without GPTQ.
    """
    quantized = copy.deepcopy(network)
    hidden = quantized.embed(calibration) if setting.has_gptq else None
    for index, block in enumerate(quantized.blocks):
        linears = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            inputs = None if hidden is None else _input_of(block, linear, hidden)
            block.set_submodule(name, quantize_linear(linear, f"blocks.{index}.{name}", setting, inputs))
        hidden = None if hidden is None else block(hidden)
    return quantized


def _input_of(block: nn.Module, linear: nn.Linear, hidden: Tensor) -> Tensor:
    """What `linear` reads when `block` runs."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        block(hidden)
    finally:
        handle.remove()
    return seen[0]
