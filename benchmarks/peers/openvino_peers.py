"""Peers that run in OpenVINO: the float model, NNCF's static int8, int4 weights with dynamic quantization."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy
import torch
from task import Prepared, Task

# Without this module OpenVINO and NNCF send no usage statistics.
sys.modules["openvino_telemetry"] = None

import nncf  # noqa: E402
import openvino  # noqa: E402

CALIBRATION_SAMPLES, CALIBRATION_SEED = 8, 1
GROUP_SIZE = 128
REPORTED = (
    "INFERENCE_PRECISION_HINT",
    "INFERENCE_NUM_THREADS",
    "NUM_STREAMS",
    "ENABLE_CPU_PINNING",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
)


def prepare(peer: str, task: Task) -> Prepared:
    options: dict[str, str | int | bool] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": task.threads,
        # A pinned thread waits for its core even if another one is free.
        "ENABLE_CPU_PINNING": False,
    }
    if task.float_rest or task.without_amx:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if peer == "openvino-int4":
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP_SIZE
    with tempfile.TemporaryDirectory() as temporary:
        path = converted(peer, task, task.cache or Path(temporary))
        model = openvino.Core().compile_model(path, "CPU", options)
    request = model.create_infer_request()
    inputs = [tensor.numpy() for tensor in task.inputs]

    def forward() -> numpy.ndarray:
        return request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    return forward, {name.lower(): str(model.get_property(name)) for name in REPORTED}


def converted(peer: str, task: Task, folder: Path) -> Path:
    """The peer's model in OpenVINO's format, from `folder` if an earlier process left it there.

    Another process converts it, so that no memory of torch and NNCF stays in this one.
    """
    target = folder / f"{peer}-{fingerprint(task)}"
    if not target.exists():
        staged = Path(tempfile.mkdtemp(dir=folder))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(convert, peer, task, staged / "model.xml").result()
        staged.rename(target)
    return target / "model.xml"


def fingerprint(task: Task) -> str:
    """Tells models, shapes and versions apart, so that no stale conversion is ever taken for this model's."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(task.model.iterdir())]
    facts = [
        str(task.model.resolve()),
        files,
        [list(tensor.shape) for tensor in task.inputs],
        [version(name) for name in ("openvino", "nncf", "torch", "diffusers")],
        [CALIBRATION_SAMPLES, CALIBRATION_SEED, GROUP_SIZE],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def convert(peer: str, task: Task, path: Path) -> None:
    """Write the model that `peer` runs to `path`."""
    torch.set_num_threads(task.threads)
    shapes = [tuple(tensor.shape) for tensor in task.inputs]
    model = openvino.convert_model(OutputOnly(task.load_model()), example_input=task.inputs, input=shapes)
    if peer == "openvino-int8":
        model = nncf.quantize(
            model,
            calibration_data(task),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=CALIBRATION_SAMPLES,
            # Smoothed by so few conditioning vectors, adaLN's inputs clip for others: 19 dB instead of 35 (4 blocks),
            # at the same speed.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
            ),
        )
    elif peer == "openvino-int4":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP_SIZE, ratio=1.0)
    openvino.save_model(model, path, compress_to_fp16=False)


class OutputOnly(torch.nn.Module):
    """The model with a tensor for its output, as the conversion needs it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return self.model(latents, timesteps, class_labels, return_dict=False)[0]


def calibration_data(task: Task) -> nncf.Dataset:
    """Noise of the inputs' shape at random time steps and classes."""
    latents, timesteps, class_labels = task.inputs
    steps, classes = 1000, int(json.loads((task.model / "config.json").read_text())["num_embeds_ada_norm"])
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    samples = [
        [
            torch.randn(latents.shape, generator=generator).numpy(),
            torch.randint(steps, timesteps.shape, generator=generator).numpy(),
            torch.randint(classes, class_labels.shape, generator=generator).numpy(),
        ]
        for _ in range(CALIBRATION_SAMPLES)
    ]
    return nncf.Dataset(samples)
