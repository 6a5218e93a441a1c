"""`hadamard-cost`: what full, block and no rotation cost in operations and time, against the SQNR that they gain.

Source: HQ-DiT (arXiv 2405.19751), an open question: is the overhead of the online transform worth it in real time?
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import methodcaller
from typing import Any

import torch
from torch import nn

from hqdit.benchmark.workload import DIT_XL_2
from hqdit.evaluation.fidelity import PAIRS
from hqdit.experiments.laboratory import Laboratory, eps_gain
from hqdit.experiments.noise_floor import noise_floor, reference_rows
from hqdit.experiments.rotation_cost import (
    GEOMETRIES,
    XL,
    BlockGeometry,
    Timing,
    block_operations,
    measure,
    rotations_for,
)
from hqdit.experiments.subjects import SUBJECTS, Subject
from hqdit.experiments.wording import compared, interval_notes, signed_db
from hqdit.kernels.selection import current_backend
from hqdit.models.adapter import adapter_for
from hqdit.pipeline.config import QuantizationConfig
from hqdit.records.run_record import Bars, Cell, Column, Interval, Lines, RunRecord, Series, Table

TOKENS = 512
REPEATS, QUICK_REPEATS = 15, 7
#: Sampler steps of one image in the reckoning for real time.
IMAGE_STEPS = 50
#: dB by which a rotation may be worse than the best one and still count as nearly as good.
CLOSE_DB = 0.1
JUDGED = "guided 1.5"


def run(lab: Laboratory) -> RunRecord:
    """Count, measure, score the bundled models with every rotation, and weigh one against the other."""
    lab.tell("hadamard-cost: time at DiT-XL/2's shapes")
    with all_threads(lab.threads):
        timing = measure(XL, rotations_for(XL), TOKENS, QUICK_REPEATS if lab.is_quick else REPEATS)
    subjects = SUBJECTS[:2] if lab.is_quick else SUBJECTS
    return study(lab, timing, subjects)


@contextmanager
def all_threads(count: int) -> Iterator[None]:
    """Measure the body with `count` threads, as a user would run it; everything else has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def geometry_of(model: nn.Module, name: str) -> BlockGeometry:
    """The widths of a model's blocks, as its adapter shows them."""
    widths = {int(model.get_submodule(site.name).in_features) for site in adapter_for(model).sites(model)}  # type: ignore[arg-type]
    return BlockGeometry(name, min(widths), max(widths))


def study(lab: Laboratory, timing: Timing, subjects: Sequence[Subject]) -> RunRecord:
    """The record from timings and the scores of `subjects`."""
    base = QuantizationConfig.preset("hqdit").replace(gptq=False)
    geometries = {subject.name: geometry_of(subject.model, subject.name) for subject in subjects}
    grid = []
    for subject in subjects:
        kinds = rotations_for(geometries[subject.name])
        grid += [(subject, rotation) for rotation in ((*kinds[:2], "full") if lab.is_quick else kinds)]
    scores: dict[str, dict[str, dict[str, Any]]] = {subject.name: {} for subject in subjects}
    lab.prepare([methodcaller("score", s, base.replace(rotation=r)) for s, r in grid], "models and rotations")
    for subject, rotation in grid:
        scores[subject.name][rotation] = lab.score(subject, base.replace(rotation=rotation))
    floors = {subject.name: noise_floor(lab, subject) for subject in subjects}
    return RunRecord(
        name="hadamard-cost",
        title="What the Hadamard transform costs",
        question="How does the overhead of the rotation compare with what it gains, and what does that mean for real "
        "time?",
        answers=(
            _cost_answer(timing),
            *(_gain_answer(name, geometries[name], found) for name, found in scores.items()),
            _real_time_answer(timing, scores),
        ),
        tables=(
            _operations_table(),
            _time_table(timing),
            *(_score_table(name, geometries[name], found, floors[name]) for name, found in scores.items()),
        ),
        figures=(_time_figure(timing), _trade_figure(geometries, scores)),
        config={
            "tokens": timing.tokens,
            "repeats": len(next(iter(timing.product.values()))),
            "threads": lab.threads,
            "backend": current_backend().description,
            "config": base.to_json(),
            "image_steps": IMAGE_STEPS,
        },
        notes=(
            "Operations are counted from the transforms' plans: stages of additions for the power of two, a small "
            "signed sum for the Paley factor, signs and normalisation. Kernels share partial sums and need fewer for "
            "orders with a Paley factor. Layers for the modulation run once per sample, not per token, and are left "
            "out.",
            "Times are those of calls on the current backend, taken in turns; medians count, and measurements holds "
            "every repeat. In a fused block the same pass also does LayerNorm, modulation or GELU.",
            "SQNR is that of the hqdit preset without GPTQ; gains are paired by trajectory. The best of several "
            "rotations is found on the trajectories that judge it, which flatters its gain.",
            *interval_notes("the rotation's signs"),
        ),
        measurements={"quantize_seconds": timing.quantize, "product_seconds": timing.product},
    )


