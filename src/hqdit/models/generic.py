"""An adapter for models that nobody has described: every linear layer inside repeated blocks, each on its own."""

from __future__ import annotations

from torch import nn

from hqdit.layers.matrix_layers import is_matrix_layer
from hqdit.models.adapter import LinearSite, ModelAdapter


class GenericAdapter(ModelAdapter):
    """Finds the lists of blocks by itself. No two layers are taken to read the same input.

    Parts of a block whose name says that they embed the time step or a condition are left alone.
    """

    name = "generic"
    has_long_skips = None

    def matches(self, model: nn.Module) -> bool:
        return bool(self.sites(model))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [block for _, block in _named_blocks(model)]

    def sites(self, model: nn.Module) -> list[LinearSite]:
        found = []
        for index, (at, block) in enumerate(_named_blocks(model)):
            layers = [name for name, module in block.named_modules() if _is_called(module) and not _embeds(name)]
            names = [f"{at}.{name}" for name in layers]
            found += [LinearSite(name, "other", index, stage, name) for stage, name in enumerate(names)]
        return found


def _is_called(module: nn.Module) -> bool:
    """Whether it is a matrix layer; those of `nn.MultiheadAttention` are read by it and never called."""
    return is_matrix_layer(module) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _embeds(name: str) -> bool:
    return any("emb" in part for part in name.split("."))


def _named_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Members of the outermost lists of modules that hold linear layers and are none themselves."""
    found: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in inside):
            continue
        members = list(module.named_children())
        if all(type(block) is type(module[0]) for _, block in members) and any(
            is_matrix_layer(layer) for _, block in members for layer in block.modules() if layer is not block
        ):
            inside.append(name)
            found += [(f"{name}.{number}", block) for number, block in members]
    return found
