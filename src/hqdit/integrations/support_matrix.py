"""What would be quantized of every transformer class of the installed diffusers, planned without memory or weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models import transformers
from torch import nn

from hqdit.errors import HQDiTError
from hqdit.layers.matrix_layers import is_matrix_layer, matrix_shape
from hqdit.models.adapter import ModelAdapter, adapter_for
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import PlannedLayer, QuantizationPlan, plan_quantization
from hqdit.transforms.hadamard import hadamard_factors, usable_blocks

#: Arguments for classes that cannot be built from their defaults: plausible sizes, not those of a certain checkpoint.
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 16,
        "num_single_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 20,
        "caption_channels": [4096, 4096],
        "text_emb_dim": 2048,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (64, 32, 32),
        "max_resolution": (128, 128),
        "llama_layers": list(range(48)),
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "num_layers": 28,
        "attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "num_embeds_ada_norm": 1000,
        "caption_channels": 4096,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
}


@dataclass(frozen=True)
class SupportRow:
    """What is planned for one class.

    Attributes:
        name: of the class.
        problem: why there is no plan, or "".
        adapter: `ModelAdapter.name`.
        layers: how many layers are planned.
        weights: numbers in their weights.
        linear_weights: numbers in the weights of all matrix layers.
        parameters: of the model.
        inputs: how many inputs the planned layers read.
        shared_inputs: how many of these are read by several layers and rotated once for all.
        rotations: width -> (rotation, planned layers of that width).
        refused: width without a Hadamard matrix -> (block sizes that have one, layers left out for it).
        kept: reason -> matrix layers that are left alone.
    """

    name: str
    problem: str = ""
    adapter: str = ""
    layers: int = 0
    weights: int = 0
    linear_weights: int = 0
    parameters: int = 0
    inputs: int = 0
    shared_inputs: int = 0
    rotations: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    refused: Mapping[int, tuple[list[int], int]] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)


def transformer_classes() -> dict[str, type[nn.Module]]:
    """Name -> class for every transformer that diffusers exports, sorted by name."""
    found = {name: getattr(transformers, name) for name in sorted(dir(transformers))}
    return {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, nn.Module)}


def support_rows() -> Iterator[SupportRow]:
    """A row for every class, with the default request and sizes that are the class's own."""
    for name, model_class in transformer_classes().items():
        yield support_row(name, model_class)


def support_row(name: str, model_class: type[nn.Module]) -> SupportRow:
    """What is planned for one class; whatever is in the way of a plan is stated in the row."""
    try:
        with torch.device("meta"):
            model = model_class(**ARGUMENTS.get(name, {}))
    except Exception as error:  # whatever comes out of a constructor without the arguments that it needs
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return SupportRow(name, f"cannot be built from its defaults: {reason}")
    try:
        adapter = adapter_for(model)
        refused = _refused_widths(model, adapter)
        plan = plan_quantization(model, QuantizationConfig(gptq=False, exclude=tuple(sum(refused.values(), []))))
    except HQDiTError as error:
        return SupportRow(name, str(error).splitlines()[0])
    return _row(name, model, adapter, plan, refused)


def _refused_widths(model: nn.Module, adapter: ModelAdapter) -> dict[int, list[str]]:
    """Width without a Hadamard matrix -> the sites that read it."""
    refused: dict[int, list[str]] = {}
    for site in adapter.sites(model):
        width, _ = matrix_shape(model.get_submodule(site.name))
        if hadamard_factors(width) is None:
            refused.setdefault(width, []).append(site.name)
    return refused


