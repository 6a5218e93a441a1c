"""`calibration`: how many calibration samples GPTQ needs, what too few do, and whether its block size matters.

Source: HQ-DiT (arXiv 2405.19751), section 3.4: 512 samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from hqdit.calibration.capture import BlockStream
from hqdit.calibration.samples import CalibrationSet
from hqdit.evaluation.bootstrap import bootstrap_mean
from hqdit.evaluation.fidelity import PAIRS, noise_fidelity
from hqdit.experiments.gptq_blocks import block_answer, block_sizes, block_table
from hqdit.experiments.laboratory import GUIDANCES, Laboratory, eps_gain
from hqdit.experiments.subjects import Subject
from hqdit.experiments.wording import compared, signed_db
from hqdit.gptq.solver import BLOCK_COLUMNS
from hqdit.models.adapter import adapter_for
from hqdit.numerics.error import SignalToNoise
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.progress import track
from hqdit.records.run_record import Cell, Column, Figure, Interval, Lines, RunRecord, Series, Table

#: Subject -> sizes: the whole sweep where it is cheap, three sizes where it is not.
SIZES: Mapping[Subject, tuple[int, ...]] = {
    Subject("digits"): (16, 32, 64, 128, 256, 512, 1024, 2048),
    Subject("shapes"): (32, 128, 512),
}
CONFIG = QuantizationConfig()
#: Most samples that a layer's error is measured on, on either side.
MEASURED_SAMPLES = 256
BLOCK_SIZES = (1, 16, 64, BLOCK_COLUMNS, 4096)
#: Calibration samples behind the comparison of block sizes.
BLOCK_SAMPLES = 256
JUDGED = f"guided {GUIDANCES[0]:g}"


def run(lab: Laboratory) -> RunRecord:
    """Sweep the number of samples with GPTQ, beside rounding to nearest, and the block size on single layers."""
    tables: list[Table] = []
    figures: list[Figure] = []
    answers: list[str] = []
    sizes = {subject: SIZES[subject][:: 3 if lab.is_quick else 1] for subject in lab.subjects(SIZES)}
    for subject, counts in sizes.items():
        nearest = lab.score(subject, CONFIG.replace(gptq=False))
        cells = [("nearest", 0), *(("gptq", count) for count in counts)]
        found = {
            (method, count): lab.cache.numbers(
                _key(lab, subject, method=method, samples=count),
                partial(_measure, lab, subject, method == "gptq", count),
            )
            for method, count in track(cells, f"calibration sizes, {subject.name}")
        }
        tables.append(_table(subject.name, found, nearest, counts, lab.sampling.steps))
        figures += _lines(subject.name, found, counts)
        answers += _answers(subject.name, found, nearest, counts)
    smallest = next(iter(sizes))
    key = _key(lab, smallest, blocks=list(BLOCK_SIZES), samples=BLOCK_SAMPLES)
    blocks = lab.cache.numbers(key, partial(block_sizes, lab, smallest, CONFIG, BLOCK_SIZES, BLOCK_SAMPLES))
    tables.append(block_table(smallest.name, blocks, BLOCK_SAMPLES))
    answers.append(block_answer(blocks))
    return RunRecord(
        name="calibration",
        title="Calibration samples",
        question="How many calibration samples does GPTQ need, and does it overfit them?",
        answers=tuple(answers),
        tables=tuple(tables),
        figures=tuple(figures),
        config={
            "sizes": {subject.name: list(counts) for subject, counts in sizes.items()},
            "measured_samples": MEASURED_SAMPLES,
            "block_sizes": list(BLOCK_SIZES),
            "block_samples": BLOCK_SAMPLES,
        },
        notes=(
            "A sample is one tuple of noisy image, time step and class. Overfitting is the difference between the mean "
            "layer SQNR on the calibration samples themselves and on as many drawn with another seed, on inputs of the "
            "float model; rounding to nearest, which sees no samples, shows what such a difference is worth.",
            "Modulation layers are left out of it: they are calibrated on 8,192 pairs of time step and class at any "
            "number of samples.",
        ),
    )


def _key(lab: Laboratory, subject: Subject, **more: Any) -> dict[str, Any]:
    return {"what": "calibration size", "subject": subject.name, "config": CONFIG.to_json(), **lab.settings, **more}


def _measure(lab: Laboratory, subject: Subject, uses_gptq: bool, count: int) -> dict[str, Any]:
    """Noise prediction on held-out trajectories, and layers on seen and on unseen calibration samples."""
    config = CONFIG.replace(gptq=uses_gptq)
    seen = lab.calibration(subject, count or MEASURED_SAMPLES)
    unseen = lab.calibration(subject, MEASURED_SAMPLES, seed=lab.seed + 1)
    model = lab.quantized(subject, config, seen)
    noise = noise_fidelity(subject.model, model, lab.inputs(subject), *GUIDANCES)
    powers = noise.branches[JUDGED]
    interval = powers.db_interval
    return {
        "eps_sqnr_db": [interval.value, interval.low, interval.high],
        "eps_noise_powers": {JUDGED: powers.noise.sum(axis=0).tolist()},
        "seen": layer_sqnr(subject.model, model, _first(seen), lab.seed),
        "unseen": layer_sqnr(subject.model, model, unseen, lab.seed + 1),
    }


def _first(data: CalibrationSet) -> CalibrationSet:
    kept = slice(0, MEASURED_SAMPLES)
    return CalibrationSet(data.latents[kept], data.timesteps[kept], data.classes[kept], data.origin)


def layer_sqnr(exact: nn.Module, quantized: nn.Module, data: CalibrationSet, seed: int) -> dict[str, float]:
    """Output SQNR of every quantized layer but modulation, alone, on the float model's inputs for `data`, in dB."""
    stream, adapter = BlockStream(exact, data, seed), adapter_for(exact)
    layers = quantized_layers(quantized)
    ratios: dict[str, SignalToNoise] = {}
    for block in range(len(adapter.blocks(exact))):
        for site in adapter.sites(exact):
            if site.block == block and site.name in layers and not site.is_modulation:
                linear, ratio = exact.get_submodule(site.name), SignalToNoise()
                assert isinstance(linear, nn.Linear)  # a site is nothing else
                stream.capture(site, partial(_compare, ratio, linear, layers[site.name]), site.name)
                ratios[site.name] = ratio
        stream.advance(block)
    return {name: ratio.db for name, ratio in ratios.items()}


