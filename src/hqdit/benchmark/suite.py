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

#: The same model through torch alone, beside eager float32.
FLOAT_VARIANTS = {"torch float32, compiled": "float32-compiled"}

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
    inputs = work / "inputs.safetensors"
    contenders: list[Contender] = []
    absent: dict[str, str] = {}

    def start(name: str, make: Callable[[Path], Contender]) -> None:
        tell(f"preparing {name}")
        try:
            contenders.append(make(work / f"{name}.log"))
        except EnvironmentUnavailable as error:
            absent[name] = str(error)

    try:
        ours = {OURS: "full", OURS_BLOCK: "block128"}
        contenders.append(Contender.ours("float32", EAGER, work / "float", inputs, threads, work / "float32.log"))
        for name, folder in ours.items():
            contenders.append(Contender.ours("hqdit", name, work / folder, inputs, threads, work / f"{folder}.log"))
        for name, variant in FLOAT_VARIANTS.items():
            start(
                name,
                lambda log, name=name, variant=variant: Contender.ours(  # type: ignore[misc]
                    variant, name, work / "float", inputs, threads, log
                ),
            )
        has_peers = PEERS_PYTHON.is_file() and PEERS_PROGRAM.is_file()
        for name, options in PEERS.items() if has_peers else ():
            start(
                name,
                lambda log, name=name, options=options: Contender.peer(  # type: ignore[misc]
                    name, [*options, "--cache", str(work / "cache")], work / "float", inputs, threads, log
                ),
            )
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for _ in track(range(repeats), "forward passes"):
            for contender in contenders:
                seconds[contender.name].append(contender.seconds())
        outputs = {}
        for contender in contenders:
            path = work / "output.npy"
            contender.write_output(path)
            outputs[contender.name] = torch.from_numpy(np.load(path, allow_pickle=False))
        profile = {c.name: c.profile(PROFILE_REPEATS) for c in contenders if c.name in ours}
        settings = {contender.name: contender.ready for contender in contenders}
    finally:
        for contender in contenders:
            contender.kill()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peers = {name: value for name, value in medians.items() if name in PEERS}
    fastest = min(peers, key=lambda name: peers[name]) if peers else None
    return {
        "vs_float32_eager": medians[EAGER] / medians[OURS],
        "vs_fastest_peer": peers[fastest] / medians[OURS] if fastest else None,
        "fastest_peer": fastest,
        "median_seconds": medians,
        "output_sqnr_db": {name: sqnr_db(outputs[EAGER], output) for name, output in outputs.items() if name != EAGER},
        "seconds": seconds,
        "contenders": settings,
        "absent": absent if has_peers else {name: "make bench-peers has not been run" for name in PEERS},
        "profile": profile,
    }


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
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for _ in range(repeats):
            for contender in contenders:
                seconds[contender.name].append(contender.seconds())
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