def _row(
    name: str, model: nn.Module, adapter: ModelAdapter, plan: QuantizationPlan, refused: dict[int, list[str]]
) -> SupportRow:
    sizes = {n: _weights(module) for n, module in model.named_modules() if is_matrix_layer(module)}
    readers = Counter(layer.site.input_group for layer in plan.layers)
    without_matrix = {layer for names in refused.values() for layer in names}
    return SupportRow(
        name,
        adapter=adapter.name,
        layers=len(plan.layers),
        weights=sum(sizes[layer.site.name] for layer in plan.layers),
        linear_weights=sum(sizes.values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        inputs=len(readers),
        shared_inputs=sum(count > 1 for count in readers.values()),
        rotations=_rotations(plan.layers),
        refused={width: (usable_blocks(width), len(names)) for width, names in sorted(refused.items())},
        kept=dict(sorted(Counter(r for n, r in plan.skipped.items() if n not in without_matrix).items())),
    )


def _rotations(layers: tuple[PlannedLayer, ...]) -> dict[int, tuple[str, int]]:
    counts = Counter(layer.in_features for layer in layers)
    described = {layer.in_features: layer.rotation.describe() for layer in layers}
    return {width: (described[width], counts[width]) for width in sorted(counts)}


def _weights(module: nn.Module) -> int:
    in_features, out_features = matrix_shape(module)
    return in_features * out_features


_HEAD = (
    "What the default request (full rotation, every layer of the repeated blocks) plans for each transformer class of "
    "diffusers {version}, in the sizes of the class's default arguments. `make support-matrix` writes this page with "
    "the installed diffusers: every class is built on torch's meta device, without memory for its weights, and planned "
    "by `pipeline.plan.plan_quantization`. Nothing on this page says how well a quantized model does; of a class with "
    "an adapter of its own, `tests/models/test_families.py` quantizes, saves and reloads a tiny random model.",
    "An adapter of a family knows what the layers do and which of them read one input, so that it is rotated and "
    "quantized once. The adapter named generic takes every linear layer of the repeated blocks and rotates the input "
    "of each by itself. Coverage is the share of the quantized weights among the weights of all linear layers and 1x1 "
    "convolutions, and among all parameters.",
)
_ROTATIONS_HEAD = (
    "A rotation is written as its Hadamard matrix, the factor of Sylvester before the one of Paley. A width without a "
    "matrix is refused by the default request; its layers are left out here."
)


def support_page(rows: list[SupportRow]) -> str:
    """The rows as a page in Markdown."""
    planned = [row for row in rows if not row.problem]
    lines = ["# Supported models", ""]
    lines += [line for text in _HEAD for line in (text.format(version=diffusers.__version__), "")]
    lines += ["## Coverage", ""]
    lines += [
        "| Class | Adapter | Layers | Inputs (shared) | Quantized weights | of linear layers | of all parameters |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [_coverage(row) for row in planned]
    lines += ["", totals(rows), "", "## Rotations and layers left alone", ""]
    lines += [
        _ROTATIONS_HEAD,
        "",
        "| Class | Width: rotation (layers) | Left alone |",
        "|---|---|---|",
    ]
    lines += [f"| {row.name} | {_widths(row)} | {_left_alone(row)} |" for row in planned]
    lines += [
        "",
        "## Arguments",
        "",
        "Classes without complete defaults are built with these: plausible sizes, not those of a certain checkpoint.",
        "",
    ]
    lines += [
        f"- {name}: " + ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        for name, arguments in ARGUMENTS.items()
    ]
    lines += ["", "## Classes without a plan", ""]
    lines += [f"- {row.name}: {row.problem.replace('`', '')}" for row in rows if row.problem]
    return "\n".join(lines) + "\n"


def totals(rows: list[SupportRow]) -> str:
    """One line: classes, layers and weights that are covered."""
    planned = [row for row in rows if not row.problem]
    described = [row for row in planned if row.adapter != "generic"]
    weights, linear, parameters = (
        sum(getattr(row, key) for row in planned) for key in ("weights", "linear_weights", "parameters")
    )
    return (
        f"Totals: {len(planned)} of {len(rows)} classes planned, {len(described)} of them by an adapter of their "
        f"own; {sum(row.layers for row in planned)} layers with {weights / 1e9:.1f} billion weights, "
        f"{_percent(weights, linear)} of the weights of linear layers and {_percent(weights, parameters)} of all "
        f"parameters; {sum(row.shared_inputs for row in planned)} inputs rotated once for several layers."
    )


def _coverage(row: SupportRow) -> str:
    shares = [_percent(row.weights, whole) for whole in (row.linear_weights, row.parameters)]
    inputs = f"{row.inputs} ({row.shared_inputs})"
    return f"| {' | '.join((row.name, row.adapter, str(row.layers), inputs, _millions(row.weights), *shares))} |"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _widths(row: SupportRow) -> str:
    used = [f"{width}: {rotation} ({layers})" for width, (rotation, layers) in row.rotations.items()]
    used += [
        f"{width}: **no matrix** ({layers}); "
        + (f"--rotation block:B works with B in {blocks}" if blocks else "no block size works, leave these layers out")
        for width, (blocks, layers) in row.refused.items()
    ]
    return "; ".join(used)


def _left_alone(row: SupportRow) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in row.kept.items()) or "nothing"
