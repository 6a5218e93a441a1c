"""Quantized models under `torch.compile`, on devices that hold them in part, and beside a single file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from small_models import DIT, FLUX, SD3, SMALL_MODELS, SmallModel
from tiny import latent_dit, tiny_vae

from hqdit.integrations.diffusers_config import HQDiTConfig
from hqdit.kernels.selection import default_backend, use_backend
from hqdit.pipeline.checkpoint import quantized_layers

each_model = pytest.mark.parametrize("small", SMALL_MODELS, ids=lambda small: small.name)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def loaded(small: SmallModel, **kwargs: Any) -> Any:
        folder = small.save(tmp_path / "float")
        return small.model_class.from_pretrained(folder, quantization_config=HQDiTConfig(), **kwargs)

    return loaded


#: torch says so of every cached table of the composed backends, which it computes again in the graph.
cached_tables = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@cached_tables
@pytest.mark.parametrize(
    ("small", "backend"),
    [*((small, default_backend()) for small in SMALL_MODELS), (DIT, "torch"), (FLUX, "torch")],
    ids=lambda value: getattr(value, "name", value),
)
def test_it_compiles_as_one_graph(small: SmallModel, backend: str, load: Callable[..., Any]) -> None:
    torch.compiler.reset()
    model = load(small)
    assert model.hf_quantizer.is_compileable
    with use_backend(backend):
        expected = small.output(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(small.output(compiled), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(small.output(compiled), expected)


@cached_tables
@each_model
def test_its_blocks_compile(small: SmallModel, load: Callable[..., Any]) -> None:
    torch.compiler.reset()
    model = load(small)
    if not getattr(model, "_repeated_blocks", None):
        pytest.skip(f"{small.name} does not say which blocks are repeated")
    expected = small.output(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(small.output(model), expected)


@pytest.mark.filterwarnings("ignore")  # of torch, about what it does itself when it traces
def test_it_compiles_in_training(load: Callable[..., Any]) -> None:
    torch.compiler.reset()
    model = load(FLUX).requires_grad_(False)
    inputs = FLUX.inputs()
    plain, traced = (inputs["hidden_states"].clone().requires_grad_() for _ in range(2))
    model(**{**inputs, "hidden_states": plain}, return_dict=False)[0].sum().backward()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**{**inputs, "hidden_states": traced}, return_dict=False)[0].sum().backward()
    assert torch.allclose(plain.grad, traced.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("small", [SD3, FLUX], ids=lambda small: small.name)
def test_automatic_device_maps(small: SmallModel, load: Callable[..., Any]) -> None:
    expected = small.output(load(small))
    model = load(small, device_map="auto")
    assert model.hf_device_map and not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(small.output(model).cpu(), expected) or torch.cuda.is_available()


def test_sizes_of_a_device_map_are_those_of_the_quantized_model(load: Callable[..., Any], tmp_path: Path) -> None:
    """accelerate plans with half a byte per weight and the dtypes of everything else."""
    from accelerate.utils import CustomDtype, compute_module_sizes

    model = load(SD3)
    model.save_pretrained(tmp_path / "quantized")
    planned = []

    class Watching(type(model.hf_quantizer)):  # type: ignore[misc]
        def get_special_dtypes_update(self, model: Any, torch_dtype: Any) -> Any:
            found = super().get_special_dtypes_update(model, torch_dtype)
            planned.append(compute_module_sizes(model, dtype=CustomDtype.INT4, special_dtypes=found)[""])
            return found

    from diffusers.quantizers import auto

    plain = auto.AUTO_QUANTIZER_MAPPING["hqdit"]
    try:
        auto.AUTO_QUANTIZER_MAPPING["hqdit"] = Watching
        load(SD3, device_map="auto")
        SD3.model_class.from_pretrained(tmp_path / "quantized", device_map="auto")
    finally:
        auto.AUTO_QUANTIZER_MAPPING["hqdit"] = plain
    actual = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for size in planned:
        assert 0.8 * actual < size < 1.25 * actual
    assert len(planned) == 2


def test_a_single_file_is_quantized_while_it_loads(tmp_path: Path) -> None:
    folder = SD3.save(tmp_path / "float")
    model = SD3.model_class.from_single_file(
        str(folder / "diffusion_pytorch_model.safetensors"), config=str(folder), quantization_config=HQDiTConfig()
    )
    expected = SD3.model_class.from_pretrained(folder, quantization_config=HQDiTConfig())
    assert len(quantized_layers(model)) == SD3.layers
    assert torch.equal(SD3.output(model), SD3.output(expected))


# On a real device


@pytest.mark.gpu
@each_model
def test_it_runs_on_the_device_it_was_loaded_to(small: SmallModel, load: Callable[..., Any]) -> None:
    model = load(small, device_map="cuda")
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
    inputs = {name: tensor.cuda() for name, tensor in small.inputs().items()}
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0].cpu()
    expected = small.output(load(small))
    assert float((output - expected).norm() / expected.norm()) < 0.05


@pytest.mark.gpu
def test_a_device_map_over_device_and_memory(load: Callable[..., Any]) -> None:
    places = {name: "cuda" for name, _ in FLUX.build().named_children()} | {"single_transformer_blocks": "cpu"}
    model = load(FLUX, device_map=places)
    inputs = {name: tensor.cuda() for name, tensor in FLUX.inputs().items()}
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0].cpu()
    expected = FLUX.output(load(FLUX))
    assert float((output - expected).norm() / expected.norm()) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("small", [SD3, FLUX], ids=lambda small: small.name)
def test_group_offload(small: SmallModel, kind: str, load: Callable[..., Any]) -> None:
    model = load(small)
    expected = small.output(model)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cuda"), torch.device("cpu"), offload_type=kind, **options)
    inputs = {name: tensor.cuda() for name, tensor in small.inputs().items()}
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0].cpu()
    assert float((output - expected).norm() / expected.norm()) < 0.05
    assert all(layer.qweight.device.type == "cpu" for layer in quantized_layers(model).values())


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload(how: str, tmp_path: Path) -> None:
    pipeline = DiTPipeline(latent_dit(num_embeds_ada_norm=1000), tiny_vae(), DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path)
    model = DIT.model_class.from_pretrained(tmp_path / "transformer", quantization_config=HQDiTConfig())
    pipeline = DiTPipeline.from_pretrained(tmp_path, transformer=model)
    getattr(pipeline, how)()
    images = pipeline(class_labels=[1], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
