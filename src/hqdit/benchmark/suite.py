"""The CPU benchmark: every part, interleaved, into one record."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hqdit.benchmark.contenders import PEERS_PROGRAM, PEERS_PYTHON, Contender
from hqdit.benchmark.memory import measure_memory
from hqdit.benchmark.products import SHAPES, measure_product
from hqdit.benchmark.worker import ALONE
from hqdit.benchmark.workload import CONFIGS, DIT_XL_2, write_float_model, write_inputs, write_quantized_model
from hqdit.errors import EnvironmentUnavailable
from hqdit.kernels.selection import current_backend
from hqdit.models.weights import WEIGHTS_NAME
from hqdit.numerics.error import sqnr_db
from hqdit.pipeline.environment import describe_environment
from hqdit.progress import track

OURS, EAGER = "hqdit, full rotation", "torch float32"
OURS_BLOCK = "hqdit, block:128 rotation"

COMPILED = ("torch float32, compiled",)

#: Contenders in this interpreter: variant of `hqdit.benchmark.worker` and folder of the model.
TORCH_AND_OURS = {
    EAGER: ("float32", "float"),
    OURS: ("hqdit", "full"),
    OURS_BLOCK: ("hqdit", "block128"),
    "torch float32, compiled": ("float32-compiled", "float"),
}

#: Peers and the options that make `serve_peer.py` prepare them.
PEERS: dict[str, tuple[str, ...]] = {
    "torch bfloat16": ("torch-bfloat16",),
    "torch bfloat16, compiled": ("torch-bfloat16-compiled",),
    "OpenVINO NNCF int8": ("openvino-int8",),
    "OpenVINO NNCF int8, float32 rest": ("openvino-int8", "--precision", "float32"),
    "OpenVINO int4 weights": ("openvino-int4",),
    "torchao int8 dynamic, compiled": ("torchao-int8",),
    "SDNQ int8": ("sdnq-int8",),
}

TOKENS = {256: 32, 1024: 64, 4096: 128}  # tokens -> side of the latent image
TOKENS_BLOCKS = 4
PROFILE_REPEATS = 7


def run_benchmark(work: Path, repeats: int, threads: int, blocks: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything.

    Args:
        work: an existing folder for models of a few gigabytes.
        repeats: of everything that is timed; at least 7 for a record.
        threads: of everybody.
        blocks: of DiT-XL/2; 28 is the whole model.
        tell: says what is going on.

    Returns:
        The record: ratios (others / ours, so that larger is better), all repeats, and where they were measured.
    """
    torch.set_num_threads(threads)
    tell("products")
    products = [measure_product(*shape, repeats) for shape in track(SHAPES, "products")]
    tell("writing the model and quantizing it twice")
    write_float_model(work / "float", blocks)
    for name, config in CONFIGS.items():
        write_quantized_model(work / "float", work / name, config)
    write_inputs(work / "inputs.safetensors", batch=2)
    tell("memory")
    memory = _memory(work, blocks, threads)
    tell("forward passes")
    forward = _forward(work, repeats, threads, tell)
    tell("numbers of tokens")
    forward["by_tokens"] = [_tokens(work, tokens, repeats, threads) for tokens in track(TOKENS, "tokens")]
    profile = forward.pop("profile")
    return {
        "product": products,
        "forward": forward,
        "rotate_quantize_fraction": {
            "block128": _fraction(profile[OURS_BLOCK]),
            "full": _fraction(profile[OURS]),
        },
        "memory": memory,
        "profile": profile,
        "blocks": blocks,
        "threads": threads,
        "repeats": repeats,
        "model": DIT_XL_2 | {"num_layers": blocks},
        "configs": {name: config.to_json() for name, config in CONFIGS.items()},
        "backend": current_backend().description,
        "environment": describe_environment(),
    }


def _fraction(profile: dict[str, float]) -> float:
    return profile[ALONE] / profile["forward"]


