"""`table-w4a4`: methods and bit widths on every subject, and images at W4A4. Which of the paper's orderings hold?

Source: HQ-DiT (arXiv 2405.19751), the comparison with MinMax, SmoothQuant, FPQ and GPTQ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

from hqdit.evaluation.fidelity import PAIRS
from hqdit.experiments.image_scores import (
    FLOAT32,
    OTHER_SEED,
    OTHER_SEEDS,
    float_jobs,
    image_rows,
    image_table,
    method_jobs,
)
from hqdit.experiments.laboratory import Job, Laboratory, eps_gain, pooled
from hqdit.experiments.noise_floor import FLOOR, noise_floor
from hqdit.experiments.subjects import SUBJECTS, Subject
from hqdit.experiments.wording import signed_db
from hqdit.pipeline.config import QuantizationConfig
from hqdit.records.run_record import Bars, Cell, Column, Interval, RunRecord, Series, Table
from hqdit.sampling.sampler import SamplingConfig

METHODS = (
    "minmax",
    "minmax-int4",
    "smoothquant",
    "fpq",
    "gptq",
    "quarot",
    "svdquant",
    "hqdit",
    "hqdit-no-rotation",
    "hqdit-fixed-format",
    "hqdit-no-gptq",
    "hqdit-channel",
)
BITS = ("W8A8", "W4A8", "W4A6", "W4A4")
QUICK_BITS = ("W4A8", "W4A4")
IMAGE_METHODS = ("minmax", "quarot", "svdquant", *(name for name in METHODS if name.startswith("hqdit")))
LONG_METHODS = ("minmax", "hqdit")
#: Those that are scored with several draws of rotation signs at W4A4, because their orderings are close.
DRAWN_METHODS = ("quarot", "hqdit", "hqdit-fixed-format", "hqdit-no-gptq", "hqdit-channel")
#: Rank 32 on DiT-XL/2's 1,152 channels is a thirty-sixth of the width; the bundled models get the same share.
LOW_RANK = 4

#: (better, worse, what the paper claims or implies), judged by the guided noise prediction at W4A4.
ORDERINGS = (
    ("hqdit", "minmax", "hqdit is better than min-max rounding"),
    ("hqdit", "smoothquant", "hqdit is better than SmoothQuant"),
    ("hqdit", "fpq", "hqdit is better than FPQ"),
    ("hqdit", "gptq", "hqdit is better than GPTQ on the integer grid"),
    (
        "fpq",
        "minmax",
        "preset fpq (searched formats, static scales) is better than preset minmax (dynamic scales per token)",
    ),
    ("minmax", "minmax-int4", "the floating point grid is better than the integer grid without a rotation"),
    ("hqdit", "quarot", "the floating point grid is better than the integer grid after the rotation"),
    ("hqdit", "hqdit-no-rotation", "the rotation helps"),
    ("hqdit", "hqdit-fixed-format", "choosing the format per layer helps"),
    ("hqdit", "hqdit-no-gptq", "GPTQ helps"),
    ("hqdit-channel", "hqdit", "static scales per channel are better than dynamic scales per token"),
    (
        "svdquant",
        "hqdit",
        "preset svdquant (later work: smoothing, a low-rank branch, INT4 to nearest) is better than preset hqdit",
    ),
)
JUDGED = "guided 1.5"

#: (subject, bits, method) -> what `Laboratory.score` returned.
Scores = Mapping[tuple[str, str, str], dict[str, Any]]
#: (subject, method) -> the same at W4A4 for every draw of rotation signs.
Draws = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def method_config(method: str, bits: str = "W4A4") -> QuantizationConfig:
    """The preset, with the low rank brought to the width of the bundled models."""
    config = QuantizationConfig.preset(method, bits)
    return config.replace(low_rank=LOW_RANK) if config.low_rank else config


def run(lab: Laboratory) -> RunRecord:
    """Score the whole grid, draw images for its last column, and compare the orderings with the paper's."""
    subjects, bit_widths = lab.subjects(SUBJECTS), QUICK_BITS if lab.is_quick else BITS
    pictures = _pictures(lab, subjects)
    _prepare(lab, subjects, bit_widths, pictures)
    scores = {
        (subject.name, bits, method): lab.score(subject, method_config(method, bits))
        for subject in subjects
        for bits in bit_widths
        for method in METHODS
    }
    draws = {
        (subject.name, method): [
            lab.score(subject, method_config(method), draw=draw) for draw in _draws_of(lab, method)
        ]
        for subject in subjects
        for method in METHODS
    }
    floors = {subject.name: noise_floor(lab, subject) for subject in subjects}
    tables, images, measured = [], [], {}
    for subject in subjects:
        tables += [
            _grid_table(lab, subject, bit_widths, scores, floors[subject.name]),
            _layer_table(subject, bit_widths, scores, floors[subject.name]),
            _detail_table(subject, scores, draws, floors[subject.name]),
        ]
    for subject, methods, sampling, title, has_grids in pictures:
        seeds = _other_seeds(has_grids)
        rows, grids = image_rows(lab, subject, methods, sampling, has_grids=has_grids, other_seeds=seeds)
        tables.append(image_table(f"Images, {subject.name}: W4A4, {_how(sampling)}", rows, subject))
        images += grids
        measured[title] = rows
    return RunRecord(
        name="table-w4a4",
        title="Methods and bit widths",
        question="Which of the paper's orderings among quantization methods hold on models that can be trained here?",
        answers=(*_orderings([subject.name for subject in subjects], draws), _distance_answer(measured)),
        tables=tuple(tables),
        figures=tuple(_figure(subject, bit_widths, scores) for subject in subjects),
        images=tuple(images),
        config={
            "methods": list(METHODS),
            "bits": list(bit_widths),
            "draws": lab.draws,
            "drawn_methods": list(DRAWN_METHODS),
            "low_rank": LOW_RANK,
            "images": lab.image_count,
            "long_steps": lab.long_steps,
            "long_images": lab.images_of(SamplingConfig(lab.long_steps)),
        },
        notes=(
            "SQNR of the noise prediction is measured on 32 held-out trajectories of the float model at every step of "
            "the sampler; intervals are 95 % bootstrap intervals over trajectories.",
            f"svdquant keeps a low-rank branch of rank {LOW_RANK} in 16 bits: the share of the width that rank 32 is "
            "on DiT-XL/2. Its bits per weight count that branch. Its 4-bit rest has scales per channel and token, not "
            "per group of 64 as published, so that every method here has scales of one granularity.",
            "fpq rounds the weight after its channels were shifted, the published code before: weaker without outliers "
            "in the activations, stronger with compensated ones (docs/method.md).",
            "All orderings are judged by the SQNR of the noise prediction, the paper's by FID and sFID. "
            f"{', '.join(DRAWN_METHODS)} are judged at W4A4 with {lab.draws} draw(s) of rotation signs: an ordering "
            "counts as settled on a model only where the interval of the draws' pooled error leaves out zero and every "
            "draw has the same sign. Tables show the first draw; calibration data is drawn once. Dozens of 95 % "
            "intervals are read at once here, of which a few are expected to miss.",
            f"{FLOOR}: the float model's output against its own from other noise and another class at the same time "
            "step, the least that a method has to beat. The row float32 is exact by definition: paired measures "
            "compare with it.",
            "Fréchet distances are on the features of small classifiers trained on the same data, not on Inception's.",
        ),
        measurements={
            "images": measured,
            "layer_sqnr_db": {
                subject.name: {
                    bits: {method: scores[subject.name, bits, method]["layer_sqnr_db"] for method in METHODS}
                    for bits in bit_widths
                }
                for subject in subjects
            },
        },
    )


