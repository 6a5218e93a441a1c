"""One contender in a process of its own: `python -m hqdit.benchmark.worker`.

It prepares a model, says on standard output that it is ready, and then answers requests, one JSON object a line, so
that the caller can interleave the repeats of several contenders:

| request                          | answer                                                             |
|----------------------------------|--------------------------------------------------------------------|
| {"op": "time", "repeats": n}     | {"seconds": [...]}: n forward passes                               |
| {"op": "output", "path": P}      | {"path": P}: the output as a NumPy file, float32                   |
| {"op": "profile", "repeats": n}  | {"seconds": {part: median}}: where a forward pass spends its time  |
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hqdit.kernels.preparation import Front, InputPreparation
from hqdit.kernels.selection import current_backend
from hqdit.pipeline.checkpoint import load

#: Part of a profile that is no part of the forward pass: rotation and rounding without what is fused before them.
ALONE = "rotate and quantize alone"

CONTENDERS = ("float32", "float32-compiled", "hqdit")


def main() -> None:
    """Prepare, then serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    replies = _take_over_stdout()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    with torch.inference_mode():
        forward = _prepare(args.contender, args.model, args.inputs)
        for _ in range(2):
            forward()
        _send(replies, {"ready": True, "prepare_seconds": time.perf_counter() - start, "settings": _settings(args)})
        for line in sys.stdin:
            _send(replies, _answer(json.loads(line), forward))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    is_ours = args.contender == "hqdit"
    return {"threads": args.threads, "backend": current_backend().description if is_ours else "torch"}


def _prepare(contender: str, model_folder: Path, inputs: Path) -> Callable[[], Tensor]:
    model: Any = load(model_folder)
    if contender.endswith("-compiled"):
        model = torch.compile(model)
    given = load_file(inputs)
    return lambda: model(given["latents"], timestep=given["timesteps"], class_labels=given["class_labels"]).sample


def _answer(request: dict[str, Any], forward: Callable[[], Tensor]) -> dict[str, Any]:
    if request["op"] == "time":
        return {"seconds": [_seconds(forward) for _ in range(request["repeats"])]}
    if request["op"] == "output":
        np.save(request["path"], forward().to(torch.float32).numpy(), allow_pickle=False)
        return {"path": request["path"]}
    return {"seconds": _profile(forward, request["repeats"])}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _profile(forward: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    """Median seconds that one forward pass spends in each kernel, and in rotation and rounding by themselves.

    `ALONE` repeats what the forward pass did without the function that comes before (LayerNorm and
    modulation, GELU, SiLU), which the fused kernel does in the same pass.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    prepared: list[tuple[Tensor, InputPreparation]] = []
    for _ in range(repeats):
        parts: dict[str, float] = defaultdict(float)
        prepared.clear()
        with _timed_kernels(parts, prepared):
            parts["forward"] = _seconds(forward)
        for x, preparation in prepared:
            alone = partial(current_backend().quantize_input, x, preparation)
            parts[ALONE] += _seconds(alone)
        for name, value in parts.items():
            samples[name].append(value)
    return {name: statistics.median(values) for name, values in samples.items()}


@contextmanager
def _timed_kernels(parts: dict[str, float], prepared: list[tuple[Tensor, InputPreparation]]) -> Iterator[None]:
    """Add up the time spent in each method of the current backend, and keep what was quantized."""
    backend = current_backend()
    names = ("quantize_input", "linear", "attention")

    def timed(name: str) -> Callable[..., Any]:
        method = getattr(backend, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "quantize_input":
                prepared.append((args[0], args[1]))
            start = time.perf_counter()
            result = method(*args, **kwargs)
            parts[_part(name, *args)] += time.perf_counter() - start
            return result

        return call

    for name in names:
        setattr(backend, name, timed(name))
    try:
        yield
    finally:
        for name in names:
            delattr(backend, name)


def _part(method: str, *args: Any) -> str:
    """What a call is listed under."""
    if method == "quantize_input":
        front: Front = args[2] if len(args) > 2 else None
        return f"quantize input ({type(front).__name__ if front else 'plain'})"
    if method == "linear":
        return f"product {args[0].levels.shape[0]}x{args[0].levels.shape[1]}x{sum(w.packed.shape[0] for w in args[1])}"
    return method


def _take_over_stdout() -> TextIO:
    """A stream to the real standard output, which everything else that prints no longer reaches."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
