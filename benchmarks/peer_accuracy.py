"""Accuracy of hqdit's presets beside other libraries on the same trained models: `make peer-accuracy`.

Every method is measured by the same code: the noise prediction on held-out trajectories of the float model, and images
from the same noise. A peer runs in the peers' environment, in a process of its own; what it computes reaches the
measurements as the forward pass of a copy of the float model. A peer that fails is recorded with its error.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peer_record import (
    BRANCHES,
    FLOAT_BITS,
    FLOAT_PROBE_DB,
    JUDGED,
    Found,
    Row,
    input_bits,
    record,
    text_table,
    weighted_mean,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hqdit.analysis.inspection import bits_per_input, bits_per_weight
from hqdit.benchmark.contenders import PEERS_PYTHON, Contender
from hqdit.errors import EnvironmentUnavailable, HQDiTError, NumericsError
from hqdit.evaluation.fidelity import noise_predictions, prediction_fidelity, psnr_of_images
from hqdit.experiments.cache import ResultCache
from hqdit.experiments.image_scores import FLOAT32
from hqdit.experiments.laboratory import GUIDANCES, IMAGE_BATCH, Laboratory
from hqdit.experiments.noise_floor import FLOOR, noise_floor
from hqdit.experiments.subjects import SUBJECTS, Subject
from hqdit.experiments.table_w4a4 import LOW_RANK, method_config
from hqdit.integrations.diffusers_logging import silence_diffusers
from hqdit.kernels.selection import current_backend
from hqdit.models.adapter import class_conditional_adapter
from hqdit.numerics.error import sqnr_db
from hqdit.pipeline.checkpoint import quantized_layers, save
from hqdit.pipeline.config import PRESETS
from hqdit.pipeline.environment import describe_environment
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.publish import publish_text
from hqdit.progress import quiet
from hqdit.records.run_record import RECORD_NAME
from hqdit.sampling.noise import SAMPLE
from hqdit.sampling.sampler import generate_images

#: Measured where they exist, unless `--presets` names others.
WANTED_PRESETS = ("hqdit-plus", "hqdit-plus-token", "hqdit", "w4a8", "minmax", "svdquant")


@dataclass(frozen=True)
class Peer:
    """Another library with one set of options; `peers/accuracy_peer.py` says what they mean."""

    name: str
    library: str
    options: Mapping[str, Any] = field(default_factory=dict)


SDNQ_DTYPES = ("float4_e2m1fn", "int4", "uint4")
#: SDNQ's own rank, 32, is a quarter of these models' width, so that the branch outweighs the codes; `LOW_RANK` is the
#: share of the width that rank 32 is on DiT-XL/2. Both are measured. Its own groups are of 64 channels, or whole rows
#: where a width has no divisor that it tries.
SDNQ_BOTH = f", Hadamard, SVD {LOW_RANK}"
SDNQ_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    ", Hadamard": {"use_hadamard": True},
    f", SVD {LOW_RANK}": {"use_svd": True, "svd_rank": LOW_RANK},
    SDNQ_BOTH: {"use_hadamard": True, "use_svd": True, "svd_rank": LOW_RANK},
    ", Hadamard, SVD 32": {"use_hadamard": True, "use_svd": True, "svd_rank": 32},
    ", Hadamard, groups of 32": {"use_hadamard": True, "group_size": 32},
}
#: Inputs are quantized in the dtype that SDNQ takes by itself: E4M3 for float weights, INT8 for integers.
SDNQ_PRODUCT = {"use_quantized_matmul": True}
#: The last two are made for other machines or widths, and may not run.
TORCHAO = {
    "torchao int8 weights, int8 dynamic": "Int8DynamicActivationInt8WeightConfig",
    "torchao int4 weights, int8 dynamic": "Int8DynamicActivationIntxWeightConfig",
    "torchao int4, weights only": "IntxWeightOnlyConfig",
    "torchao int4 for CUDA, weights only": "Int4WeightOnlyConfig",
    "torchao int4 for CPUs (prototype), weights only": "PrototypeInt4WeightOnlyConfig",
}

#: The float model, unchanged, in a peer's process: shows what the way there and back does.
CONTROL = Peer("float32 in a peer's process", "torch")
CONTROL_DB = 100.0

PEERS = (
    CONTROL,
    *(
        Peer(f"SDNQ {dtype}{variant}", "sdnq", {"weights_dtype": dtype, **SDNQ_PRODUCT, **options})
        for dtype in SDNQ_DTYPES
        for variant, options in SDNQ_VARIANTS.items()
    ),
    # The inputs of INT8 products are finer than those in E4M3.
    *(
        Peer(
            f"SDNQ float4_e2m1fn in int8{variant}",
            "sdnq",
            {
                "weights_dtype": "float4_e2m1fn",
                "quantized_matmul_dtype": "int8",
                **SDNQ_PRODUCT,
                **SDNQ_VARIANTS[variant],
            },
        )
        for variant in ("", SDNQ_BOTH)
    ),
    # What SDNQ does when it is asked for no more than 4-bit weights: inputs stay in float.
    *(
        Peer(f"SDNQ {dtype}{SDNQ_BOTH}, weights only", "sdnq", {"weights_dtype": dtype, **SDNQ_VARIANTS[SDNQ_BOTH]})
        for dtype in SDNQ_DTYPES
    ),
    *(Peer(name, "torchao", {"config": config}) for name, config in TORCHAO.items()),
)

PROGRAM = Path("benchmarks/peers/accuracy_peer.py")
#: What a peer's results depend on besides its options, the model and our own code.
PEER_FILES = (PROGRAM, Path("benchmarks/peers/requirements.txt"), Path("constraints.txt"))
IMAGES = 64
#: The longer of the two probes of a layer; no layer reads fewer vectors in this measurement.
PROBE_ROWS = "64"


def main() -> None:
    existing = [name for name in WANTED_PRESETS if name in PRESETS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--work", type=Path, default=Path("build/peer_accuracy"), help="folder of finished results")
    parser.add_argument("--presets", nargs="+", default=existing, choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument("--subjects", nargs="+", default=[s.name for s in SUBJECTS], metavar="MODEL")
    parser.add_argument("--peers", default="", metavar="TEXT", help="only peers whose names contain it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    subjects = [subject for subject in SUBJECTS if subject.name in args.subjects]
    peers = [peer for peer in PEERS if peer is CONTROL or args.peers in peer.name]
    torch.set_num_threads(1)
    silence_diffusers()
    start, environment = time.perf_counter(), describe_environment()  # of the code that runs now
    with TemporaryDirectory() as work, quiet():
        lab = Laboratory(ResultCache(args.work), Path(work), args.seed, tell=tell)
        comparison = Comparison(lab, subjects, Path(work))
        comparison.measure_ours(args.presets)
        for peer in peers:
            comparison.measure_peer(peer)
    found = list(comparison.found.values())
    config = {
        **lab.settings,
        "images": IMAGES,
        "presets": args.presets,
        "low_rank": LOW_RANK,
        "results_from_cache": lab.cache.misses == 0,
    }
    options = {peer.name: {"library": peer.library, **peer.options} for peer in peers}
    environment |= {"backend": current_backend().description, "peers": comparison.versions}
    result = record(found, options, config, environment, time.perf_counter() - start)
    args.out.mkdir(parents=True, exist_ok=True)
    publish_text(args.out / RECORD_NAME, result.to_text())
    for table in result.tables:
        print(f"\n{text_table(table)}")
    print("", *result.answers, sep="\n")


def tell(text: str) -> None:
    print(text, flush=True)


class Comparison:
    """Runs every method on every subject; a run that was cut off goes on from what the laboratory's cache keeps.

    Args:
        lab: gives inputs, float images, calibration data and quantized models.
        subjects: the models.
        work: folder for models, probes and what goes to the peers.
    """

    def __init__(self, lab: Laboratory, subjects: Sequence[Subject], work: Path) -> None:
        self._lab, self._work = lab, work
        self._sites = {subject: Site(subject, work / f"model-{k}") for k, subject in enumerate(subjects)}
        #: Versions of the peers' libraries.
        self.versions: dict[str, str] = {}
        self.found = {
            subject: Found(subject.name, classes_in_turn(subject), len(site.layers))
            for subject, site in self._sites.items()
        }

    def measure_ours(self, presets: Sequence[str]) -> None:
        for subject, site in self._sites.items():
            self.found[subject].references += self._references(subject)
            for name in presets:
                compute = partial(self._preset_row, name, subject, site)
                row, _ = self._kept(name, subject, {"preset": method_config(name).to_json()}, compute)
                self.found[subject].presets.append(row)

    def _kept(
        self, name: str, subject: Subject, method: Mapping[str, Any], compute: Callable[[], tuple[Row, dict[str, Any]]]
    ) -> tuple[Row, dict[str, Any]]:
        """What `compute` returns, from the cache if an earlier run has finished it."""
        self._lab.tell(f"{subject.name}: {name}")
        key = {"what": "peer accuracy", "subject": subject.name, "images": IMAGES, **self._lab.settings}

        def measure() -> dict[str, Any]:
            row, said = compute()
            return {"row": dataclasses.asdict(row), "said": said}

        found = self._lab.cache.numbers({**key, "name": name, **method}, measure)
        return Row(**found["row"]), found["said"]

    def _preset_row(self, name: str, subject: Subject, site: Site) -> tuple[Row, dict[str, Any]]:
        model = self._lab.quantized(subject, method_config(name))
        layers = quantized_layers(model)
        bits = weighted_mean({at: bits_per_input(layer) for at, layer in layers.items()}, site.numbers)
        codes = max(fmt.bits for layer in layers.values() for fmt in layer.spec.weight.formats)
        return Row(name, bits_per_weight(model), bits, codes, **self._scores(subject, model)), {}

    def measure_peer(self, peer: Peer) -> None:
        """One process for all subjects, started when it is needed; a new one after an error."""
        process: Contender | None = None
        method = {"peer": {"library": peer.library, **peer.options}, "files": digest(PEER_FILES)}

        def compute(subject: Subject) -> tuple[Row, dict[str, Any]]:
            nonlocal process
            process = process or self._start(peer)
            return self._peer_row(peer, process, subject)

        try:
            for subject in self._sites:
                try:
                    row, said = self._kept(peer.name, subject, method, partial(compute, subject))
                except HQDiTError as error:
                    self.found[subject].failures[peer.name] = str(error)
                    if process is not None:
                        process.kill()
                    process = None
                    continue
                self.versions = said.pop("versions")
                self.found[subject].said[peer.name] = said
                if peer is CONTROL:
                    require_control(row)
                    self.found[subject].references.insert(1, row)
                else:
                    self.found[subject].peers.append(row)
        finally:
            if process is not None:
                process.kill()

    def _start(self, peer: Peer) -> Contender:
        if not PEERS_PYTHON.is_file():
            raise EnvironmentUnavailable(
                f"{peer.name}: found no environment of the peers, needed {PEERS_PYTHON}. Fix: make bench-peers"
            )
        command = [PEERS_PYTHON, PROGRAM, peer.library, "--options", json.dumps(dict(peer.options))]
        return Contender(peer.name, command, self._work / "peer.log")

    def _peer_row(self, peer: Peer, process: Contender, subject: Subject) -> tuple[Row, dict[str, Any]]:
        """The peer's row, and what it and the probes say of its layers.

        Raises:
            EnvironmentUnavailable: the peer fails, or quantizes none of the layers.
            NumericsError: it predicts NaN or infinity.
        """
        site, probes = self._sites[subject], self._work / "probes.safetensors"
        request = {"op": "quantize", "model": str(site.folder), "layers": site.layers, "probes": str(probes)}
        reply = process.ask(request)
        facts = reply["layers"]
        if not facts:
            raise EnvironmentUnavailable(
                f"{peer.name}: found none of {len(site.layers)} layers quantized, needed some. Fix: see which widths "
                "it takes"
            )
        linearity = linearity_db(load_file(probes))
        read = {
            name: input_bits(facts.get(name), site.widths[name], linearity[PROBE_ROWS][name]) for name in site.layers
        }
        stored = {name: facts[name]["weight_bits"] if name in facts else FLOAT_BITS for name in site.layers}
        row = Row(
            peer.name,
            weighted_mean(stored, site.weights),
            weighted_mean(read, site.numbers),
            max(fact["code_bits"] for fact in facts.values()),
            **self._scores(subject, self._remote(subject, process)),
        )
        said = {
            "versions": process.ready["versions"],
            "float_layers": [name for name in site.layers if name not in facts],
            "memory_bits_per_weight": weighted_mean(
                {name: fact["memory_bits"] for name, fact in facts.items()}, site.weights
            ),
            "settings": reply["settings"],
            "linearity_db": {rows: [min(dbs.values()), max(dbs.values())] for rows, dbs in linearity.items()},
            "float_inputs": {rows: sum(db > FLOAT_PROBE_DB for db in dbs.values()) for rows, dbs in linearity.items()},
        }
        return row, said

    def _remote(self, subject: Subject, process: Contender) -> nn.Module:
        """The subject's model, with the forward pass of the peer."""
        given, answered = self._work / "inputs.safetensors", self._work / "output.npy"

        def forward(latents: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
            tensors = {"hidden_states": latents, "timestep": timestep, "class_labels": class_labels}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, given)
            process.ask({"op": "forward", "inputs": str(given), "output": str(answered)})
            return SimpleNamespace(sample=torch.from_numpy(np.load(answered, allow_pickle=False)))

        model = copy.deepcopy(subject.model)
        model.forward = forward
        return model

    @torch.no_grad()
    def _scores(self, subject: Subject, model: nn.Module) -> dict[str, Any]:
        """The measured fields of a row."""
        lab = self._lab
        inputs, exact = lab.inputs(subject), lab.exact_predictions(subject)
        noise = prediction_fidelity(exact, noise_predictions(model, inputs), inputs.timesteps, *GUIDANCES)
        intervals = {branch: powers.db_interval for branch, powers in noise.branches.items()}
        classes = classes_in_turn(subject)
        images = generate_images(model, subject.scheduler, None, classes, lab.sampling, lab.seed, SAMPLE, IMAGE_BATCH)
        return {
            "eps_sqnr_db": {branch: (found.value, found.low, found.high) for branch, found in intervals.items()},
            "eps_noise_powers": {
                branch: powers.noise.sum(axis=0).tolist() for branch, powers in noise.branches.items()
            },
            "psnr_db": psnr_of_images(lab.samples(subject, None, IMAGES), images),
        }

    def _references(self, subject: Subject) -> list[Row]:
        """The float model, which everything is compared with, and the floor that keeps nothing of it."""
        exact = dict.fromkeys(BRANCHES.values(), (math.inf,) * 3)
        own, other = (self._lab.samples(subject, None, IMAGES, seed=self._lab.seed + k) for k in (0, 1))
        floor = noise_floor(self._lab, subject)["eps_sqnr_db"]
        return [
            Row(FLOAT32, FLOAT_BITS, FLOAT_BITS, None, exact, [math.inf] * IMAGES),
            Row(FLOOR, None, None, None, floor, psnr_of_images(own, other)),
        ]