#: Subject, methods, sampling, key in the measurements, and whether pictures are kept.
_Pictures = list[tuple[Subject, dict[str, QuantizationConfig], SamplingConfig, str, bool]]


def _pictures(lab: Laboratory, subjects: Sequence[Subject]) -> _Pictures:
    """The tables of images: guided ones of every model, longer and otherwise guided ones of those without outliers."""
    found: _Pictures = []
    for subject in subjects:
        methods = {name: method_config(name) for name in IMAGE_METHODS}
        if lab.is_full:
            methods |= {f"{name} {bits}": method_config(name, bits) for bits in BITS for name in METHODS}
        found.append((subject, methods, lab.sampling, subject.name, True))
    for subject in (subject for subject in subjects if subject.outlier_factor == 1):
        for guidance in (0.0, 4.0):
            sampling = SamplingConfig(lab.long_steps, guidance)
            methods = {name: method_config(name) for name in (METHODS if lab.is_full else LONG_METHODS)}
            found.append((subject, methods, sampling, f"{subject.name}, {_how(sampling)}", False))
    return found


def _other_seeds(has_grids: bool) -> tuple[int, ...]:
    """All of them beside the guided images; one where an image takes five times as many steps."""
    return tuple(OTHER_SEEDS) if has_grids else (1,)


