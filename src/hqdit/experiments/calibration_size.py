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
from hqdit.experiments.gptq_blocks import OVER_LAYERS, block_answer, block_sizes, block_table
from hqdit.experiments.laboratory import GUIDANCES, Job, Laboratory, eps_gain
from hqdit.experiments.noise_floor import noise_floor, reference_rows
from hqdit.experiments.subjects import Subject
from hqdit.experiments.wording import compared, interval_notes, signed_db
from hqdit.gptq.solver import BLOCK_COLUMNS
from hqdit.models.adapter import adapter_for
from hqdit.numerics.error import SignalToNoise
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
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
    smallest = next(iter(sizes))
    jobs: list[Job] = [partial(_blocks, subject=smallest)]
    for subject, counts in sizes.items():
        # The largest take longest.
        jobs += [partial(_measured, subject=subject, count=count) for count in reversed(counts)]
        jobs += [partial(_controlled, subject=subject, counts=counts), partial(_nearest, subject=subject)]
    lab.prepare(jobs, "calibration sizes")
    for subject, counts in sizes.items():
        nearest, control = _nearest(lab, subject), _controlled(lab, subject, counts)
        found = {count: _measured(lab, subject, count) for count in counts}
        floor = noise_floor(lab, subject)
        tables.append(_table(subject.name, found, nearest, control, floor, lab.sampling.steps))
        figures += _lines(subject.name, found, nearest, control)
        answers += _answers(subject.name, found, nearest, control)
    blocks = _blocks(lab, smallest)
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
            "A sample is one tuple of noisy image, time step and class. The gap is the difference between the mean "
            f"layer SQNR on the calibration samples themselves (at most {MEASURED_SAMPLES}) and on {MEASURED_SAMPLES} "
            "drawn with another seed, on inputs of the float model. Rounding to nearest learns nothing from samples: "
            "its gap on the very same ones is what they are easier or harder by, and overfitting is GPTQ's gap less "
            "that.",
            "Modulation layers are left out of it: they are calibrated on 8,192 pairs of time step and class at any "
            "number of samples.",
            *interval_notes("the rotation's signs, and of the calibration data at each number of samples"),
        ),
    )


def _key(lab: Laboratory, subject: Subject, **more: Any) -> dict[str, Any]:
    return {"what": "calibration size", "subject": subject.name, "config": CONFIG.to_json(), **lab.settings, **more}


def _nearest(lab: Laboratory, subject: Subject) -> dict[str, Any]:
    return lab.score(subject, CONFIG.replace(gptq=False))


def _measured(lab: Laboratory, subject: Subject, count: int) -> dict[str, Any]:
    key = _key(lab, subject, method="gptq", samples=count)
    return lab.cache.numbers(key, partial(_measure, lab, subject, count))


def _controlled(lab: Laboratory, subject: Subject, counts: tuple[int, ...]) -> dict[str, Any]:
    key = _key(lab, subject, method="nearest", samples=list(counts))
    return lab.cache.numbers(key, partial(_control, lab, subject, counts))


def _blocks(lab: Laboratory, subject: Subject) -> dict[str, Any]:
    key = _key(lab, subject, blocks=list(BLOCK_SIZES), samples=BLOCK_SAMPLES)
    return lab.cache.numbers(key, partial(block_sizes, lab, subject, CONFIG, BLOCK_SIZES, BLOCK_SAMPLES))


def _measure(lab: Laboratory, subject: Subject, count: int) -> dict[str, Any]:
    """GPTQ: noise prediction on held-out trajectories, and layers on seen and on unseen calibration samples."""
    seen = lab.calibration(subject, count)
    model = lab.quantized(subject, CONFIG, seen)
    noise = noise_fidelity(subject.model, model, lab.inputs(subject), *GUIDANCES)
    powers = noise.branches[JUDGED]
    interval = powers.db_interval
    return {
        "eps_sqnr_db": [interval.value, interval.low, interval.high],
        "eps_noise_powers": {JUDGED: powers.noise.sum(axis=0).tolist()},
        "seen": layer_sqnr(subject.model, model, _first(seen), lab.seed),
        "unseen": _unseen(lab, subject, model),
    }


def _control(lab: Laboratory, subject: Subject, counts: tuple[int, ...]) -> dict[str, Any]:
    """Rounding to nearest: layers on the samples that GPTQ sees at every count, and on unseen ones."""
    model = lab.quantized(subject, CONFIG.replace(gptq=False))
    seen = {
        str(count): layer_sqnr(subject.model, model, _first(lab.calibration(subject, count)), lab.seed)
        for count in counts
    }
    return {"seen": seen, "unseen": _unseen(lab, subject, model)}


def _unseen(lab: Laboratory, subject: Subject, model: nn.Module) -> dict[str, float]:
    data = lab.calibration(subject, MEASURED_SAMPLES, seed=lab.seed + 1)
    return layer_sqnr(subject.model, model, data, lab.seed + 1)


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
                stream.capture_samples(site, partial(_compare, ratio, linear, layers[site.name]), site.name)
                ratios[site.name] = ratio
        stream.advance(block)
    return {name: ratio.db for name, ratio in ratios.items()}


def _compare(ratio: SignalToNoise, exact: nn.Linear, quantized: nn.Module, x: Tensor, samples: int | None) -> None:
    if samples is not None:
        x = x.reshape(samples, -1, x.shape[1])
    # Not `exact(x)`: the stream's hook on it, which called this, would be called again.
    ratio.add(nn.functional.linear(x, exact.weight, exact.bias), quantized(x))


