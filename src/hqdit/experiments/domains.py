"""`domains`: do settings that were tuned on one data set carry over to another?

Every setting of a small grid is scored on both models; the settings' order on one is compared with that on the other,
and the best setting of one is tried on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from hqdit.evaluation.bootstrap import bootstrap_interval
from hqdit.evaluation.fidelity import EvaluationInputs, noise_fidelity
from hqdit.experiments.laboratory import GUIDANCES, Laboratory, eps_gain
from hqdit.experiments.noise_floor import noise_floor, reference_rows
from hqdit.experiments.subjects import Subject
from hqdit.experiments.wording import interval_notes, signed_db
from hqdit.pipeline.config import QuantizationConfig
from hqdit.records.run_record import Bars, Cell, Column, Interval, Lines, RunRecord, Series, Table

SUBJECTS = (Subject("digits"), Subject("shapes"))
#: Field -> values; the first is the default.
GRID: Mapping[str, tuple[Any, ...]] = {
    "rotation": ("full", "block:16", "none"),
    "alpha": (0.25, 0.1),
    "scale_rule": ("absmax", "mse"),
    "activation_granularity": ("token", "channel-token"),
    "act_order": (False, True),
}
#: Of the evaluation's pairs, and calibration samples: the grid compares settings that share both.
TRAJECTORIES = 16
CALIBRATION_SAMPLES = 64
#: Least rank correlation, at the lower end of its interval, at which the order of settings counts as the same.
CARRIES_OVER = 0.5
JUDGED = f"guided {GUIDANCES[0]:g}"

Float64Array = npt.NDArray[np.float64]
Settings = tuple[Any, ...]


def grid(is_quick: bool = False) -> list[Settings]:
    """Half of all combinations: `act_order` is on where an odd number of the others differ from their defaults.

    A fraction of a factorial design: every pair of values is equally frequent, and the effect of `act_order` is mixed
    up only with the interaction of all the others, which is taken to be nothing. A quick run leaves out `block:16` and
    the second alpha.
    """
    free = [values for name, values in GRID.items() if name != "act_order"]
    chosen = []
    for settings in product(*free):
        is_changed = [value != values[0] for value, values in zip(settings, free, strict=True)]
        if is_quick and (settings[0] == "block:16" or is_changed[1]):
            continue
        changed = sum(is_changed)
        chosen.append((*settings, changed % 2 == 1))
    return chosen


def ranks(values: Sequence[float] | Float64Array) -> Float64Array:
    """Ranks from 1 in ascending order, equal values sharing the mean of their ranks; float64 (n,)."""
    array = np.asarray(values, dtype=np.float64)
    below = (array[:, None] > array).sum(axis=1)
    equal = (array[:, None] == array).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2)


def spearman(a: Sequence[float] | Float64Array, b: Sequence[float] | Float64Array) -> float:
    """Spearman's rank correlation: Pearson's of the ranks; 0 where one side is constant.

    Source: Spearman 1904, "The proof and measurement of association between two things".
    """
    x, y = (ranks(side) - (len(side) + 1) / 2 for side in (a, b))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else 0.0


def run(lab: Laboratory) -> RunRecord:
    """Score the grid on both models; rank correlation, best settings and what it costs to swap them."""
    settings = grid(lab.is_quick)
    jobs = [partial(_scored, subject=subject, settings=chosen) for subject in SUBJECTS for chosen in settings]
    lab.prepare(jobs, "settings")
    scores = {subject.name: {chosen: _scored(lab, subject, chosen) for chosen in settings} for subject in SUBJECTS}
    floors = [noise_floor(lab, subject) for subject in SUBJECTS]
    first, second = (subject.name for subject in SUBJECTS)
    pairs = np.array([[_db(scores[name][chosen]) for name in (first, second)] for chosen in settings])
    rho = bootstrap_interval(pairs, lambda rows: spearman(rows[:, 0], rows[:, 1]))
    transfers = [_transfer(scores, source, target) for source, target in ((first, second), (second, first))]
    effects = {name: _effects(scores[name]) for name in scores}
    return RunRecord(
        name="domains",
        title="Other data",
        question="Do settings tuned on one data set carry over to another, or do the best settings differ?",
        answers=(
            _rank_answer(rho, first, second),
            *(_transfer_answer(entry) for entry in transfers),
            _effect_answer(effects),
        ),
        tables=(_transfer_table(transfers), _effect_table(effects), _grid_table(scores, settings, floors)),
        figures=(_scatter(scores, settings), _effect_bars(effects)),
        config={
            "grid": {name: list(values) for name, values in GRID.items()},
            "settings": len(settings),
            "trajectories": TRAJECTORIES,
            "grid_calibration_samples": CALIBRATION_SAMPLES,
        },
        notes=(
            "act_order is on where an odd number of the other settings differ from their defaults, which halves the "
            "grid. The interval of the rank correlation resamples the settings of this one grid, which depend on each "
            "other, and says nothing about other grids or data sets; the other intervals are over trajectories.",
            "The best setting of a grid is chosen by the same trajectories that judge it, which flatters it a little: "
            "a regret near zero is an upper bound.",
            *interval_notes("the rotation's signs and the calibration data"),
        ),
        measurements={"spearman": [rho.value, rho.low, rho.high]},
    )


def _config(settings: Settings) -> QuantizationConfig:
    return QuantizationConfig(**dict(zip(GRID, settings, strict=True)))


def _key(lab: Laboratory, subject: Subject, settings: Settings) -> dict[str, Any]:
    config = _config(settings).to_json()
    return {"what": "domains", "subject": subject.name, "config": config, **lab.settings, "grid": CALIBRATION_SAMPLES}


def _scored(lab: Laboratory, subject: Subject, settings: Settings) -> dict[str, Any]:
    """`_score`, from the cache if it was scored before."""
    return lab.cache.numbers(_key(lab, subject, settings), partial(_score, lab, subject, settings))


def _score(lab: Laboratory, subject: Subject, settings: Settings) -> dict[str, Any]:
    model = lab.quantized(subject, _config(settings), lab.calibration(subject, CALIBRATION_SAMPLES))
    inputs = lab.inputs(subject)
    kept = EvaluationInputs(
        tuple(latents[:TRAJECTORIES] for latents in inputs.latents), inputs.timesteps, inputs.classes[:TRAJECTORIES]
    )
    powers = noise_fidelity(subject.model, model, kept, GUIDANCES[0]).branches[JUDGED]
    interval = powers.db_interval
    return {
        "eps_sqnr_db": {JUDGED: [interval.value, interval.low, interval.high]},
        "eps_noise_powers": {JUDGED: powers.noise.sum(axis=0).tolist()},
    }


def _db(score: Mapping[str, Any]) -> float:
    return float(score["eps_sqnr_db"][JUDGED][0])


def _words(settings: Settings) -> str:
    rotation, alpha, scale_rule, granularity, act_order = settings
    order = "act-order" if act_order else "natural order"
    return f"{rotation}, alpha {alpha:g}, {scale_rule}, {granularity}, {order}"


def _transfer(scores: Mapping[str, Mapping[Settings, Any]], source: str, target: str) -> dict[str, Any]:
    """The best setting of `source` on `target`, beside the target's own best and the default."""
    carried, own = (max(scores[name], key=lambda chosen: _db(scores[name][chosen])) for name in (source, target))
    default = tuple(values[0] for values in GRID.values())
    of_target = scores[target]
    by_quality = sorted(of_target, key=lambda chosen: -_db(of_target[chosen]))
    return {
        "source": source,
        "target": target,
        "carried": carried,
        "own": own,
        "score": of_target[carried],
        "place": by_quality.index(carried) + 1,
        "settings": len(by_quality),
        "regret": eps_gain(of_target[own], of_target[carried], JUDGED),
        "over_default": eps_gain(of_target[carried], of_target[default], JUDGED),
        "spread": _db(of_target[by_quality[0]]) - _db(of_target[by_quality[-1]]),
    }


