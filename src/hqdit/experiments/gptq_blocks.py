"""Whether GPTQ's block size matters: part of the experiment `calibration`.

Source: GPTQ (arXiv 2210.17323), section 3.3: blocks of columns change the order of the sums, not what is summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from hqdit.calibration.capture import BlockStream
from hqdit.calibration.samples import CalibrationSet
from hqdit.evaluation.bootstrap import bootstrap_mean
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.subjects import Subject
from hqdit.gptq.hessian import HessianAccumulator
from hqdit.gptq.solver import BLOCK_COLUMNS, gptq_quantize, hessian_error
from hqdit.kernels.activation import quantize_activation
from hqdit.models.adapter import LinearSite, adapter_for
from hqdit.numerics.error import decibel
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.quantizers.quantized_tensor import round_to_nearest
from hqdit.records.run_record import Column, Table
from hqdit.transforms.rotation import rotate, rotate_online

#: What the intervals of means over layers are, for columns.
OVER_LAYERS = "95 % interval over layers, not over models"


def block_sizes(
    lab: Laboratory, subject: Subject, config: QuantizationConfig, sizes: Sequence[int], samples: int
) -> dict[str, Any]:
    """GPTQ of the layers of the first and the last block with every block size.

    Args:
        lab: gives calibration data, of its own seed (seen) and of the next one (unseen).
        subject: the model.
        config: with GPTQ.
        sizes: columns per block.
        samples: calibration samples on either side.

    Returns:
        block size -> `seen` and `unseen`: dB by which the error, weighted by the Hessian of these samples, is below
        that of rounding to nearest, lists over layers; `changed`: share of each layer's codes that are not those of
        blocks of `BLOCK_COLUMNS`.
    """
    model = lab.quantized(subject, config, lab.calibration(subject, samples))
    adapter = adapter_for(subject.model)
    last = len(adapter.blocks(subject.model)) - 1
    sites = [site for site in adapter.sites(subject.model) if site.block in (0, last) and not site.is_modulation]
    sides = {
        "seen": (lab.calibration(subject, samples), lab.seed),
        "unseen": (lab.calibration(subject, samples, seed=lab.seed + 1), lab.seed + 1),
    }
    hessians = {side: _hessians(subject.model, model, sites, *drawn) for side, drawn in sides.items()}
    layers = quantized_layers(model)
    found: dict[str, Any] = {str(size): {"seen": [], "unseen": [], "changed": []} for size in sizes}
    for site in sites:
        layer, linear = layers[site.name], subject.model.get_submodule(site.name)
        weight = rotate(linear.get_parameter("weight").detach().double(), layer.spec.rotation, layer.signs)
        settled = (layer.effective_scale, layer.spec.weight, layer.format_index)
        nearest = round_to_nearest(weight, *settled).dequantize()
        usual, _ = gptq_quantize(weight, hessians["seen"][site.name], *settled, block_columns=BLOCK_COLUMNS)
        for size in sizes:
            rounded, _ = gptq_quantize(weight, hessians["seen"][site.name], *settled, block_columns=size)
            found[str(size)]["changed"].append(float((rounded.codes != usual.codes).double().mean()))
            for side, of_layer in hessians.items():
                before, after = (
                    float(hessian_error(weight, numbers, of_layer[site.name]).sum())
                    for numbers in (nearest, rounded.dequantize())
                )
                found[str(size)][side].append(decibel(before, after))
    return found


def _hessians(
    exact: nn.Module, quantized: nn.Module, sites: list[LinearSite], data: CalibrationSet, seed: int
) -> dict[str, Tensor]:
    """Hessian of each site's rotated, quantized inputs along the float model."""
    stream, layers = BlockStream(exact, data, seed), quantized_layers(quantized)
    found: dict[str, Tensor] = {}
    for block in range(len(adapter_for(exact).blocks(exact))):
        for site in sites:
            if site.block != block:
                continue
            layer = layers[site.name]
            accumulator = HessianAccumulator(layer.in_features)

            def accumulate(x: Tensor, layer: Any = layer, accumulator: HessianAccumulator = accumulator) -> None:
                rotated = rotate_online(x, layer.spec.rotation, layer.signs)
                accumulator.add(quantize_activation(rotated, layer.spec.activation, layer.static_scale).dequantize())

            stream.capture(site, accumulate, f"Hessian of {site.name}")
            found[site.name] = accumulator.hessian
        stream.advance(block)
    return found


def block_table(name: str, blocks: Mapping[str, Any], samples: int) -> Table:
    """What `block_sizes` found."""
    columns = (
        Column("Columns per block"),
        Column("Layers"),
        Column(
            "Gain, seen",
            "dB",
            3,
            "weighted error against rounding to nearest on the calibration samples, mean over layers",
            interval=OVER_LAYERS,
        ),
        Column("Gain, unseen", "dB", 3, "the same on samples of another seed", interval=OVER_LAYERS),
        Column("Changed codes", "%", 4, f"codes that differ from those with blocks of {BLOCK_COLUMNS} columns"),
    )
    rows = tuple(
        (
            size,
            len(found["seen"]),
            bootstrap_mean(found["seen"]),
            bootstrap_mean(found["unseen"]),
            100 * fmean(found["changed"]),
        )
        for size, found in blocks.items()
    )
    caption = f"layers of the first and the last block; {samples} samples a side"
    return Table(f"GPTQ block size, {name}", columns, rows, caption)


def block_answer(blocks: Mapping[str, Any]) -> str:
    """How far results move over the block sizes."""
    gains = [fmean(found["unseen"]) for found in blocks.values()]
    changed = max(fmean(found["changed"]) for found in blocks.values())
    spread = max(gains) - min(gains)
    return (
        f"Block size: over blocks of {', '.join(blocks)} columns, at most {changed:.2%} of the codes change and the "
        f"gain on unseen samples moves by {spread:.4f} dB."
    )
