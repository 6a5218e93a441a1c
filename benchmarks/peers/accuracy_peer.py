"""A peer whose accuracy is measured: quantizes the layers that it is told, and runs the model on request.

The README beside this file states the protocol. What is computed from its outputs is the caller's business.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from serve_peer import one_line, send, take_over_stdout
from torch import Tensor, nn

#: Whose versions the record states.
LIBRARIES = ("torch", "diffusers", "torchao", "sdnq")
#: Vectors in a probe. SDNQ does not quantize the inputs of a layer that reads fewer than 32, so one probe is shorter.
PROBE_ROWS = (64, 16)
FLOAT_BITS = 32
#: torchao's own default; where it does not divide the widths, the next larger size that does.
TORCHAO_GROUP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=QUANTIZERS)
    parser.add_argument("--options", type=json.loads, default={}, help="of the library, a JSON object")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    replies = take_over_stdout()
    torch.set_num_threads(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    send(replies, {"ready": True, "versions": {name: version(name) for name in LIBRARIES}})
    peer = Peer(args.library, args.options)
    for line in sys.stdin:
        try:
            reply = peer.answer(json.loads(line))
        except Exception as error:  # whatever a library raises is what the caller's record has to say
            traceback.print_exc()
            reply = {"error": one_line(error)}
        send(replies, reply)


class Peer:
    """One library with one set of options, and the model that it quantized last."""

    def __init__(self, library: str, options: dict[str, Any]) -> None:
        self._quantize, self._options = QUANTIZERS[library], options
        self._model: DiTTransformer2DModel | None = None

    @torch.no_grad()
    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["op"]:
            case "quantize":
                return self._prepare(Path(request["model"]), request["layers"], Path(request["probes"]))
            case "forward":
                given = load_file(request["inputs"])
                (output,) = self._model(**given, return_dict=False)
                numpy.save(request["output"], output.float().numpy())
                return {"output": request["output"]}
            case other:
                raise ValueError(f"op: found {other!r}, needed quantize or forward")

    def _prepare(self, folder: Path, names: Sequence[str], probes: Path) -> dict[str, Any]:
        model = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
        model = model.eval().requires_grad_(False)
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        shapes = {name: (module.in_features, module.out_features) for name, module in linear.items()}
        facts, settings = self._quantize(model, names, self._options)
        save_file({key: tensor.contiguous() for key, tensor in probed(model, names, shapes).items()}, probes)
        self._model = model
        return {"layers": facts, "settings": settings}


def probed(model: nn.Module, names: Sequence[str], shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Outputs that agree where a layer is linear in its input, and do not where it quantizes the input.

    f(x + y) - f(x) and f(y + z) - f(z) are both f(y) - f(0) in a layer with float inputs, whatever its weights are.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        for rows in PROBE_ROWS:
            x, y, z = torch.randn(3, rows, shapes[name][0], generator=generator)
            found[f"{name}/{rows}/first"] = layer(x + y) - layer(x)
            found[f"{name}/{rows}/second"] = layer(y + z) - layer(z)
    return found


#: Of a layer: bits of its codes; all bits of its weight's numbers, scales, zero points and branches included; the same
#: as the library holds them in memory; bits of an input's codes; bits that each vector of inputs brings besides.
Facts = dict[str, float]


def layer_facts(
    code_bits: float, codes: Tensor, others: Sequence[Tensor | None], weights: int, input_bits: float, extra: float
) -> Facts:
    rest = sum(8 * tensor.numel() * tensor.element_size() for tensor in others if tensor is not None)
    return {
        "code_bits": code_bits,
        "weight_bits": code_bits + rest / weights,
        "memory_bits": (8 * codes.numel() * codes.element_size() + rest) / weights,
        "input_bits": input_bits,
        "input_extra_bits": extra,
    }


#: Facts of the layers that a library has quantized, and what it decided by itself.
Quantized = tuple[dict[str, Facts], dict[str, Any]]


def leave_float(model: nn.Module, names: Sequence[str], _options: dict[str, Any]) -> Quantized:
    """Nothing: shows what the way through this process does to a model."""
    weights = {name: model.get_submodule(name).weight for name in names}
    return {name: layer_facts(FLOAT_BITS, w, (), w.numel(), FLOAT_BITS, 0) for name, w in weights.items()}, {}


def quantize_sdnq(model: nn.Module, names: Sequence[str], options: dict[str, Any]) -> Quantized:
    """The options are those of sdnq_post_load_quant."""
    # Read when sdnq is imported: torch's own products, and no compilation, which changes the time and not the numbers.
    os.environ["SDNQ_USE_OPENVINO_MM"] = os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"
    from sdnq import sdnq_post_load_quant
    from sdnq.common import dtype_dict

    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = [f"{name}.weight" for name in linear if name not in names]
    torch.manual_seed(0)  # its singular vectors are found from random ones
    sdnq_post_load_quant(model, modules_to_not_convert=kept, add_skip_keys=False, **options)
    facts, settings = {}, {}
    for name in names:
        layer = model.get_submodule(name)
        how = getattr(layer, "sdnq_dequantizer", None)
        if how is None:
            continue
        others = [getattr(layer, key, None) for key in ("scale", "zero_point", "svd_up", "svd_down")]
        bits = dtype_dict[how.quantized_matmul_dtype]["num_bits"] if how.use_quantized_matmul else FLOAT_BITS
        extra = FLOAT_BITS if how.use_quantized_matmul else 0
        code_bits = dtype_dict[how.weights_dtype]["num_bits"]
        facts[name] = layer_facts(code_bits, layer.weight, others, linear[name].numel(), bits, extra)
        settings[f"width {linear[name].shape[1]}"] = {
            "group_size": how.group_size,
            "hadamard_group_size": how.hadamard_group_size if how.use_hadamard else None,
            "svd_rank": how.svd_rank if getattr(layer, "svd_up", None) is not None else None,
            "matmul_dtype": how.quantized_matmul_dtype if how.use_quantized_matmul else None,
            # Its 4-bit weights are rounded a second time, to the dtype of the product, in every forward pass.
            "rounds_weights_again": bool(how.use_quantized_matmul and how.re_quantize_for_matmul),
        }
    return facts, settings


def quantize_torchao(model: nn.Module, names: Sequence[str], options: dict[str, Any]) -> Quantized:
    """Option "config" is a key of `TORCHAO_CONFIGS`."""
    from torchao.quantization import quantize_

    widths = {model.get_submodule(name).in_features for name in names}
    common = math.gcd(*widths)
    group_size = next(size for size in range(TORCHAO_GROUP, common + 1) if common % size == 0)
    scheme = TORCHAO_CONFIGS[options["config"]]
    quantize_(model, scheme.config(group_size), filter_fn=lambda _module, name: name in names)
    facts = {}
    for name in names:
        weight = model.get_submodule(name).weight
        if not hasattr(weight, "qdata"):  # torchao passes over what a config does not fit
            continue
        keys = (*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ()))
        others = [getattr(weight, key) for key in keys if key != "qdata"]
        facts[name] = layer_facts(
            scheme.code_bits, weight.qdata, others, weight.numel(), scheme.input_bits, scheme.input_extra_bits
        )
    return facts, {"group_size": group_size if scheme.code_bits < 8 else None}


@dataclass(frozen=True)
class Scheme:
    """A torchao config, from a group size, and what it says of weights and inputs; see `Facts`."""

    config: Callable[[int], Any]
    code_bits: int
    input_bits: int
    input_extra_bits: int


def int8_dynamic_int8(_group_size: int) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def int8_dynamic_int4(group_size: int) -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(group_size))


def int4_weights(group_size: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(torch.int4, PerGroup(group_size))


def int4_weights_cuda(group_size: int) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=group_size)


def int4_weights_cpu(group_size: int) -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=group_size)


TORCHAO_CONFIGS = {
    "Int8DynamicActivationInt8WeightConfig": Scheme(int8_dynamic_int8, 8, 8, FLOAT_BITS),
    # A scale and a zero point of 8 bits for every vector.
    "Int8DynamicActivationIntxWeightConfig": Scheme(int8_dynamic_int4, 4, 8, FLOAT_BITS + 8),
    "IntxWeightOnlyConfig": Scheme(int4_weights, 4, FLOAT_BITS, 0),
    "Int4WeightOnlyConfig": Scheme(int4_weights_cuda, 4, FLOAT_BITS, 0),
    "PrototypeInt4WeightOnlyConfig": Scheme(int4_weights_cpu, 4, FLOAT_BITS, 0),
}

QUANTIZERS: dict[str, Callable[[nn.Module, Sequence[str], dict[str, Any]], Quantized]] = {
    "torch": leave_float,
    "sdnq": quantize_sdnq,
    "torchao": quantize_torchao,
}

if __name__ == "__main__":
    main()