def _transfer_table(transfers: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("Tuned on"),
        Column("Applied to"),
        Column("Best setting there"),
        Column("Own best setting"),
        Column("Place", "", 0, "of the carried-over setting among all on the model it is applied to"),
        Column("Noise prediction", "dB", 2, "SQNR after guidance 1.5 with the carried-over setting"),
        Column("Regret", "dB", 2, "what the own best setting gains over it"),
        Column("Over default", "dB", 2, "what it gains over the default setting"),
        Column("Spread", "dB", 2, "best less worst setting"),
    )
    rows = tuple(
        (
            entry["source"],
            entry["target"],
            _words(entry["carried"]),
            _words(entry["own"]),
            entry["place"],
            Interval(*entry["score"]["eps_sqnr_db"][JUDGED]),
            entry["regret"],
            entry["over_default"],
            entry["spread"],
        )
        for entry in transfers
    )
    caption = (
        f"{TRAJECTORIES} held-out trajectories; {CALIBRATION_SAMPLES} calibration samples; 95 % bootstrap intervals"
    )
    return Table("Settings carried over", columns, rows, caption)


def _effects(scores: Mapping[Settings, Any]) -> dict[str, Interval]:
    """For every setting but the defaults, what it gains on average over the grid, paired by trajectory."""
    found = {}
    for position, (name, values) in enumerate(GRID.items()):
        for value in values[1:]:
            with_it, without = (
                [scores[chosen]["eps_noise_powers"][JUDGED] for chosen in scores if chosen[position] == which]
                for which in (value, values[0])
            )
            if not with_it:
                continue
            sides = len(without)
            rows = np.array(without + with_it).T  # (trajectories, settings)

            def gain(kept: Float64Array, sides: int = sides) -> float:
                levels = 10 * np.log10(kept.sum(axis=0))
                return float(levels[:sides].mean() - levels[sides:].mean())

            found[f"{name} = {value}"] = bootstrap_interval(rows, gain)
    return found


