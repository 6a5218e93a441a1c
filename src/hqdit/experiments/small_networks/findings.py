"""Tables, figures and sentences of `beyond-dit`, from the results of its networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hqdit.experiments.small_networks.comparison import role_of, verdict
from hqdit.experiments.small_networks.examples import bigram_bits, python_text
from hqdit.experiments.small_networks.grid import ROTATIONS, Case, Gain, NetworkResult, outliers_label
from hqdit.formats.catalog import FP4_FORMATS
from hqdit.records.run_record import Bars, Cell, Column, Interval, Series, Table


def networks_table(results: Sequence[NetworkResult]) -> Table:
    """What was trained, and how well."""
    rows: list[tuple[Cell, ...]] = []
    for result in results:
        recipe, found = result.recipe, result.trained
        yardstick = (
            f"{bigram_bits(python_text()[0], found.examples):.2f} from pairs of bytes alone"
            if recipe.is_text
            else f"{100 / recipe.shape.outputs:g} by chance"
        )
        rows.append(
            (
                result.name,
                sum(parameter.numel() for parameter in found.network.parameters()),
                len(next(iter(result.outcomes.values())).layers),
                recipe.steps,
                found.seconds,
                "bits per byte" if recipe.is_text else "accuracy in %",
                result.float32_score,
                f"{'at most' if recipe.is_text else 'at least'} {recipe.bound:g}",
                yardstick,
                len(found.examples.inputs),
            )
        )
    columns = (
        Column("Network"),
        Column("Parameters"),
        Column("Quantized layers"),
        Column("Training steps"),
        Column("Training", "s", 0, "wall-clock time when it was trained"),
        Column("Measure"),
        Column("Float32", "", 2, "on held-out samples"),
        Column("Asked for"),
        Column("To compare"),
        Column("Held-out samples"),
    )
    return Table("The networks", columns, tuple(rows))


def outcome_table(result: NetworkResult) -> Table:
    """Every case of one network, below its float32 rows."""
    is_text = result.recipe.is_text
    direction = "lower is better" if is_text else "higher is better"
    columns = (
        Column("Outliers"),
        Column("Quantizer"),
        Column("Rotation"),
        Column(
            "Bits per byte" if is_text else "Accuracy",
            "bit" if is_text else "%",
            2 if is_text else 1,
            f"on held-out samples, mean over the rotation's seeds; {direction}",
        ),
        Column("Logits SQNR", "dB", 2, "against the float32 network as trained or with its outliers; higher is better"),
        Column("Spread", "dB", 2, "of the logits' SQNR: largest less smallest over the rotation's seeds"),
        Column("Layer SQNR", "dB", 2, "mean over the layers of each one's output SQNR on float inputs"),
    )
    rows: list[tuple[Cell, ...]] = []
    for factor, db in result.float32_db.items():
        of_float = None if math.isinf(db) else db
        score = result.float32_score if factor == 1 else None
        rows.append((outliers_label(factor), "float32", "none", score, of_float, None, None))
    for case, outcome in result.outcomes.items():
        by_seed = outcome.db_by_seed
        spread = max(by_seed) - min(by_seed) if len(by_seed) > 1 else None
        start = (case.outliers, case.quantizer, case.rotation)
        rows.append((*start, outcome.score, outcome.db, spread, outcome.mean_layer_db))
    caption = (
        f"{len(result.trained.examples.inputs)} held-out samples. The float32 rows with outliers show how well the "
        "injection keeps the function."
    )
    return Table(f"W4A4, {result.name}", columns, tuple(rows), caption)


def gain_table(result: NetworkResult) -> Table:
    """What each rotation changes in each case."""
    columns = (
        Column("Outliers"),
        Column("Quantizer"),
        Column("Rotation"),
        Column("Gain of the logits", "dB", 2, "SQNR less that without a rotation; positive is better"),
        Column("Logits"),
        Column("Gain of the score", _unit(result), 2, "against no rotation; positive is better"),
        Column("Score"),
    )
    rows = tuple(
        (
            gain.case.outliers,
            gain.case.quantizer,
            gain.case.rotation,
            gain.db,
            verdict(gain.db),
            gain.score,
            verdict(gain.score),
        )
        for gain in result.gains
    )
    return Table(f"What the rotation changes, {result.name}", columns, rows)


def role_table(results: Sequence[NetworkResult]) -> Table:
    """Gain of the full rotation by kind of layer."""
    factors = results[0].factors
    rows: list[tuple[Cell, ...]] = []
    for result in results:
        gains = {factor: result.layer_gains(factor) for factor in factors}
        for role in dict.fromkeys(map(role_of, gains[factors[0]])):
            by_factor = [[gain for name, gain in gains[f].items() if role_of(name) == role] for f in factors]
            rows.append((result.name, role, *(math.fsum(found) / len(found) for found in by_factor)))
    meaning = "output SQNR with the full rotation less that without one, mean over the blocks; positive is better"
    return Table(
        "Where the full rotation helps: E2M1, round-to-nearest, each layer on float inputs",
        (Column("Network"), Column("Layer"), *(Column(outliers_label(factor), "dB", 2, meaning) for factor in factors)),
        tuple(rows),
    )


def rotation_figure(result: NetworkResult) -> Bars:
    """SQNR of the logits by case, one colour for each rotation."""
    bases = [case for case in result.outcomes if case.rotation == "none"]
    series = []
    for rotation in ROTATIONS:
        found = [result.outcomes[case.with_rotation(rotation)].db for case in bases]
        value, low, high = (tuple(getattr(entry, part) for entry in found) for part in ("value", "low", "high"))
        series.append(Series(f"rotation {rotation}", y=value, low=low, high=high))
    return Bars(
        f"Rotations of the {result.name}",
        tuple(f"{case.outliers}: {case.quantizer}" for case in bases),
        "SQNR of the logits (dB)",
        tuple(series),
        "whiskers: 95 % bootstrap intervals over held-out samples",
    )


def network_answer(result: NetworkResult) -> str:
    """The full rotation with E2M1 and GPTQ, for every strength of outliers."""
    parts = []
    for gain in result.gains:
        case = gain.case
        if (case.formats, case.has_gptq, case.rotation) == ("E2M1", True, "full"):
            what = "bits per byte saved" if result.recipe.is_text else "accuracy"
            parts.append(
                f"{case.outliers} {_signed(gain.db, 'dB')} ({verdict(gain.db)}), {what} "
                f"{_signed(gain.score, _unit(result))} ({verdict(gain.score)})"
            )
    name = result.name[0].upper() + result.name[1:]
    return f"{name}, full rotation against none (E2M1, GPTQ), SQNR of the logits: {'; '.join(parts)}."


def benefit(results: Sequence[NetworkResult]) -> str:
    """How often and by how much rotations help, by network and strength of outliers."""
    parts = []
    for result in results:
        for factor in result.factors:
            counts = []
            for rotation in ROTATIONS[1:]:
                found = [gain.db for gain in _gains(result, factor) if gain.case.rotation == rotation]
                better = sum(verdict(db) == "better" for db in found)
                mean = math.fsum(db.value for db in found) / len(found)
                counts.append(f"{rotation} raises it in {better} of {len(found)} settings ({mean:+.2f} dB on average)")
            parts.append(f"{result.name}, {outliers_label(factor)}: {', '.join(counts)}")
    return f"Benefit, in SQNR of the logits: {'; '.join(parts)}. The most favourable change is {_extremes(results, 1)}."


def drawback(results: Sequence[NetworkResult]) -> str:
    """How often and by how much rotations hurt, by network and strength of outliers, and what they cost."""
    parts = []
    for result in results:
        for factor in result.factors:
            gains = _gains(result, factor)
            worse = sum(verdict(gain.db) == "worse" for gain in gains)
            worse_score = sum(verdict(gain.score) == "worse" for gain in gains)
            by_layer = result.layer_gains(factor)
            lost = [role_of(name) for name, gain in by_layer.items() if gain < 0]
            most = f", most often {max(dict.fromkeys(lost), key=lost.count)}" if lost else ""
            parts.append(
                f"{result.name}, {outliers_label(factor)}: rotations lower the SQNR of the logits in {worse} of "
                f"{len(gains)} settings and the score in {worse_score}, the full one that of {len(lost)} of "
                f"{len(by_layer)} layers{most}"
            )
    shares = ", ".join(f"{100 * result.operation_share:.1f} % ({result.name})" for result in results)
    return (
        f"Drawback: {'; '.join(parts)}. The least favourable change is {_extremes(results, -1)}. Online rotations add "
        f"operations: {shares} of those of the quantized layers, which are narrow here."
    )


def format_answer(results: Sequence[NetworkResult]) -> str:
    """What the statistic chooses with and without a rotation, in layers as trained."""
    parts = []
    for rotation in ROTATIONS:
        chosen = [
            name
            for result in results
            for name in result.outcomes[Case(1.0, "selected", False, rotation)].formats.values()
        ]
        shares = ", ".join(f"{fmt.name} {chosen.count(fmt.name)}" for fmt in FP4_FORMATS)
        parts.append(f"rotation {rotation}: {shares}")
    return f"Formats that the paper's statistic selects, in layers as trained: {'; '.join(parts)}."


def _gains(result: NetworkResult, factor: float) -> list[Gain]:
    return [gain for gain in result.gains if gain.case.factor == factor]


def _extremes(results: Sequence[NetworkResult], sign: int) -> str:
    """For each strength of outliers, the change in dB that is furthest in the direction of `sign`, and where."""
    parts = []
    for factor in results[0].factors:
        gains = [(result.name, gain) for result in results for gain in _gains(result, factor)]
        name, gain = max(gains, key=lambda entry: sign * entry[1].db.value)
        where = f"{name}, {gain.case.quantizer}, {gain.case.rotation}"
        parts.append(f"{outliers_label(factor)} {_signed(gain.db, 'dB')} ({where})")
    return "; ".join(parts)


def _unit(result: NetworkResult) -> str:
    return "bit" if result.recipe.is_text else "points"


def _signed(gain: Interval, unit: str) -> str:
    return f"{gain.value:+.2f} {unit} [{gain.low:+.2f}, {gain.high:+.2f}]"
