"""The demo's results as a record, for its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hqdit.records.run_record import Bars, Figure, ImageGrid, Lines, RunRecord, Series, Table
from hqdit.report.cells import DECIBEL, EXACT
from hqdit.report.tables import DemoRow, columns


def demo_record(
    rows: Sequence[DemoRow],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    images: Sequence[ImageGrid],
    extractor: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    seconds: float,
) -> RunRecord:
    """What `hqdit demo` measured, with its table, figures by layer and by time step, and remarks on its limits.

    Args:
        rows: the table, float32 first among the rows of a model.
        results: model -> plain results of each method, keys as in docs/records.md.
        images: samples beside the record.
        extractor: name of the network behind the Fréchet distance.
        config: settings of the run.
        environment: machine and versions.
        seconds: wall-clock time.

    Raises:
        UsageError: `extractor` has no name.
    """
    table = columns(extractor)
    cells = tuple(tuple(column.value(row) for column in table) for row in rows)
    return RunRecord(
        name="demo",
        title="float32 and 4 bits side by side",
        question="A trained diffusion transformer in float32, and the same model with its weights and activations "
        "quantized to 4 bits: what did quantization change? Samples start from the same noise in every row of a "
        "model.",
        answers=_answers(rows),
        tables=(Table("Results", tuple(column.column for column in table), cells),),
        figures=tuple(figure for label, methods in results.items() for figure in _figures(label, methods)),
        images=tuple(images),
        config=config,
        environment=environment,
        seconds=seconds,
        notes=(
            "The float32 rows of both models compute the same function; small differences are rounding.",
            f"The features behind the Fréchet distance come from {extractor}, a small classifier trained on the same "
            "digits, which stands in for Inception-v3. The distances can be compared with each other inside this table "
            "and at equal sample counts, and with nothing else: not with published FID, and not with another "
            "extractor's numbers.",
            "A Fréchet distance estimated from few samples is too large on average, also for the float32 model. Read "
            "the difference from the float32 row, not the number alone; small differences may be chance.",
            "SQNR compares a quantized model with its own float32 original. It says how faithful the copy is, not how "
            "good the original's images are.",
            "Times and file sizes are those of this machine and this small model. They predict nothing about the speed "
            "or the memory of a large model on another device.",
        ),
    )


def _answers(rows: Sequence[DemoRow]) -> tuple[str, ...]:
    """One sentence for each model: what the sampler sees, by method."""
    sentences = []
    for model in dict.fromkeys(row.model for row in rows):
        parts = []
        for row in rows:
            if row.model == model:
                ratio = "" if row.eps_sqnr_db is None else f"{_decibels(row.eps_sqnr_db)} and "
                parts.append(f"{row.method} {ratio}{100 * row.class_accuracy:.1f} %")
        sentences.append(
            f"{model}, SQNR of the guided noise prediction and share of samples in the class asked for: "
            f"{'; '.join(parts)}."
        )
    return tuple(sentences)


def _decibels(ratio: float) -> str:
    return f"{ratio:.1f} {DECIBEL}" if math.isfinite(ratio) else EXACT if ratio > 0 else f"{ratio} {DECIBEL}"


def _figures(label: str, methods: Sequence[Mapping[str, Any]]) -> list[Figure]:
    quantized = [result for result in methods if result["layer_sqnr_db"]]
    if not quantized:
        return []
    layers = tuple(dict.fromkeys(name for result in quantized for name in result["layer_sqnr_db"]))
    by_layer = Bars(
        f"{label}: layers",
        layers,
        "layer output SQNR (dB)",
        tuple(Series(r["method"], tuple(r["layer_sqnr_db"].get(name) for name in layers)) for r in quantized),
        "SQNR of each layer's output, judged alone on the float model's inputs; higher is better.",
    )
    by_timestep = Lines(
        f"{label}: time steps",
        "time step: sampling runs from left (noise) to right (image)",
        "noise prediction SQNR (dB)",
        tuple(
            Series(
                result["method"],
                y=tuple(db for _, db in result["eps_sqnr_db_by_timestep"]),
                x=tuple(float(step) for step, _ in result["eps_sqnr_db_by_timestep"]),
            )
            for result in quantized
        ),
        "SQNR of the guided noise prediction at each time step; higher is better.",
    )
    return [by_layer, by_timestep]