def _operations_table() -> Table:
    rows: list[tuple[Cell, ...]] = []
    for geometry in GEOMETRIES:
        for rotation in rotations_for(geometry):
            operations, products = block_operations(geometry, rotation)
            rows.append(
                (
                    f"{geometry.name} ({geometry.width}, {geometry.hidden})",
                    rotation,
                    operations,
                    products,
                    100 * operations / products,
                )
            )
    columns = (
        Column("Model"),
        Column("Rotation"),
        Column("Rotations", "operations"),
        Column("Products", "operations"),
        Column("Share", "%", 2, "of the products' operations; lower is better"),
    )
    return Table("Operations of one token in one block", columns, tuple(rows))


def _time_table(timing: Timing) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for rotation, layers in timing.quantize.items():
        spread = [_range(layers[name]) for name in timing.geometry.layers]
        overhead = None if rotation == "none" else _scaled(timing.overhead(rotation), 100)
        rows.append((rotation, *spread, 1e3 * timing.quantize_seconds(rotation), overhead))
    products = [_range(timing.product[name]) for name in timing.geometry.layers]
    rows.append(("product", *products, 1e3 * timing.product_seconds, None))
    columns = (
        Column("Rotation"),
        *(
            Column(name, "ms", 2, "median of a call", interval="fastest and slowest repeat")
            for name in timing.geometry.layers
        ),
        Column("Block", "ms", 2, "median of the layers' sum"),
        Column(
            "Overhead",
            "%",
            1,
            "extra time over rounding and product without a rotation; lower is better",
            interval="95 % interval over repeats",
        ),
    )
    caption = (
        f"Rotation and rounding of {timing.tokens} tokens, and the products that they feed; {timing.geometry.name}"
    )
    return Table("Measured time", columns, tuple(rows), caption)


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(factor * interval.value, factor * interval.low, factor * interval.high)


def _percent(interval: Interval) -> str:
    found = _scaled(interval, 100)
    return f"{found.value:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]"


def _range(seconds: Sequence[float]) -> Interval:
    return Interval(1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds))


def _score_table(
    name: str, geometry: BlockGeometry, found: Mapping[str, dict[str, Any]], floor: Mapping[str, Any]
) -> Table:
    plain = found["none"]
    rows: list[tuple[Cell, ...]] = [
        (label, None, layers, None, judged, None) for label, layers, judged in reference_rows(floor, JUDGED)
    ]
    for rotation, score in found.items():
        operations, products = block_operations(geometry, rotation)
        rows.append(
            (
                rotation,
                100 * operations / products,
                Interval(*score["mean_layer_sqnr_db"]),
                score["mean_layer_sqnr_db"][0] - plain["mean_layer_sqnr_db"][0],
                Interval(*score["eps_sqnr_db"][JUDGED]),
                None if rotation == "none" else _gain(found, rotation),
            )
        )
    columns = (
        Column("Rotation"),
        Column("Operations", "%", 2, "of the products' operations; lower is better"),
        Column("Layer SQNR", "dB", 2, "mean over the layers of each one's output SQNR; higher is better"),
        Column("Gain, layers", "dB", 2, "layer SQNR less that without a rotation"),
        Column("Noise prediction", "dB", 2, "SQNR after guidance 1.5; higher is better"),
        Column("Gain, noise prediction", "dB", 2, "over no rotation, paired by trajectory"),
    )
    caption = f"{PAIRS} held-out trajectories; 95 % bootstrap intervals over trajectories"
    return Table(f"Gain, {name}", columns, tuple(rows), caption)


def _gain(found: Mapping[str, dict[str, Any]], rotation: str) -> Interval:
    return eps_gain(found[rotation], found["none"], JUDGED)