def _compare(ratio: SignalToNoise, exact: nn.Linear, quantized: nn.Module, x: Tensor) -> None:
    # Not `exact(x)`: the stream's hook on it, which called this, would be called again.
    ratio.add(nn.functional.linear(x, exact.weight, exact.bias), quantized(x))


_COLUMNS = (
    Column("Rounding"),
    Column("Samples"),
    Column("Noise prediction", "dB", 2, "SQNR after guidance 1.5 on held-out trajectories"),
    Column("Gain", "dB", 2, "over rounding to nearest, paired by trajectory"),
    Column("Layers, seen", "dB", 2, "mean layer SQNR on the calibration samples"),
    Column("Layers, unseen", "dB", 2, "mean layer SQNR on samples of another seed"),
    Column("Gap", "dB", 2, "seen less unseen, mean and 95 % interval over layers: what is overfitted"),
)


def _gap(found: Mapping[str, Any]) -> Interval:
    return bootstrap_mean([found["seen"][name] - found["unseen"][name] for name in found["seen"]])


def _table(
    name: str, found: Mapping[tuple[str, int], Any], nearest: Mapping[str, Any], counts: tuple[int, ...], steps: int
) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for (method, count), of_size in found.items():
        gain = eps_gain(of_size, nearest, JUDGED) if method == "gptq" else None
        layers = (fmean(of_size[side].values()) for side in ("seen", "unseen"))
        rows.append((method, count or None, Interval(*of_size["eps_sqnr_db"]), gain, *layers, _gap(of_size)))
    counted = f"{PAIRS} held-out trajectories of {steps} steps; layers on up to {MEASURED_SAMPLES} samples a side"
    return Table(f"Calibration samples, {name}", _COLUMNS, tuple(rows), counted)


def _lines(name: str, found: Mapping[tuple[str, int], Any], counts: tuple[int, ...]) -> tuple[Lines, Lines]:
    x = tuple(map(float, counts))
    eps = [found["gptq", count]["eps_sqnr_db"] for count in counts]
    level = found["nearest", 0]["eps_sqnr_db"]
    judged = (
        Series("GPTQ", *_bounds(eps, x)),
        Series("nearest", *_bounds([level] * len(counts), x)),
    )
    layers = []
    for side, title in (("seen", "calibration samples"), ("unseen", "held-out samples")):
        layers.append(Series(f"GPTQ, {title}", tuple(fmean(found["gptq", c][side].values()) for c in counts), x))
    flat = fmean(found["nearest", 0]["unseen"].values())
    layers.append(Series("nearest, held-out samples", (flat,) * len(counts), x))
    return (
        Lines(
            f"Noise prediction by calibration samples, {name}",
            "calibration samples",
            "SQNR of the noise prediction, guided 1.5 (dB)",
            judged,
            "bounds: 95 % bootstrap intervals over trajectories",
            x_scale="log",
        ),
        Lines(
            f"Overfitting, {name}",
            "calibration samples",
            "mean layer SQNR (dB)",
            tuple(layers),
            "all layers but modulation",
            x_scale="log",
        ),
    )


def _bounds(found: list[list[float]], x: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    value, low, high = (tuple(entry[k] for entry in found) for k in range(3))
    return value, x, low, high


def _answers(
    name: str, found: Mapping[tuple[str, int], Any], nearest: Mapping[str, Any], counts: tuple[int, ...]
) -> list[str]:
    small, large = found["gptq", counts[0]], found["gptq", counts[-1]]
    gaps = _gap(small), _gap(large), _gap(found["nearest", 0])
    gains = [eps_gain(found["gptq", count], nearest, JUDGED) for count in counts]
    enough = next(count for count in counts if eps_gain(large, found["gptq", count], JUDGED).low <= 0)
    return [
        f"{name}: with {counts[0]} samples, layers are {signed_db(gaps[0])} better on the calibration samples than on "
        f"others, with {counts[-1]} {signed_db(gaps[1])}; rounding to nearest shows {signed_db(gaps[2])}.",
        f"{name}: GPTQ is {compared(gains[0])} rounding to nearest with {counts[0]} samples ({signed_db(gains[0])} in "
        f"the guided noise prediction) and {compared(gains[-1])} it with {counts[-1]} ({signed_db(gains[-1])}); from "
        f"{enough} samples on, more can no longer be told from it.",
    ]
