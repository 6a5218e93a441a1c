"""Forward passes on a GPU: which models, of which sizes, and everybody who runs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hqdit.benchmark.gpu_products import FLOAT8_CAPABILITY, float32_precision
from hqdit.benchmark.workload import CONFIGS, model_inputs, write_float_model, write_quantized_model
from hqdit.errors import EnvironmentUnavailable
from hqdit.kernels.selection import use_backend
from hqdit.models.source import ModelFolder, build_skeleton
from hqdit.pipeline.checkpoint import load, save

Forward = Callable[[], Tensor]

#: Blocks as wide as those of FLUX.1 (3072 and 12288), a few of each kind, in diffusers' names.
FLUX_STACK: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
#: Tokens of its text, and side of its grid of image tokens: 4608 tokens together.
FLUX_TEXT_TOKENS, FLUX_SIDE = 512, 64


@dataclass(frozen=True)
class Workload:
    """One forward pass.

    Attributes:
        model: "dit" or "flux".
        batch: samples.
        sample_size: side of the latent image, for dit.
    """

    name: str
    model: str
    batch: int
    sample_size: int = 0

    @property
    def folder(self) -> str:
        """Where the models of this size lie."""
        return f"{self.model}-{self.sample_size}"


WORKLOADS = (
    *(
        Workload(f"DiT-XL/2, {8 * side} x {8 * side}, batch {batch}", "dit", batch, side)
        for side in (32, 64)
        for batch in (2, 16, 64)
    ),
    Workload("FLUX-sized blocks, 4608 tokens, batch 1", "flux", 1),
)


def write_models(workload: Workload, work: Path, blocks: int) -> tuple[Path, Path]:
    """The folders of the float model and of its quantized twin; written if they are not there."""
    folders = work / workload.folder / "float", work / workload.folder / "quantized"
    if not folders[0].exists():
        folders[0].parent.mkdir()
        if workload.model == "dit":
            write_float_model(folders[0], blocks, workload.sample_size)
        else:
            torch.manual_seed(0)
            model = build_skeleton(ModelFolder(folders[0], folders[0], FLUX_STACK))
            save(model, folders[0])
        write_quantized_model(*folders, CONFIGS["full"])
    return folders


def inputs_of(workload: Workload, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of the model, the same numbers in every dtype."""
    if workload.model == "dit":
        given = model_inputs(workload.batch, workload.sample_size)
        named = {
            "hidden_states": given["latents"],
            "timestep": given["timesteps"],
            "class_labels": given["class_labels"],
        }
    else:
        random = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        rows, columns = torch.meshgrid(torch.arange(FLUX_SIDE), torch.arange(FLUX_SIDE), indexing="ij")
        text = FLUX_STACK["joint_attention_dim"]
        named = {
            "hidden_states": random(workload.batch, FLUX_SIDE**2, FLUX_STACK["in_channels"]),
            "encoder_hidden_states": random(workload.batch, FLUX_TEXT_TOKENS, text),
            "pooled_projections": random(workload.batch, FLUX_STACK["pooled_projection_dim"]),
            "timestep": torch.full((workload.batch,), 0.5),
            "img_ids": torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).to(torch.float32),
            "txt_ids": torch.zeros(FLUX_TEXT_TOKENS, 3),
        }
    return {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in named.items()
    }


@dataclass(frozen=True)
class Contender:
    """Who runs the forward pass.

    Attributes:
        is_ours: whether it runs the quantized model.
        dtype: of inputs and of what is not quantized.
        setting: what holds while it is prepared and while it runs.
        changes: what is done to the model first.
        is_compiled: by torch.compile.
        is_captured: as a CUDA graph.
    """

    is_ours: bool
    dtype: torch.dtype
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext
    changes: Callable[[nn.Module], None] | None = None
    is_compiled: bool = False
    is_captured: bool = False

    def prepare(self, workload: Workload, folders: tuple[Path, Path], device: torch.device) -> tuple[Forward, int]:
        """A forward pass that is ready to be timed, and the bytes of its model on the device."""
        model: Any = load(folders[self.is_ours], self.dtype, device)
        with self.setting(), torch.inference_mode():
            if self.changes is not None:
                self.changes(model)
            held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            bytes_held = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
            given = inputs_of(workload, device, self.dtype)
            called = torch.compile(model, fullgraph=True) if self.is_compiled else model
            forward: Forward = lambda: cast(Tensor, called(**given).sample)  # noqa: E731
            for _ in range(3):  # compiles, and fills the caches that a capture must not fill
                forward()
            if self.is_captured:
                forward = captured(forward)

        def run() -> Tensor:
            with self.setting(), torch.inference_mode():
                return forward()

        return run, bytes_held


def captured(forward: Forward) -> Forward:
    """`forward` as a CUDA graph, which starts all of its kernels at once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()

    def run() -> Tensor:
        graph.replay()
        return output

    return run


def torchao_float8(model: nn.Module) -> None:
    """Every linear layer in FP8, inputs rounded on the fly, with a scale for each row.

    Raises:
        EnvironmentUnavailable: torchao is not installed, or the device has no FP8.
    """
    if find_spec("torchao") is None:
        raise EnvironmentUnavailable("torchao FP8: found no torchao, needed it. Fix: pip install torchao")
    if torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        raise EnvironmentUnavailable(
            f"torchao FP8: found compute capability {torch.cuda.get_device_capability()}, needed at least "
            f"{FLOAT8_CAPABILITY}. Fix: measure it on a GPU that has FP8"
        )
    torchao: Any = importlib.import_module("torchao.quantization")
    config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    torchao.quantize_(model, config)


EAGER, COMPILED = "torch float32", "torch bfloat16, compiled"


def contenders(backend: str) -> dict[str, Contender]:
    """Everybody by name; `backend` is ours, and "hqdit" begins the names of those that run it."""
    ours = partial(Contender, True, torch.bfloat16, partial(use_backend, backend))
    bfloat16 = partial(Contender, False, torch.bfloat16)
    return {
        EAGER: Contender(False, torch.float32, partial(float32_precision, "highest")),
        "torch float32, TF32": Contender(False, torch.float32, partial(float32_precision, "high")),
        "torch bfloat16": bfloat16(),
        COMPILED: bfloat16(is_compiled=True),
        "torch bfloat16, compiled, CUDA graph": bfloat16(is_compiled=True, is_captured=True),
        "torchao FP8 dynamic, compiled": bfloat16(changes=torchao_float8, is_compiled=True),
        "library route: torch._int_mm, compiled": Contender(
            True, torch.bfloat16, partial(use_backend, "torch"), is_compiled=True
        ),
        "hqdit": ours(),
        "hqdit, compiled": ours(is_compiled=True),
        "hqdit, CUDA graph": ours(is_captured=True),
        "hqdit, compiled, CUDA graph": ours(is_compiled=True, is_captured=True),
    }
