"""`hqdit analyze` on a quantized model beside its float original: where the error arises, formats and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hqdit.analysis.moments import Float64Array
from hqdit.analysis.weights import format_shares
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.records.run_record import (
    Bars,
    Column,
    FormatMap,
    Heatmap,
    ImageGrid,
    Interval,
    Lines,
    RunRecord,
    Series,
    Table,
)


@dataclass(frozen=True)
class Fidelity:
    """Plain results of the paired measurements.

    Attributes:
        noise_db: branch -> SQNR of the noise prediction with its interval, in dB.
        timesteps: in the order of sampling.
        noise_db_by_timestep: branch -> SQNR at each time step, in dB.
        layer_db: layer -> output SQNR alone, in dB.
        block_db: SQNR of the hidden state after each block, float64 (timesteps, blocks), in dB.
        sample_psnr_db: of the images, mean over those that differ, with its interval; None if all are equal.
        images: how many pairs.
    """

    noise_db: Mapping[str, Interval]
    timesteps: Sequence[int]
    noise_db_by_timestep: Mapping[str, Sequence[float]]
    layer_db: Mapping[str, float]
    block_db: Float64Array
    sample_psnr_db: Interval | None
    images: int


def quantized_model_record(
    name: str, model: nn.Module, sizes: Mapping[str, Any], found: Fidelity, grids: Sequence[ImageGrid]
) -> RunRecord:
    """The analysis of a quantized model; environment, settings and duration are the caller's to add.

    Args:
        name: of the model, for people.
        model: the quantized model.
        sizes: from `analysis.inspection.size_facts`.
        found: how it compares with its original.
        grids: pictures beside the record.
    """
    layers = quantized_layers(model)
    shares = {layer: format_shares(module) for layer, module in layers.items()}
    steps = tuple(map(float, found.timesteps))
    return RunRecord(
        name="analysis",
        title=f"Analysis of {name}",
        question="How far is the quantized model from its float original, where does the error arise, and what does "
        "each layer hold?",
        answers=_answers(found, sizes),
        tables=(_summary(found, sizes), _layer_table(model, found)),
        figures=(
            Bars(
                "Error by layer",
                tuple(found.layer_db),
                "layer output SQNR (dB)",
                (Series("alone, on the float model's inputs", tuple(found.layer_db.values())),),
                "Each layer is judged alone; higher is better.",
            ),
            Lines(
                "Error by time step",
                "time step: sampling runs from left (noise) to right (image)",
                "noise prediction SQNR (dB)",
                tuple(Series(branch, tuple(db), steps) for branch, db in found.noise_db_by_timestep.items()),
                "Both models see the same noisy latents at every step; higher is better.",
            ),
            Heatmap(
                "Error by block and time step",
                tuple(str(block) for block in range(found.block_db.shape[1])),
                tuple(str(step) for step in found.timesteps),
                tuple(tuple(map(float, row)) for row in found.block_db.T),
                "hidden state SQNR (dB)",
                "SQNR of the hidden state after each block; errors accumulate over the blocks.",
                x_label="time step: sampling runs from left (noise) to right (image)",
                y_label="block",
            ),
            FormatMap("Formats of the weights", tuple(shares), tuple(shares.values()), "As the checkpoint holds them."),
        ),
        images=tuple(grids),
        notes=(
            "Intervals are 95 % bootstrap intervals over trajectories (noise prediction) and images (PSNR).",
            "Layers and hidden states are compared on the conditional branch.",
        ),
    )


def _summary(found: Fidelity, sizes: Mapping[str, Any]) -> Table:
    columns = (Column("Measure"), Column("Value"), Column("Meaning"))
    rows = [
        (f"Noise prediction, {branch}", _db(interval), "SQNR over all time steps; higher is better")
        for branch, interval in found.noise_db.items()
    ]
    rows += [
        (
            f"PSNR of {found.images} samples",
            "exact" if found.sample_psnr_db is None else _db(found.sample_psnr_db),
            "against the float model's samples from the same noise; higher is better",
        ),
        ("Bits per weight", f"{sizes['bits_per_weight']:.2f}", "of the quantized layers, scales included"),
        ("Bits per parameter", f"{sizes['bits_per_parameter']:.2f}", "of the weight files, everything included"),
        (
            "Weight files",
            f"{sizes['file_bytes']:,} bytes",
            f"float32 would take {sizes['file_ratio']:.2f} times as many",
        ),
    ]
    return Table("Summary", columns, tuple(rows))


def _db(interval: Interval) -> str:
    return f"{interval.value:.2f} dB [{interval.low:.2f}, {interval.high:.2f}]"


def _layer_table(model: nn.Module, found: Fidelity) -> Table:
    columns = (
        Column("Layer"),
        Column("Output SQNR", "dB", 2, "of the layer alone, on the float model's inputs; higher is better"),
        Column("Weight format", meaning="with shares of the output channels where there are several"),
        Column("Activation"),
        Column("Rotation"),
        Column("Bits per weight", "", 2, "codes, scales, format indices and signs"),
        Column("Bytes", "", 0, "everything that the layer stores but its bias"),
    )
    rows = []
    for name, layer in quantized_layers(model).items():
        shares = format_shares(layer)
        formats = ", ".join(shares if len(shares) == 1 else (f"{f} {100 * s:.0f} %" for f, s in shares.items()))
        rows.append(
            (
                name,
                found.layer_db[name],
                formats,
                f"{layer.spec.activation.format.name} per {layer.spec.activation.granularity}",
                layer.spec.rotation.describe(),
                8 * layer.storage_bytes / (layer.in_features * layer.out_features),
                layer.storage_bytes,
            )
        )
    return Table("Layers", columns, tuple(rows))


def _answers(found: Fidelity, sizes: Mapping[str, Any]) -> tuple[str, ...]:
    branch, interval = list(found.noise_db.items())[-1]
    weakest = sorted(found.layer_db.items(), key=lambda item: item[1])[:3]
    by_step = list(zip(found.noise_db_by_timestep[branch], found.timesteps, strict=True))
    hardest, easiest = min(by_step), max(by_step)
    last = found.block_db[:, -1]
    return (
        f"The {branch} noise prediction keeps {_db(interval)}, at {sizes['bits_per_weight']:.2f} bits per quantized "
        "weight.",
        f"By time step it lies between {hardest[0]:.1f} dB at t = {hardest[1]} and {easiest[0]:.1f} dB at "
        f"t = {easiest[1]}; that of the hidden state after the last block between {last.min():.1f} dB and "
        f"{last.max():.1f} dB.",
        "Weakest layers: " + ", ".join(f"{name} {db:.1f} dB" for name, db in weakest) + ".",
    )
