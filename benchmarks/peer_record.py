"""From the rows that `peer_accuracy.py` measured to the record of the run: tables, a figure and answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hqdit.evaluation.bootstrap import bootstrap_mean
from hqdit.evaluation.fidelity import PAIRS
from hqdit.experiments.laboratory import eps_gain
from hqdit.experiments.noise_floor import FLOOR
from hqdit.experiments.wording import compared, interval_notes, signed_db
from hqdit.records.run_record import Bars, Cell, Column, Interval, RunRecord, Series, Table
from hqdit.report.cells import cell_text, header_text

NAME = "peer-accuracy"
JUDGED = "guided 1.5"
#: Columns, and the branches of the noise prediction that they show.
BRANCHES = {
    "Conditional": "conditional",
    "Unconditional": "unconditional",
    "Guided 1.5": JUDGED,
    "Guided 4": "guided 4",
}
#: Bits of a float32 number.
FLOAT_BITS = 32.0
#: A layer reads its inputs in float if its two probes agree so well: float32 alone gives 120 dB, 8 bits about 40.
FLOAT_PROBE_DB = 90.0
#: Per weight: 4-bit codes in groups of 64 with scales and zero points of 32 bits, the most that a peer with 4-bit
#: weights takes here without a low-rank branch.
PLAIN_BITS = 5.0


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        name: of the method.
        weight_bits: mean over the weights of the quantized layers, everything that belongs to them included.
        input_bits: mean over the numbers that these layers read, scales included; 32 where they read floats.
        code_bits: of the weight's codes alone.
        eps_sqnr_db: branch -> [value, low, high].
        eps_noise_powers: branch -> power of the error of every trajectory; empty for what is no method.
        psnr_db: of every image; infinite where it equals the float model's.
    """

    name: str
    weight_bits: float | None
    input_bits: float | None
    code_bits: float | None
    eps_sqnr_db: Mapping[str, Sequence[float]]
    psnr_db: Sequence[float]
    eps_noise_powers: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def is_4_bit_rival(self) -> bool:
        """Whether the weights have 4-bit codes and the inputs are quantized."""
        return self.code_bits == 4 and self.input_bits is not None and self.input_bits < FLOAT_BITS

    def gain_over(self, other: Row) -> Interval:
        """By how many dB its noise prediction is better, over the trajectories that both share."""
        return eps_gain(
            {"eps_noise_powers": self.eps_noise_powers}, {"eps_noise_powers": other.eps_noise_powers}, JUDGED
        )


@dataclass
class Found:
    """Everything that was measured on one model.

    Attributes:
        subject: its name.
        classes: of the images.
        references: float32, the same through a peer's process if there are peers, and the noise floor.
        presets: ours.
        peers: those that ran.
        failures: peer -> its error.
        layers: number of layers that hqdit quantizes.
        said: peer -> what it says of itself, and what the probes say of it.
    """

    subject: str
    classes: Sequence[int]
    layers: int
    references: list[Row] = field(default_factory=list)
    presets: list[Row] = field(default_factory=list)
    peers: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    said: dict[str, dict[str, Any]] = field(default_factory=dict)


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, int]) -> float:
    """Mean of `values`, each as often as its weight says."""
    return math.fsum(value * weights[name] for name, value in values.items()) / sum(weights[name] for name in values)


def input_bits(fact: Mapping[str, float] | None, width: int, linearity_db: float) -> float:
    """Bits per number of a peer's layer input, by what the peer says, unless the probe shows that it stays in float.

    Args:
        fact: what the peer says of the layer; None for one that it left alone.
        width: input channels.
        linearity_db: how well the layer's probes agree.
    """
    if fact is None or linearity_db > FLOAT_PROBE_DB:
        return FLOAT_BITS
    return fact["input_bits"] + fact["input_extra_bits"] / width


def best(rows: Sequence[Row]) -> Row | None:
    """The row with the best guided noise prediction."""
    return max(rows, key=lambda row: row.eps_sqnr_db[JUDGED][0], default=None)


def answers(found: Found) -> list[str]:
    """Each preset against the best peers with 4-bit weights and quantized inputs: those as small, and any."""
    rivals = [row for row in found.peers if row.is_4_bit_rival]
    plain = best([row for row in rivals if row.weight_bits is not None and row.weight_bits <= PLAIN_BITS])
    best_of_all = best(rivals)
    if plain is None or best_of_all is None:
        return [f"{found.subject}: no peer with 4-bit weights and quantized inputs ran."]
    sentences = []
    for preset in found.presets:
        parts = [f"{found.subject}: {preset.name} ({_bits(preset)}) is {_against(preset, plain)}"]
        parts.append(f"the best peer with 4-bit weights and quantized inputs at no more than {PLAIN_BITS:g} bits")
        if best_of_all is not plain:
            parts.append(f"and {_against(preset, best_of_all)}, the best of any size")
        sentences.append(", ".join(parts) + ".")
    return sentences


def _bits(row: Row) -> str:
    return f"{row.weight_bits:.1f} bits per weight, {row.input_bits:.1f} per input"


def _against(preset: Row, peer: Row) -> str:
    gain = preset.gain_over(peer)
    return f"{compared(gain)} {peer.name} ({_bits(peer)}) by {signed_db(gain)}"


