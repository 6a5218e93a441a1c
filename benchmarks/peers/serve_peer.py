"""One peer in a process of its own: prepares a model, then times and runs it on request, line by line of JSON.

The README beside this file states the protocol. The caller interleaves the repeats of several such processes, so
a peer that waits for a request must not use the processor.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from task import Forward, Prepared

#: Peer: the module beside this file that prepares it.
PEERS = {
    "torch-float32": "torch_peers",
    "torch-float32-compiled": "torch_peers",
    "torch-bfloat16": "torch_peers",
    "torch-bfloat16-compiled": "torch_peers",
    "torchao-int8": "torch_peers",
    "sdnq-int8": "torch_peers",
    "openvino-float": "openvino_peers",
    "openvino-int8": "openvino_peers",
    "openvino-int4": "openvino_peers",
}
#: Forwards before a peer is ready: the first ones allocate, and pack weights.
WARM_UP = 2
#: Whose versions the record states.
LIBRARIES = ("torch", "diffusers", "torchao", "sdnq", "openvino", "nncf")


def main() -> None:
    args = parse_arguments()
    replies = take_over_stdout()
    set_environment(args)
    start = time.perf_counter()
    try:
        forward, settings = prepare(args)
        for _ in range(WARM_UP):
            forward()
    except Exception as error:  # whatever a library raises is what the caller's record has to say
        send(replies, {"ready": False, "peer": args.peer, "error": one_line(error)})
        raise
    ready = {
        "ready": True,
        "peer": args.peer,
        "prepare_seconds": time.perf_counter() - start,
        "settings": settings
        | {"threads": args.threads, "isa": args.isa, "omp_wait_policy": os.environ["OMP_WAIT_POLICY"]},
        "versions": {name: version(name) for name in LIBRARIES},
    }
    send(replies, ready)
    serve(forward, replies)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True, help="folder of a DiTTransformer2DModel in float32")
    parser.add_argument("--inputs", type=Path, required=True, help="safetensors: latents, timesteps, class_labels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("default", "float32"), default="default", help="of what stays float")
    parser.add_argument("--isa", choices=("native", "vnni"), default="native", help="vnni: as if without AMX and BF16")
    parser.add_argument("--cache", type=Path, help="folder that keeps converted models and compiled code")
    return parser.parse_args()


def set_environment(args: argparse.Namespace) -> None:
    """What the libraries read when they are loaded."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    # A thread that looks for work takes the core from whoever has some, and a busy machine then looks several times
    # slower than it is. The caller may ask for another policy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.isa == "vnni":
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"  # torch's oneDNN and OpenVINO's
        os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX512"
    if args.cache:
        args.cache.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(args.cache.resolve() / "inductor")


def take_over_stdout() -> TextIO:
    """A stream to the real standard output, which everything else that prints no longer reaches."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def prepare(args: argparse.Namespace) -> Prepared:
    from task import Task, load_inputs

    inputs = load_inputs(args.inputs)
    task = Task(args.model, inputs, args.threads, args.precision == "float32", args.isa == "vnni", args.cache)
    return importlib.import_module(PEERS[args.peer]).prepare(args.peer, task)


def serve(forward: Forward, replies: TextIO) -> None:
    """Answer every line of standard input until it ends."""
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), forward)
        except Exception as error:  # a request that cannot be answered must not end the benchmark
            reply = {"error": one_line(error)}
        send(replies, reply)


def answer(request: dict[str, Any], forward: Forward) -> dict[str, Any]:
    match request["op"]:
        case "time":
            return {"seconds": [seconds_of(forward) for _ in range(request["repeats"])]}
        case "output":
            import numpy

            output = forward()
            numpy.save(request["path"], output)
            return {"path": request["path"], "shape": list(output.shape)}
        case other:
            raise ValueError(f"op: found {other!r}, needed time or output")


def seconds_of(forward: Forward) -> float:
    start = time.perf_counter()
    forward()
    return time.perf_counter() - start


def send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    main()