def _forward(work: Path, repeats: int, threads: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Ours and float32, then in turns with each other contender; only one of these is in memory at a time."""
    inputs, output = work / "inputs.safetensors", work / "output.npy"
    has_peers = PEERS_PYTHON.is_file() and PEERS_PROGRAM.is_file()
    absent = {} if has_peers else dict.fromkeys(PEERS, "make bench-peers has not been run")
    rounds: dict[str, dict[str, list[float]]] = {}
    outputs: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    base: list[Contender] = []

    def start(name: str) -> Contender:
        tell(f"preparing {name}")
        log = work / "contender.log"
        if name in PEERS:
            options = [*PEERS[name], "--cache", str(work / "cache")]
            return Contender.peer(name, options, work / "float", inputs, threads, log)
        variant, model = TORCH_AND_OURS[name]
        return Contender.ours(variant, name, work / model, inputs, threads, log)

    def keep(contender: Contender) -> None:
        contender.write_output(output)
        outputs[contender.name] = torch.from_numpy(np.load(output, allow_pickle=False))
        settings[contender.name] = contender.ready

    try:
        for name in (EAGER, OURS, OURS_BLOCK):
            base.append(start(name))
            keep(base[-1])
        rounds[EAGER] = _rounds(base, repeats)
        profile = {contender.name: contender.profile(PROFILE_REPEATS) for contender in base[1:]}
        for name in (*COMPILED, *(PEERS if has_peers else ())):
            try:
                other = start(name)
            except EnvironmentUnavailable as error:
                absent[name] = str(error)
                continue
            try:
                rounds[name] = _rounds([*base, other], repeats)
                keep(other)
            finally:
                other.kill()
    finally:
        for contender in base:
            contender.kill()
    medians = {name: statistics.median(seconds[name]) for name, seconds in rounds.items()}
    medians |= {name: statistics.median(rounds[EAGER][name]) for name in (OURS, OURS_BLOCK)}
    peers = {name: medians[name] / statistics.median(rounds[name][OURS]) for name in rounds if name in PEERS}
    fastest = min(peers, key=lambda name: peers[name]) if peers else None
    return {
        "vs_float32_eager": medians[EAGER] / medians[OURS],
        "vs_fastest_peer": peers[fastest] if fastest else None,
        "fastest_peer": fastest,
        "vs_each_peer": peers,
        "median_seconds": medians,
        "output_sqnr_db": {name: sqnr_db(outputs[EAGER], tensor) for name, tensor in outputs.items() if name != EAGER},
        "rounds": rounds,
        "contenders": settings,
        "absent": absent,
        "profile": profile,
    }


def _rounds(contenders: list[Contender], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender, taken in turns."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in track(range(repeats), f"forward passes beside {contenders[-1].name}"):
        for contender in contenders:
            seconds[contender.name].append(contender.seconds())
    return seconds


def _tokens(work: Path, tokens: int, repeats: int, threads: int) -> dict[str, Any]:
    folder = work / f"tokens-{tokens}"
    folder.mkdir()
    write_float_model(folder / "float", TOKENS_BLOCKS, TOKENS[tokens])
    write_quantized_model(folder / "float", folder / "full", CONFIGS["full"])
    inputs = folder / "inputs.safetensors"
    write_inputs(inputs, batch=1, sample_size=TOKENS[tokens])
    contenders = []
    try:
        for variant, model in (("float32", "float"), ("hqdit", "full")):
            log = folder / f"{variant}.log"
            contenders.append(Contender.ours(variant, variant, folder / model, inputs, threads, log))
        seconds = _rounds(contenders, repeats)
    finally:
        for contender in contenders:
            contender.kill()
    ratio = statistics.median(seconds["float32"]) / statistics.median(seconds["hqdit"])
    return {"tokens": tokens, "blocks": TOKENS_BLOCKS, "vs_float32_eager": ratio, "seconds": seconds}


def _memory(work: Path, blocks: int, threads: int) -> dict[str, Any]:
    """File sizes and peaks; the model with distinct embedders is written, weighed and removed."""
    inputs = work / "inputs.safetensors"
    write_float_model(work / "distinct", blocks, shares_embedders=False)
    write_quantized_model(work / "distinct", work / "distinct-full", CONFIGS["full"])
    folders = {"float": "float", "shared": "full", "distinct": "distinct-full"}
    sizes = {name: (work / folder / WEIGHTS_NAME).stat().st_size for name, folder in folders.items()}
    peaks = {name: measure_memory(work / folder, inputs, threads) for name, folder in folders.items()}
    for folder in ("distinct", "distinct-full"):
        (work / folder / WEIGHTS_NAME).unlink()
    above = {name: peak["above_imports_bytes"] for name, peak in peaks.items()}
    return {
        "file_ratio": sizes["float"] / sizes["distinct"],
        "file_ratio_shared_embedders": sizes["float"] / sizes["shared"],
        "peak_ratio": above["float"] / above["distinct"],
        "peak_ratio_shared_embedders": above["float"] / above["shared"],
        "file_bytes": sizes,
        "peaks": peaks,
    }
