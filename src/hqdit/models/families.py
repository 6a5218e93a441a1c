"""Adapters of model families: which layers a block has, what they compute, and which of them read one input.

Each family is a table. Names and shared inputs are those of diffusers' model classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hqdit.layers.matrix_layers import is_matrix_layer
from hqdit.models.adapter import LinearSite, ModelAdapter, register_adapter

#: Layers that read one tensor, so that it can be quantized once: name below the block -> role. A block's stages run in
#: this order. Equal inputs that are computed anew for each reader, such as SiLU(emb), are stages of their own.
Stage = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """Model classes that are built of the same kinds of blocks.

    Attributes:
        name: for people.
        classes: names of diffusers' classes.
        blocks: name of a list of blocks in the model -> the stages of such a block, lists in the order in which they
            run. Lists that a model does not have and layers that a block does not have are passed over.
        has_long_skips: see `ModelAdapter`.
    """

    name: str
    classes: tuple[str, ...]
    blocks: Mapping[str, tuple[Stage, ...]]
    has_long_skips: bool = False


class FamilyAdapter(ModelAdapter):
    """The adapter that a `Family` describes."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.has_long_skips = family.has_long_skips

    def matches(self, model: nn.Module) -> bool:
        return any(parent.__name__ in self.family.classes for parent in type(model).__mro__)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [block for _, block, _ in self._named_blocks(model)]

    def sites(self, model: nn.Module) -> list[LinearSite]:
        found = []
        for index, (at, block, stages) in enumerate(self._named_blocks(model)):
            layers = {name for name, module in block.named_modules() if is_matrix_layer(module)}
            for number, stage in enumerate(stages):
                present = [name for name in stage if name in layers]
                found += [
                    LinearSite(f"{at}.{name}", stage[name], index, number, f"{at}.{present[0]}") for name in present
                ]
        return found

    def _named_blocks(self, model: nn.Module) -> list[tuple[str, nn.Module, tuple[Stage, ...]]]:
        return [
            (f"{name}.{number}", block, stages)
            for name, stages in self.family.blocks.items()
            for number, block in enumerate(getattr(model, name, None) or ())
        ]


_FLUX_JOINT: tuple[Stage, ...] = (
    {"norm1.linear": "modulation"},
    {"norm1_context.linear": "modulation"},
    {"attn.to_q": "q", "attn.to_k": "k", "attn.to_v": "v"},
    {"attn.add_q_proj": "q", "attn.add_k_proj": "k", "attn.add_v_proj": "v"},
    {"attn.to_out.0": "attention-out"},
    {"attn.to_add_out": "attention-out"},
    {"ff.net.0.proj": "fc1"},
    {"ff.net.2": "fc2"},
    {"ff_context.net.0.proj": "fc1"},
    {"ff_context.net.2": "fc2"},
)

FAMILIES = (
    Family(
        "Flux",
        ("FluxTransformer2DModel",),
        {
            "transformer_blocks": _FLUX_JOINT,
            "single_transformer_blocks": (
                {"norm.linear": "modulation"},
                {"attn.to_q": "q", "attn.to_k": "k", "attn.to_v": "v", "proj_mlp": "fc1"},
                {"proj_out": "fused-out"},
            ),
        },
    ),
)

for _family in FAMILIES:
    register_adapter(FamilyAdapter(_family))