def result_table(found: Found) -> Table:
    columns = (
        Column("Method"),
        Column("Bits per weight", "", 2, "of the quantized layers: codes, scales, zero points and low-rank branches"),
        Column("Bits per input", "", 2, "of the numbers that these layers read, scales included; 32: not quantized"),
        *(Column(title, "dB", 2, "SQNR of the noise prediction; higher is better") for title in BRANCHES),
        Column("PSNR", "dB", 2, "of images, against float32's from the same noise; higher is better"),
    )
    rows = [
        (
            row.name,
            row.weight_bits,
            row.input_bits,
            *(Interval(*row.eps_sqnr_db[branch]) for branch in BRANCHES.values()),
            psnr_cell(row.psnr_db, found.classes),
        )
        for row in (*found.references, *found.presets, *found.peers)
    ]
    caption = (
        f"{PAIRS} held-out trajectories and {len(found.classes)} images; 95 % bootstrap intervals over them. Every "
        f"method quantizes the same {found.layers} linear layers of the blocks and nothing else, unless a note names it"
    )
    return Table(f"Accuracy, {found.subject}", columns, tuple(rows), caption)


def psnr_cell(ratios: Sequence[float], classes: Sequence[int]) -> Cell:
    """The mean with its interval; where images equal their originals it is infinite, and their number is given."""
    equal = sum(map(math.isinf, ratios))
    if equal:
        return math.inf if equal == len(ratios) else f"{equal} of {len(ratios)} exact"
    return bootstrap_mean(ratios, strata=classes)


def gain_table(found: Found) -> Table:
    columns = (
        Column("Peer"),
        *(
            Column(preset.name, "dB", 2, "noise prediction after guidance 1.5, better than the peer's by")
            for preset in found.presets
        ),
    )
    rows = tuple((peer.name, *(preset.gain_over(peer) for preset in found.presets)) for peer in found.peers)
    caption = "over the trajectories that both share, so that intervals are narrower than each method's own"
    return Table(f"Presets against peers, {found.subject}", columns, rows, caption)


def peer_table(everything: Sequence[Found], options: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each peer was asked for, and how many of its layers, over all models, were found to read floats."""
    columns = (
        Column("Peer"),
        Column("Library"),
        Column("Options"),
        Column("Layers", "", 0, "of all models, those that were quantized"),
        Column("Float inputs, 64 vectors", "", 0, "layers whose inputs stay in float"),
        Column("Float inputs, 16 vectors", "", 0, "the same where fewer vectors are read at once"),
    )
    rows: list[tuple[Cell, ...]] = []
    for peer, given in options.items():
        said = [found.said[peer] for found in everything if peer in found.said]
        asked = ", ".join(f"{key} {value}" for key, value in given.items() if key != "library")
        layers = sum(found.layers - len(found.said[peer]["float_layers"]) for found in everything if peer in found.said)
        counts = [sum(one["float_inputs"][rows_read] for one in said) for rows_read in ("64", "16")]
        rows.append((peer, given["library"], asked, *((layers, *counts) if said else (None, None, None))))
    return Table("What the peers did", columns, tuple(rows))


def failure_table(everything: Sequence[Found]) -> Table:
    columns = (Column("Peer"), Column("Model"), Column("Error"))
    rows = [(peer, found.subject, error) for found in everything for peer, error in found.failures.items()]
    return Table("Peers that did not run", columns, tuple(rows))


def figure(found: Found) -> Bars:
    rows = (*found.presets, *found.peers)
    value, low, high = (tuple(row.eps_sqnr_db[JUDGED][k] for row in rows) for k in range(3))
    return Bars(
        f"Noise prediction after guidance 1.5, {found.subject}",
        tuple(row.name for row in rows),
        "SQNR (dB)",
        (Series("guided 1.5", y=value, low=low, high=high),),
        "whiskers: 95 % bootstrap intervals over trajectories",
    )


def other_layers(everything: Sequence[Found]) -> list[str]:
    """A sentence for each peer that left some of the layers in float."""
    return [
        f"{peer} left {len(said['float_layers'])} of {found.layers} layers of {found.subject} in float: "
        f"{', '.join(said['float_layers'])}."
        for found in everything
        for peer, said in found.said.items()
        if said["float_layers"]
    ]


def record(
    everything: Sequence[Found],
    options: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    seconds: float,
) -> RunRecord:
    """The record of the run; `options` are those of every peer that was to run."""
    tables = [table for found in everything for table in (result_table(found), gain_table(found))]
    tables.append(peer_table(everything, options))
    failures = failure_table(everything)
    return RunRecord(
        name=NAME,
        title="Accuracy beside other libraries",
        question="How accurate are hqdit's presets beside SDNQ and torchao on the same trained models?",
        answers=tuple(sentence for found in everything for sentence in answers(found)),
        tables=(*tables, failures) if failures.rows else tuple(tables),
        figures=tuple(figure(found) for found in everything if found.presets or found.peers),
        config=config,
        environment=environment,
        seconds=seconds,
        notes=(
            "Bits per input are what a peer says of itself, and 32 where a probe of the layer finds it linear in its "
            "input, so that nothing is quantized. No layer reads fewer than 64 vectors at once in this measurement; "
            "SDNQ takes float inputs below 32, as in the modulation layers of small batches.",
            "SDNQ rounds 4-bit weights in groups a second time, to the dtype of its product, in every forward pass "
            "with quantized inputs (rounds_weights_again in the measurements).",
            "Low-rank branches of SDNQ are float32 here, as the models are, and read float inputs; those of svdquant "
            "have 16 bits, and read float inputs too. torchao keeps 4-bit codes in a byte each; the bits per weight "
            "count 4.",
            f"{FLOOR}: the float model's output against its own from other noise, the least that a method has to beat.",
            *other_layers(everything),
            *interval_notes("the rotation's signs and SDNQ's low-rank branches"),
        ),
        measurements={found.subject: found.said for found in everything},
    )


def text_table(table: Table) -> str:
    """The table for a terminal: words to the left, numbers to the right."""
    lines = [[header_text(column) for column in table.columns]]
    lines += [[cell_text(cell, column) for cell, column in zip(row, table.columns, strict=True)] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([table.title, *shown])
