"""What a family of model classes is, the adapter that it describes, and the stages that many blocks have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast

from torch import nn

from hqdit.layers.matrix_layers import is_matrix_layer
from hqdit.models.adapter import LinearSite, ModelAdapter

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
        alternates: whether a block of the first list is followed by one of the second and so on, instead of the lists
            one after the other.
    """

    name: str
    classes: tuple[str, ...]
    blocks: Mapping[str, tuple[Stage, ...]]
    has_long_skips: bool = False
    alternates: bool = False


class FamilyAdapter(ModelAdapter):
    """The adapter that a `Family` describes."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.name = family.name
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
        lists = [
            [(f"{name}.{number}", block, stages) for number, block in enumerate(_list_of_blocks(model, name))]
            for name, stages in self.family.blocks.items()
        ]
        if not self.family.alternates:
            return [entry for entries in lists for entry in entries]
        return [entry for entries in zip_longest(*lists) for entry in entries if entry is not None]


def _list_of_blocks(model: nn.Module, name: str) -> nn.ModuleList | tuple[()]:
    """The list of that dotted name, or () where the model has none, or None in its place."""
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part, None)
    return () if found is None else cast(nn.ModuleList, found)


def qkv(at: str) -> Stage:
    """The projections of self-attention."""
    return {f"{at}.to_q": "q", f"{at}.to_k": "k", f"{at}.to_v": "v"}


def context_qkv(at: str) -> Stage:
    """The projections of the context in joint attention."""
    return {f"{at}.add_q_proj": "q", f"{at}.add_k_proj": "k", f"{at}.add_v_proj": "v"}


def cross_attention(at: str) -> tuple[Stage, ...]:
    """Attention to a context, and to an image besides where the block has projections for one."""
    return (
        {f"{at}.to_q": "q"},
        {f"{at}.to_k": "k", f"{at}.to_v": "v"},
        {f"{at}.add_k_proj": "k", f"{at}.add_v_proj": "v"},
        {f"{at}.to_out.0": "attention-out"},
    )


def self_attention(at: str) -> tuple[Stage, ...]:
    """Attention within one sequence."""
    return qkv(at), {f"{at}.to_out.0": "attention-out"}


def mlp(at: str) -> tuple[Stage, ...]:
    """Two layers with an activation between them, as diffusers' FeedForward names them."""
    return {f"{at}.net.0.proj": "fc1"}, {f"{at}.net.2": "fc2"}


def fused_mlp(at: str) -> tuple[Stage, ...]:
    """As `mlp`, with a gate that comes from the same layer as what it multiplies."""
    return {f"{at}.net.0.proj": "fused-in"}, {f"{at}.net.2": "fc2"}