def _effect_table(effects: Mapping[str, Mapping[str, Interval]]) -> Table:
    names = list(effects)
    columns = (Column("Setting"), *(Column(name, "dB", 2, "mean gain over the default value") for name in names))
    rows: list[tuple[Cell, ...]] = [(key, *(effects[name][key] for name in names)) for key in effects[names[0]]]
    return Table("What each setting does", columns, tuple(rows), "mean over the grid's other settings")


def _grid_table(
    scores: Mapping[str, Mapping[Settings, Any]], settings: Sequence[Settings], floors: Sequence[Mapping[str, Any]]
) -> Table:
    meaning = "SQNR of the noise prediction after guidance 1.5"
    columns = (Column("Setting"), *(Column(name, "dB", 2, meaning) for name in scores))
    references = zip(*(reference_rows(floor, JUDGED) for floor in floors), strict=True)
    rows: list[tuple[Cell, ...]] = [
        (of_models[0][0], *(judged for _, _, judged in of_models)) for of_models in references
    ]
    rows += [
        (_words(chosen), *(Interval(*scores[name][chosen]["eps_sqnr_db"][JUDGED]) for name in scores))
        for chosen in settings
    ]
    return Table(
        "All settings", columns, tuple(rows), f"{TRAJECTORIES} held-out trajectories; 95 % bootstrap intervals"
    )


def _scatter(scores: Mapping[str, Mapping[Settings, Any]], settings: Sequence[Settings]) -> Lines:
    """Places on both models, in the order of the first: a straight line where the order carries over."""
    places = [len(settings) + 1 - ranks([_db(of_model[chosen]) for chosen in settings]) for of_model in scores.values()]
    order = np.argsort(places[0], kind="stable")
    first, second = scores
    x = tuple(float(place) for place in places[0][order])
    return Lines(
        "Places of the settings",
        f"place on {first} (1 is best)",
        f"place on {second}",
        (Series("settings", tuple(float(place) for place in places[1][order]), x), Series("same order", x, x)),
    )


def _effect_bars(effects: Mapping[str, Mapping[str, Interval]]) -> Bars:
    keys = tuple(next(iter(effects.values())))
    series = []
    for name, found in effects.items():
        y, low, high = (tuple(getattr(found[key], end) for key in keys) for end in ("value", "low", "high"))
        series.append(Series(name, y, low=low, high=high))
    return Bars("What each setting does", keys, "mean gain over the default value (dB)", tuple(series))


def _rank_answer(rho: Interval, first: str, second: str) -> str:
    """Weak correlation is relation; to say that the order carries over takes a lower bound above `CARRIES_OVER`."""
    if rho.low > CARRIES_OVER:
        verdict = f"carries over to {second}"
    elif rho.low > 0:
        verdict = f"is related to that on {second}"
    else:
        verdict = f"is reversed on {second}" if rho.high < 0 else f"does not clearly carry over to {second}"
    return (
        f"The order of the settings on {first} {verdict}: rank correlation {rho.value:.2f} "
        f"[{rho.low:.2f}, {rho.high:.2f}], over the settings of this grid."
    )


def _transfer_answer(entry: Mapping[str, Any]) -> str:
    same = entry["carried"] == entry["own"]
    own = "which is its own best" if same else f"whose own best is: {_words(entry['own'])}"
    return (
        f"Tuned on {entry['source']} ({_words(entry['carried'])}) and applied to {entry['target']}, {own}: place "
        f"{entry['place']} of {entry['settings']}, regret {signed_db(entry['regret'])}, over the default "
        f"{signed_db(entry['over_default'])}; the grid spans {entry['spread']:.1f} dB."
    )


def _effect_answer(effects: Mapping[str, Mapping[str, Interval]]) -> str:
    first, second = effects.values()
    clear = [key for key in first if _sign(first[key]) and _sign(second[key])]
    opposed = [key for key in clear if _sign(first[key]) != _sign(second[key])]
    if not clear:
        return "No setting has an effect that is clear on both models."
    agreed = [key for key in clear if key not in opposed]
    parts = [
        f"{word}: {', '.join(keys)}" for word, keys in (("in the same direction", agreed), ("opposed", opposed)) if keys
    ]
    return (
        f"Of {len(first)} changes of one setting, {len(clear)} have a clear effect on both models ({'; '.join(parts)})."
    )


def _sign(gain: Interval) -> int:
    return 1 if gain.low > 0 else -1 if gain.high < 0 else 0
