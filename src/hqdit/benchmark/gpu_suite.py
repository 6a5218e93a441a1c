"""The GPU benchmark: products and forward passes, interleaved, into a record with the keys of the CPU benchmark."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqdit.benchmark.clock import Clock
from hqdit.benchmark.gpu_models import (
    COMPILED,
    EAGER,
    WORKLOADS,
    Contender,
    Forward,
    Workload,
    contenders,
    write_models,
)
from hqdit.benchmark.gpu_products import SHAPES, measure_gpu_product
from hqdit.benchmark.workload import CONFIGS, DIT_XL_2
from hqdit.errors import EnvironmentUnavailable, reason_of
from hqdit.kernels.selection import current_backend, use_backend
from hqdit.models.weights import WEIGHTS_NAME
from hqdit.numerics.error import sqnr_db
from hqdit.pipeline.environment import describe_environment

#: Whose forward pass is taken apart, and the part that is no part of it: see `benchmark.worker`.
PROFILED, ALONE = "hqdit", "rotate and quantize alone"


def run_gpu_benchmark(
    work: Path,
    device: torch.device,
    repeats: int,
    blocks: int,
    tell: Callable[[str], None],
    backend: str = "triton",
    workloads: Sequence[Workload] = WORKLOADS,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        work: an existing folder for models of a few gigabytes.
        device: a CUDA device; tests give another one, on which nothing is compiled or captured.
        repeats: of everything that is timed; at least 7 for a record.
        blocks: of DiT-XL/2; 28 is the whole model.
        tell: says what is going on.
        backend: ours.
        workloads, shapes: forward passes, of which the last of "dit" stands for all in `forward`, and products.

    Returns:
        The record: ratios (others / ours, so that larger is better), all repeats, and where they were measured.
    """
    clock, is_cuda = Clock(device), device.type == "cuda"
    tell("products")
    products = [measure_gpu_product(*shape, repeats, clock, backend, compiles=is_cuda) for shape in shapes]
    found = {workload.name: _workload(workload, work, clock, repeats, blocks, backend, tell) for workload in workloads}
    main = [workload.name for workload in workloads if workload.model == "dit"][-1]
    profile = {name: entry.pop("profile") for name, entry in found.items()}
    with use_backend(backend):
        description = current_backend().description
    return {
        "device": device.type,
        "product": products,
        "forward": found[main],
        "workloads": found,
        "rotate_quantize_fraction": {name: parts[ALONE] / parts["forward"] for name, parts in profile.items()},
        "memory": found[main]["memory"],
        "profile": profile,
        "blocks": blocks,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "model": DIT_XL_2 | {"num_layers": blocks},
        "configs": {"full": CONFIGS["full"].to_json()},
        "backend": description,
        "environment": describe_environment(),
    }


def _workload(
    workload: Workload, work: Path, clock: Clock, repeats: int, blocks: int, backend: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All contenders in turns, everybody in memory at once."""
    tell(f"{workload.name}: writing the model and quantizing it")
    folders = write_models(workload, work, blocks)
    torch.compiler.reset()  # torch compiles a class only so often
    forwards: dict[str, Forward] = {}
    outputs: dict[str, Tensor] = {}
    bytes_held: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    absent: dict[str, str] = {}
    for name, contender in contenders(backend).items():
        tell(f"{workload.name}: preparing {name}")
        try:
            forwards[name], bytes_held[name] = _prepare(contender, workload, folders, clock.device)
        except Exception as error:  # whatever a contender cannot do is kept in the record
            absent[name] = reason_of(error)
            continue
        outputs[name], peaks[name] = _output_and_peak(forwards[name], clock.device)
    seconds = clock.turns(forwards, repeats, workload.name)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = min((name for name in medians if name.startswith(PROFILED)), key=lambda name: medians[name])
    ratios = {name: median / medians[ours] for name, median in medians.items() if not name.startswith(PROFILED)}
    peers = {name: ratio for name, ratio in ratios.items() if not name.startswith(EAGER)}
    fastest = min(peers, key=lambda name: peers[name]) if peers else None
    weights = {
        name: (folder / WEIGHTS_NAME).stat().st_size for name, folder in zip(("float", "ours"), folders, strict=True)
    }
    return {
        "vs_float32_eager": ratios[EAGER],
        "vs_bfloat16_compiled": ratios.get(COMPILED),
        "vs_fastest_peer": peers[fastest] if fastest else None,
        "fastest_peer": fastest,
        "fastest_ours": ours,
        "vs_each_peer": peers,
        "median_seconds": medians,
        "output_sqnr_db": {name: _sqnr_db(outputs[EAGER], output) for name, output in outputs.items() if name != EAGER},
        "rounds": {"all": seconds},
        "contenders": {name: {"model_bytes": bytes_held[name], "peak_bytes": peaks[name]} for name in forwards},
        "absent": absent,
        "by_tokens": [],
        "memory": {
            "file_ratio": weights["float"] / weights["ours"],
            "model_ratio_bfloat16": bytes_held["torch bfloat16"] / bytes_held[PROFILED],
            "file_bytes": weights,
        },
        "profile": _profile(forwards[PROFILED], clock, repeats, backend),
    }


def _sqnr_db(exact: Tensor, output: Tensor) -> float | None:
    """None for equal outputs: JSON has no infinity."""
    found = sqnr_db(exact, output)
    return found if math.isfinite(found) else None


def _prepare(
    contender: Contender, workload: Workload, folders: tuple[Path, Path], device: torch.device
) -> tuple[Forward, int]:
    if device.type != "cuda" and (contender.is_compiled or contender.is_captured):
        raise EnvironmentUnavailable(f"found {device}, needed a CUDA device. Fix: --device cuda")
    return contender.prepare(workload, folders, device)


def _output_and_peak(forward: Forward, device: torch.device) -> tuple[Tensor, int | None]:
    """The output on the CPU, float32, and the most bytes of device memory that the pass took; None on a CPU."""
    if device.type != "cuda":
        return forward().float(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = forward().float().cpu()
    return output, torch.cuda.max_memory_allocated(device) - before


def _profile(forward: Forward, clock: Clock, repeats: int, backend: str) -> dict[str, float]:
    """Median seconds that one pass spends in each method of the backend, and in rotation and rounding alone."""
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        parts: dict[str, float] = defaultdict(float)
        with use_backend(backend), _timed_methods(clock, parts):
            forward()
        parts["forward"] = clock.seconds(forward)
        for name, value in parts.items():
            samples[name].append(value)
    return {name: statistics.median(values) for name, values in samples.items()}


@contextmanager
def _timed_methods(clock: Clock, parts: dict[str, float]) -> Iterator[None]:
    """Add up the time of each method of the current backend, one call after the other."""
    backend, names = current_backend(), ("quantize_input", "linear", "attention")

    def timed(name: str) -> Callable[..., Any]:
        method = getattr(backend, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            results: list[Any] = []
            parts[name] += clock.seconds(lambda: results.append(method(*args, **kwargs)), has_head_start=True)
            if name == "quantize_input":  # once more, without what is fused before it
                parts[ALONE] += clock.seconds(lambda: method(args[0], args[1]), has_head_start=True)
            return results[0]

        return call

    for name in names:
        setattr(backend, name, timed(name))
    try:
        yield
    finally:
        for name in names:
            delattr(backend, name)