def _draws_of(lab: Laboratory, method: str) -> range:
    return range(lab.draws if method in DRAWN_METHODS else 1)


def _prepare(lab: Laboratory, subjects: Sequence[Subject], bit_widths: Sequence[str], pictures: _Pictures) -> None:
    """Fill the cache: scores and the float model's images first, then the images that are compared with those."""
    cells: list[Job] = []
    for subject, _, sampling, _, has_grids in pictures:
        cells += float_jobs(subject, sampling, _other_seeds(has_grids))
    for subject in subjects:
        cells.append(partial(noise_floor, subject=subject))
        # The exponent search takes longest; begun last, it would keep one worker busy after the others.
        slow_first = sorted(METHODS, key=lambda name: not method_config(name).format_search)
        # With 8-bit weights some methods are the same.
        configs = dict.fromkeys(method_config(method, bits) for method in slow_first for bits in bit_widths)
        cells += [methodcaller("score", subject, config) for config in configs]
        for method in DRAWN_METHODS:
            config = method_config(method)
            cells += [methodcaller("score", subject, config, draw=draw) for draw in _draws_of(lab, method)[1:]]
    lab.prepare(cells, "methods and bit widths")
    rows: list[Job] = []
    for subject, methods, sampling, _, _ in pictures:
        rows += method_jobs(subject, methods.values(), sampling)
    lab.prepare(rows, "images")


def _how(sampling: SamplingConfig) -> str:
    kind = "unconditional" if sampling.guidance == 0 else f"guidance {sampling.guidance:g}"
    return f"{sampling.steps} steps, {kind}"


def _interval(score: Mapping[str, Any], branch: str) -> Cell:
    found = score["eps_sqnr_db"].get(branch)
    return None if found is None else Interval(*found)


def _grid_table(
    lab: Laboratory, subject: Subject, bit_widths: Sequence[str], scores: Scores, floor: Mapping[str, Any]
) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (FLOAT32, *(math.inf for _ in bit_widths)),
        (FLOOR, *(_interval(floor, JUDGED) for _ in bit_widths)),
    ]
    rows += [
        (method, *(_interval(scores[subject.name, bits, method], JUDGED) for bits in bit_widths)) for method in METHODS
    ]
    meaning = "SQNR of the noise prediction after guidance 1.5; higher is better"
    return Table(
        f"Noise prediction after guidance 1.5, {subject.name}",
        (Column("Method"), *(Column(bits, "dB", 2, meaning) for bits in bit_widths)),
        tuple(rows),
        f"{PAIRS} held-out trajectories of {lab.sampling.steps} steps; 95 % bootstrap intervals over trajectories",
    )


def _layer_table(subject: Subject, bit_widths: Sequence[str], scores: Scores, floor: Mapping[str, Any]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (FLOAT32, *(math.inf for _ in bit_widths)),
        (FLOOR, *(Interval(*floor["mean_layer_sqnr_db"]) for _ in bit_widths)),
    ]
    rows += [
        (m, *(Interval(*scores[subject.name, bits, m]["mean_layer_sqnr_db"]) for bits in bit_widths)) for m in METHODS
    ]
    meaning = "mean over the layers of each one's output SQNR on float inputs; higher is better"
    columns = (Column("Method"), *(Column(bits, "dB", 2, meaning) for bits in bit_widths))
    counted = (
        f"{len(floor['layer_sqnr_db'])} layers, on the same trajectories as the noise prediction; 95 % bootstrap "
        "intervals over trajectories"
    )
    return Table(f"Layers alone, {subject.name}", columns, tuple(rows), counted)