class Site:
    """A subject as the peers get it.

    Attributes:
        folder: the float model in diffusers' layout.
        layers: names of the layers that hqdit quantizes, in the order of the forward pass.
        widths: layer -> input channels.
        weights: layer -> number of its weights.
        numbers: layer -> numbers that it reads in a forward pass of one sample.
    """

    def __init__(self, subject: Subject, folder: Path) -> None:
        save(subject.model, folder)
        planned = plan_quantization(subject.model, PRESETS["hqdit"]).layers
        self.folder = folder
        self.layers = [layer.site.name for layer in planned]
        self.widths = {layer.site.name: layer.in_features for layer in planned}
        self.weights = {layer.site.name: layer.in_features * layer.out_features for layer in planned}
        self.numbers = numbers_read(subject.model, self.layers)


@torch.no_grad()
def numbers_read(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """Layer -> numbers that it reads in a forward pass of one sample."""
    adapter, counts = class_conditional_adapter(model), dict.fromkeys(layers, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            counts[name] += given[0].numel()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in layers]
    first = torch.zeros(1, dtype=torch.long)
    adapter.predict_noise(model, torch.zeros(1, *adapter.latent_shape(model)), first, first)
    for handle in handles:
        handle.remove()
    return counts


def linearity_db(probes: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Number of vectors -> layer -> how well its two probes agree, which are called LAYER/VECTORS/first and second."""
    found: dict[str, dict[str, float]] = {}
    for key, tensor in probes.items():
        layer, rows, which = key.rsplit("/", 2)
        if which == "first":
            found.setdefault(rows, {})[layer] = sqnr_db(tensor, probes[f"{layer}/{rows}/second"])
    return found


def digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def classes_in_turn(subject: Subject) -> list[int]:
    """The classes of the images, as `Laboratory.samples` has them."""
    return [index % subject.num_classes for index in range(IMAGES)]


def require_control(row: Row) -> None:
    """Raise `NumericsError` unless the float model computes the same in a peer's process."""
    if row.eps_sqnr_db[JUDGED][0] < CONTROL_DB:
        raise NumericsError(
            f"{row.name}: found {row.eps_sqnr_db[JUDGED][0]:.1f} dB against the float model, needed {CONTROL_DB:g}. "
            "Fix: make bench-peers with the versions in constraints.txt"
        )


if __name__ == "__main__":
    main()