def _time_figure(timing: Timing) -> Bars:
    rotations = tuple(timing.quantize)
    return Bars(
        f"Time of one block of {timing.geometry.name}, {timing.tokens} tokens",
        rotations,
        "time (ms)",
        (
            Series("rotate and quantize", y=tuple(1e3 * timing.quantize_seconds(rotation) for rotation in rotations)),
            Series("products", y=(1e3 * timing.product_seconds,) * len(rotations)),
        ),
    )


def _trade_figure(geometries: Mapping[str, BlockGeometry], scores: Mapping[str, Mapping[str, dict[str, Any]]]) -> Lines:
    series = []
    for name, found in scores.items():
        points = []
        for rotation in found:
            operations, products = block_operations(geometries[name], rotation)
            points.append((100 * operations / products, _gain(found, rotation)))
        points.sort(key=lambda point: point[0])
        y, low, high = (tuple(getattr(gain, end) for _, gain in points) for end in ("value", "low", "high"))
        series.append(Series(name, y, tuple(share for share, _ in points), low, high))
    return Lines(
        "Cost against gain",
        "operations of the rotations (% of the products)",
        "SQNR of the noise prediction gained (dB)",
        tuple(series),
        "points from left to right: none, then rotations by rising cost; the tables name them; bounds: 95 % bootstrap "
        "intervals over trajectories",
    )


def _cost_answer(timing: Timing) -> str:
    parts = []
    for rotation in timing.quantize:
        if rotation != "none":
            operations, products = block_operations(timing.geometry, rotation)
            parts.append(f"{rotation} {100 * operations / products:.2f} % and {_percent(timing.overhead(rotation))}")
    return (
        f"Cost at {timing.geometry.name}'s shapes, in operations of the products and in measured time of rounding and "
        f"product: {'; '.join(parts)}."
    )


def _gain_answer(name: str, geometry: BlockGeometry, found: Mapping[str, dict[str, Any]]) -> str:
    """The best rotation, and the cheapest that is nearly as good."""
    gains = {rotation: _gain(found, rotation) for rotation in found if rotation != "none"}
    best = max(gains, key=lambda rotation: gains[rotation].value)
    if gains[best].low <= 0:
        return (
            f"Gain on {name}: no rotation is better than none in the noise prediction; the highest, {best}, is "
            f"{compared(gains[best])} none ({signed_db(gains[best])})."
        )
    close = [rotation for rotation in found if eps_gain(found[best], found[rotation], JUDGED).high <= CLOSE_DB]
    cheapest = min(close, key=lambda rotation: block_operations(geometry, rotation)[0])
    full = eps_gain(found["full"], found[best], JUDGED)
    against = "" if best == "full" else f"; full is {compared(full)} it ({signed_db(full)})"
    return (
        f"Gain on {name} in the noise prediction: {best} is highest, {compared(gains[best])} none "
        f"({signed_db(gains[best])}){against}; the cheapest that is, by its interval, at most {CLOSE_DB:g} dB below it "
        f"is {cheapest}."
    )


def _real_time_answer(timing: Timing, scores: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """Extra time of an image, beside what every model gains."""
    layers = DIT_XL_2["num_layers"]
    extra = {rotation: timing.extra_seconds(rotation) for rotation in timing.quantize if rotation != "none"}
    fastest = min(extra, key=lambda rotation: extra[rotation])
    gains = {name: _gain(found, "full") for name, found in scores.items()}
    total = layers * (timing.quantize_seconds("none") + timing.product_seconds)
    extra_full, extra_least = layers * extra["full"], layers * extra[fastest]
    worth = "; ".join(f"{name} {signed_db(gain)}, {compared(gain)} none" for name, gain in gains.items())
    return (
        f"Real time: in {layers} blocks of {timing.geometry.name} with {timing.tokens} tokens (one guided image), "
        f"rounding and products take {1e3 * total:.0f} ms a pass. The full rotation adds {1e3 * extra_full:.1f} ms "
        f"({_percent(timing.overhead('full'))}), {IMAGE_STEPS * extra_full:+.2f} s in {IMAGE_STEPS} steps. Its gain in "
        f"the noise prediction of the models scored here: {worth}. The fastest rotation is {fastest} with "
        f"{1e3 * extra_least:.1f} ms a pass ({_percent(timing.overhead(fastest))})."
    )