def _detail_table(subject: Subject, scores: Scores, draws: Draws, floor: Mapping[str, Any]) -> Table:
    columns = (
        Column("Method"),
        Column("Bits per weight", "", 2, "codes, scales, signs and low-rank branches of the quantized layers"),
        Column("Conditional", "dB", 2, "SQNR of the noise prediction with the class"),
        Column("Unconditional", "dB", 2, "SQNR of the noise prediction with the null class"),
        Column("Guided 4", "dB", 2, "SQNR after guidance 4.0"),
        Column(
            "Guided 1.5, all draws",
            "dB",
            2,
            "SQNR after guidance 1.5, mean over draws of rotation signs",
            interval="lowest and highest draw",
        ),
        Column("Time", "s", 1, "wall-clock time of quantization with one thread, without drawing calibration data"),
    )
    shown = ("conditional", "unconditional", "guided 4")
    rows: list[tuple[Cell, ...]] = [
        (FLOAT32, 32.0, *(math.inf for _ in shown), None, None),
        (FLOOR, None, *(_interval(floor, branch) for branch in shown), None, None),
    ]
    for method in METHODS:
        score = scores[subject.name, "W4A4", method]
        values = [found["eps_sqnr_db"][JUDGED][0] for found in draws[subject.name, method]]
        over_draws = Interval(math.fsum(values) / len(values), min(values), max(values)) if len(values) > 1 else None
        rows.append(
            (
                method,
                score["bits_per_weight"],
                *(_interval(score, branch) for branch in shown),
                over_draws,
                score["quantize_seconds"],
            )
        )
    return Table(f"W4A4 in detail, {subject.name}", columns, tuple(rows))


def _figure(subject: Subject, bit_widths: Sequence[str], scores: Scores) -> Bars:
    series = []
    for bits in bit_widths:
        found = [scores[subject.name, bits, method]["eps_sqnr_db"][JUDGED] for method in METHODS]
        value, low, high = (tuple(entry[k] for entry in found) for k in range(3))
        series.append(Series(bits, y=value, low=low, high=high))
    return Bars(
        f"Methods on {subject.name}",
        METHODS,
        "SQNR of the noise prediction, guided 1.5 (dB)",
        tuple(series),
        "bars: all 32 trajectories; whiskers: 95 % bootstrap intervals over trajectories",
    )


def _orderings(names: Sequence[str], draws: Draws) -> list[str]:
    """One sentence for each ordering: on how many subjects it holds, and by how much."""
    sentences = []
    for better, worse, claim in ORDERINGS:
        compared = [_compared(draws[name, better], draws[name, worse]) for name in names]
        holds = sum(gain.low > 0 and min(by_draw) > 0 for gain, by_draw in compared)
        fails = sum(gain.high < 0 and max(by_draw) < 0 for gain, by_draw in compared)
        if holds == len(names):
            verdict = "holds"
        elif fails == len(names):
            verdict = "does not hold"
        else:
            verdict = f"holds on {holds} of {len(names)} models, the opposite does on {fails}"
        parts = []
        for name, (gain, by_draw) in zip(names, compared, strict=True):
            spread = f", draws {min(by_draw):+.2f} to {max(by_draw):+.2f}" if len(by_draw) > 1 else ""
            parts.append(f"{name} {signed_db(gain)}{spread}")
        sentences.append(f"{claim[0].upper()}{claim[1:]}: {verdict} ({'; '.join(parts)}).")
    return sentences


def _compared(better: Sequence[Mapping[str, Any]], worse: Sequence[Mapping[str, Any]]) -> tuple[Interval, list[float]]:
    """The gain of the errors pooled over draws, and that of every draw; a method without draws meets each of them."""
    count = max(len(better), len(worse))
    by_draw = [eps_gain(better[k % len(better)], worse[k % len(worse)], JUDGED).value for k in range(count)]
    return eps_gain(pooled(better, JUDGED), pooled(worse, JUDGED), JUDGED), by_draw


def _distance_answer(measured: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The paper's claim of a distance close to the float model's, in figures of ours, beside the noise floor."""
    parts = []
    for name, rows in measured.items():
        found = {row["method"]: "{:.2f} [{:.2f}, {:.2f}]".format(*row["frechet"]) for row in rows}
        parts.append(
            f"{name}: {found['hqdit']} against {found[FLOAT32]} (float32 from other noise {found[OTHER_SEED]})"
        )
    return "Fréchet distance to held-out images, hqdit W4A4 against float32: " + "; ".join(parts) + "."
