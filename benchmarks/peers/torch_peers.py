"""Peers that run in PyTorch: eager, torch.compile, torchao and SDNQ."""

from __future__ import annotations

import ctypes
import gc
import os

import numpy
import torch
from diffusers import DiTTransformer2DModel
from task import Forward, Prepared, Task


def prepare(peer: str, task: Task) -> Prepared:
    torch.set_num_threads(task.threads)
    match peer:
        case "torch-float32":
            return eager(task.load_model(), task), {"rest": "float32"}
        case "torch-float32-compiled":
            return compiled(task.load_model(), task), {"rest": "float32", "freezing": True}
        case "torch-bfloat16":
            return eager(task.load_model(torch.bfloat16), task), {"rest": "bfloat16"}
        case "torch-bfloat16-compiled":
            return compiled(task.load_model(torch.bfloat16), task), {"rest": "bfloat16", "freezing": True}
        case "torchao-int8":
            return torchao_int8(task)
        case "sdnq-int8":
            return sdnq_int8(task)
    raise ValueError(f"peer: found {peer!r}, which does not run in PyTorch")


def eager(model: DiTTransformer2DModel, task: Task) -> Forward:
    latents, timesteps, class_labels = task.inputs
    latents = latents.to(model.dtype)

    def forward() -> numpy.ndarray:
        with torch.no_grad():
            (output,) = model(latents, timesteps, class_labels, return_dict=False)
        return output.float().numpy()

    return forward


def compiled(model: DiTTransformer2DModel, task: Task, is_quantized: bool = False) -> Forward:
    """The model through torch.compile, weights as constants: packed once, and quantized linears fused."""
    import torch._inductor.config as inductor
    from torch._inductor.async_compile import shutdown_compile_workers

    inductor.freezing = True
    # Only packed weights stay; the compiler cannot do this to the tensor classes of quantized weights.
    inductor.freezing_discard_parameters = not is_quantized
    model.compile(fullgraph=True)
    forward = eager(model, task)
    forward()
    # The workers would stay for further compilations, of which there are none.
    shutdown_compile_workers()
    release_memory()
    return forward


def release_memory() -> None:
    """Give back what loading, quantizing and compiling have freed; the allocator would keep it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def torchao_int8(task: Task) -> Prepared:
    """Int8 per token and output channel; float32 besides, because the compiler fuses the scales of float32 only."""
    import torchao.kernel.intmm
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if task.without_amx:
        # torchao asks the processor, which oneDNN's limit does not change: unsigned activations are for VNNI.
        torchao.kernel.intmm._cpu_is_amx_tile_supported = lambda: False
    model = task.load_model()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    settings = {"weights": "int8", "activations": "int8", "rest": "float32", "freezing": True}
    return compiled(model, task, is_quantized=True), settings


def sdnq_int8(task: Task) -> Prepared:
    """SDNQ with quantized matrix products; compiling the whole model beats its own compiled functions."""
    # Read when sdnq is imported. Its OpenVINO products are slower than torch's, and cannot be compiled into the model.
    os.environ["SDNQ_USE_OPENVINO_MM"] = "0"
    from sdnq import sdnq_post_load_quant

    dtype = torch.float32 if task.float_rest else torch.bfloat16
    model = sdnq_post_load_quant(task.load_model(dtype), weights_dtype="int8", use_quantized_matmul=True)
    settings = {"weights": "int8", "activations": "int8", "rest": str(dtype).removeprefix("torch."), "freezing": True}
    return compiled(model, task, is_quantized=True), settings