_COLUMNS = (
    Column("Rounding"),
    Column("Samples"),
    Column("Noise prediction", "dB", 2, "SQNR after guidance 1.5 on held-out trajectories"),
    Column("Gain", "dB", 2, "over rounding to nearest, paired by trajectory"),
    Column("Layers, seen", "dB", 2, "mean layer SQNR on the calibration samples"),
    Column("Layers, unseen", "dB", 2, "mean layer SQNR on samples of another seed"),
    Column("Gap", "dB", 2, "seen less unseen, mean over layers", interval=OVER_LAYERS),
    Column("Gap, nearest", "dB", 2, "of rounding to nearest on the same seen samples", interval=OVER_LAYERS),
    Column("Overfitting", "dB", 2, "gap less that of rounding to nearest, paired by layer", interval=OVER_LAYERS),
)

#: What was measured with GPTQ, by the number of samples.
BySize = Mapping[int, Mapping[str, Any]]


def _gaps(found: Mapping[str, Any], control: Mapping[str, Any], count: int) -> tuple[Interval, Interval, Interval]:
    """Seen less unseen of GPTQ and of rounding to nearest on the same samples, and the difference, over layers."""
    layers = list(found["seen"])
    of_gptq = [found["seen"][name] - found["unseen"][name] for name in layers]
    of_nearest = [control["seen"][str(count)][name] - control["unseen"][name] for name in layers]
    net = [gptq - nearest for gptq, nearest in zip(of_gptq, of_nearest, strict=True)]
    return bootstrap_mean(of_gptq), bootstrap_mean(of_nearest), bootstrap_mean(net)


def _table(
    name: str,
    found: BySize,
    nearest: Mapping[str, Any],
    control: Mapping[str, Any],
    floor: Mapping[str, Any],
    steps: int,
) -> Table:
    plain = (Interval(*nearest["eps_sqnr_db"][JUDGED]), None, None, fmean(control["unseen"].values()))
    rows: list[tuple[Cell, ...]] = [
        (label, None, judged, *(None for _ in _COLUMNS[3:])) for label, _, judged in reference_rows(floor, JUDGED)
    ]
    rows.append(("nearest", None, *plain, None, None, None))
    for count, of_size in found.items():
        judged, gain = Interval(*of_size["eps_sqnr_db"]), eps_gain(of_size, nearest, JUDGED)
        layers = (fmean(of_size[side].values()) for side in ("seen", "unseen"))
        rows.append(("gptq", count, judged, gain, *layers, *_gaps(of_size, control, count)))
    counted = f"{PAIRS} held-out trajectories of {steps} steps; layers on up to {MEASURED_SAMPLES} samples a side"
    return Table(f"Calibration samples, {name}", _COLUMNS, tuple(rows), counted)


def _lines(name: str, found: BySize, nearest: Mapping[str, Any], control: Mapping[str, Any]) -> tuple[Lines, Lines]:
    x = tuple(map(float, found))
    level = nearest["eps_sqnr_db"][JUDGED]
    judged = (
        Series("GPTQ", *_bounds([of_size["eps_sqnr_db"] for of_size in found.values()], x)),
        Series("nearest", *_bounds([level] * len(x), x)),
    )
    layers = []
    for side, title in (("seen", "calibration samples"), ("unseen", "held-out samples")):
        y = tuple(fmean(of_size[side].values()) for of_size in found.values())
        layers.append(Series(f"GPTQ, {title}", y, x))
    same = tuple(fmean(control["seen"][str(count)].values()) for count in found)
    layers.append(Series("nearest, calibration samples", same, x))
    layers.append(Series("nearest, held-out samples", (fmean(control["unseen"].values()),) * len(x), x))
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


def _answers(name: str, found: BySize, nearest: Mapping[str, Any], control: Mapping[str, Any]) -> list[str]:
    ends = (min(found), max(found))
    gaps = [_gaps(found[count], control, count) for count in ends]
    gains = [eps_gain(found[count], nearest, JUDGED) for count in ends]
    overfitted = "; ".join(
        f"with {count} samples {signed_db(net)} (GPTQ {signed_db(gap)}, rounding to nearest on the same samples "
        f"{signed_db(of_nearest)})"
        for count, (gap, of_nearest, net) in zip(ends, gaps, strict=True)
    )
    return [
        f"{name}: overfitting, by which layers are better on the calibration samples than on others beyond what "
        f"rounding to nearest shows: {overfitted}.",
        f"{name}: GPTQ is {compared(gains[0])} rounding to nearest with {ends[0]} samples ({signed_db(gains[0])} in "
        f"the guided noise prediction) and {compared(gains[1])} it with {ends[1]} ({signed_db(gains[1])}); "
        f"{_enough(found)}.",
    ]


def _enough(found: BySize) -> str:
    """The smallest number of samples from which no larger one can be told, if there is one."""
    counts = sorted(found)
    for position, count in enumerate(counts[:-1]):
        more = [eps_gain(found[larger], found[count], JUDGED) for larger in counts[position + 1 :]]
        if all(gain.low <= 0 <= gain.high for gain in more):
            return f"from {count} samples on, no larger number of those measured can be told from it"
    last = eps_gain(found[counts[-1]], found[counts[-2]], JUDGED)
    change = "the error still falls" if last.low > 0 else "the error rises"
    return f"{change} at the largest size measured: {signed_db(last)} from {counts[-2]} to {counts[-1]} samples"
