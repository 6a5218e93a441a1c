"""`table-w4a4`: methods and bit widths on every subject, and images at W4A4. Which of the paper's orderings hold?

Source: HQ-DiT (arXiv 2405.19751), the comparison with MinMax, SmoothQuant, FPQ and GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hqdit.experiments.image_scores import FLOAT32, OTHER_SEED, image_rows, image_table
from hqdit.experiments.laboratory import Laboratory, eps_gain
from hqdit.experiments.subjects import SUBJECTS, Subject
from hqdit.pipeline.config import QuantizationConfig
from hqdit.progress import track
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


def method_config(method: str, bits: str = "W4A4") -> QuantizationConfig:
    """The preset, with the low rank brought to the width of the bundled models."""
    config = QuantizationConfig.preset(method, bits)
    return config.replace(low_rank=LOW_RANK) if config.low_rank else config


def run(lab: Laboratory) -> RunRecord:
    """Score the whole grid, draw images for its last column, and compare the orderings with the paper's."""
    subjects, bit_widths = lab.subjects(SUBJECTS), QUICK_BITS if lab.is_quick else BITS
    grid = [(subject, bits, method) for subject in subjects for bits in bit_widths for method in METHODS]
    scores = {
        (subject.name, bits, method): lab.score(subject, method_config(method, bits))
        for subject, bits, method in track(grid, "methods and bit widths")
    }
    tables, images, measured = [], [], {}
    for subject in subjects:
        tables += [
            _grid_table(subject, bit_widths, scores),
            _layer_table(subject, bit_widths, scores),
            _detail_table(subject, scores),
        ]
    for subject in subjects:
        methods = {name: method_config(name) for name in IMAGE_METHODS}
        if lab.is_full:
            methods |= {f"{name} {bits}": method_config(name, bits) for bits in BITS for name in METHODS}
        rows, grids = image_rows(lab, subject, methods, lab.sampling)
        tables.append(image_table(f"Images, {subject.name}: W4A4, {_how(lab.sampling)}", rows, subject))
        images += grids
        measured[subject.name] = rows
    for subject in (subject for subject in subjects if subject.outlier_factor == 1):
        for guidance in (0.0, 4.0):
            sampling = SamplingConfig(lab.long_steps, guidance)
            chosen = {name: method_config(name) for name in (METHODS if lab.is_full else LONG_METHODS)}
            rows, _ = image_rows(lab, subject, chosen, sampling, has_grids=False)
            tables.append(image_table(f"Images, {subject.name}: W4A4, {_how(sampling)}", rows, subject))
            measured[f"{subject.name}, {_how(sampling)}"] = rows
    return RunRecord(
        name="table-w4a4",
        title="Methods and bit widths",
        question="Which of the paper's orderings among quantization methods hold on models that can be trained here?",
        answers=(*_orderings([subject.name for subject in subjects], scores), _distance_answer(measured)),
        tables=tuple(tables),
        figures=tuple(_figure(subject, bit_widths, scores) for subject in subjects),
        images=tuple(images),
        config={
            "methods": list(METHODS),
            "bits": list(bit_widths),
            "low_rank": LOW_RANK,
            "images": lab.image_count,
            "long_steps": lab.long_steps,
        },
        notes=(
            "SQNR of the noise prediction is measured on 32 held-out trajectories of the float model at every step of "
            "the sampler; intervals are 95 % bootstrap intervals over trajectories.",
            f"svdquant keeps a low-rank branch of rank {LOW_RANK} in 16 bits: the share of the width that rank 32 is "
            "on DiT-XL/2. Its bits per weight count that branch. Its 4-bit rest has scales per channel and token, not "
            "per group of 64 as published, so that every method here has scales of one granularity.",
            "fpq rounds the weight after its channels were shifted, the published code before: weaker without outliers "
            "in the activations, stronger with compensated ones (docs/method.md).",
            "All orderings are judged by the SQNR of the noise prediction, the paper's by FID and sFID. They are for "
            "one draw of rotation signs and calibration data: another draw moves a figure by a few tenths of a dB and "
            "can turn a close ordering around, that of the choice of formats for one. Dozens of 95 % intervals are "
            "read at once here, of which a few are expected to miss.",
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


def _how(sampling: SamplingConfig) -> str:
    kind = "unconditional" if sampling.guidance == 0 else f"guidance {sampling.guidance:g}"
    return f"{sampling.steps} steps, {kind}"


def _interval(score: dict[str, Any], branch: str) -> Cell:
    found = score["eps_sqnr_db"].get(branch)
    return None if found is None else Interval(*found)


def _grid_table(subject: Subject, bit_widths: Sequence[str], scores: Scores) -> Table:
    rows = [
        (method, *(_interval(scores[subject.name, bits, method], JUDGED) for bits in bit_widths)) for method in METHODS
    ]
    meaning = "SQNR of the noise prediction after guidance 1.5; higher is better"
    return Table(
        f"Noise prediction after guidance 1.5, {subject.name}",
        (Column("Method"), *(Column(bits, "dB", 2, meaning) for bits in bit_widths)),
        tuple(rows),
    )


def _layer_table(subject: Subject, bit_widths: Sequence[str], scores: Scores) -> Table:
    rows = [(m, *(scores[subject.name, bits, m]["mean_layer_sqnr_db"] for bits in bit_widths)) for m in METHODS]
    meaning = "mean over the layers of each one's output SQNR on float inputs; higher is better"
    columns = (Column("Method"), *(Column(bits, "dB", 2, meaning) for bits in bit_widths))
    return Table(f"Layers alone, {subject.name}", columns, tuple(rows))


def _detail_table(subject: Subject, scores: Scores) -> Table:
    columns = (
        Column("Method"),
        Column("Bits per weight", "", 2, "codes, scales, signs and low-rank branches of the quantized layers"),
        Column("Conditional", "dB", 2, "SQNR of the noise prediction with the class"),
        Column("Unconditional", "dB", 2, "SQNR of the noise prediction with the null class"),
        Column("Guided 4", "dB", 2, "SQNR after guidance 4.0"),
        Column("Time", "s", 1, "wall-clock time of quantization, without drawing calibration data"),
    )
    rows = []
    for method in METHODS:
        score = scores[subject.name, "W4A4", method]
        rows.append(
            (
                method,
                score["bits_per_weight"],
                *(_interval(score, branch) for branch in ("conditional", "unconditional", "guided 4")),
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


def _orderings(names: Sequence[str], scores: Scores) -> list[str]:
    """One sentence for each ordering: on how many subjects it holds, and by how much."""
    sentences = []
    for better, worse, claim in ORDERINGS:
        gains = [eps_gain(scores[name, "W4A4", better], scores[name, "W4A4", worse], JUDGED) for name in names]
        holds, fails = sum(gain.low > 0 for gain in gains), sum(gain.high < 0 for gain in gains)
        if holds == len(gains):
            verdict = "holds"
        elif fails == len(gains):
            verdict = "does not hold"
        else:
            verdict = f"holds on {holds} of {len(gains)} models, the opposite does on {fails}"
        by = ", ".join(
            f"{name} {gain.value:+.2f} dB [{gain.low:+.2f}, {gain.high:+.2f}]"
            for name, gain in zip(names, gains, strict=True)
        )
        sentences.append(f"{claim[0].upper()}{claim[1:]}: {verdict} ({by}).")
    return sentences


def _distance_answer(measured: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The paper's claim of a distance close to the float model's, in figures of ours, beside the noise floor."""
    parts = []
    for name, rows in measured.items():
        found = {row["method"]: "{:.2f} [{:.2f}, {:.2f}]".format(*row["frechet"]) for row in rows}
        parts.append(
            f"{name}: {found['hqdit']} against {found[FLOAT32]} (float32 from other noise {found[OTHER_SEED]})"
        )
    return "Fréchet distance to held-out images, hqdit W4A4 against float32: " + "; ".join(parts) + "."
