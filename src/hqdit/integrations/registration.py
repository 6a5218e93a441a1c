"""Make diffusers know hqdit, whichever of the two is imported first."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Set it to 0 before `import hqdit`, and diffusers stays as it is.
SWITCH = "HQDIT_REGISTER_DIFFUSERS"
#: The module that holds diffusers' two tables of quantization methods. diffusers has no call that adds to them.
TABLES = "diffusers.quantizers.auto"
METHOD = "hqdit"


def register() -> None:
    """Add hqdit to diffusers' tables: now if they have been imported, else when they are. Imports nothing else."""
    if os.environ.get(SWITCH) == "0":
        return
    loaded = sys.modules.get(TABLES)
    if loaded is not None:
        add_to_tables(loaded)
    elif not any(isinstance(finder, _TablesFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TablesFinder())


def add_to_tables(tables: Any) -> None:
    """Write hqdit's classes into `tables`, unless a newer diffusers has classes for the method itself."""
    found = []
    for module, name in (("diffusers_config", "HQDiTConfig"), ("diffusers_quantizer", "HQDiTQuantizer")):
        found.append(getattr(importlib.import_module(f"hqdit.integrations.{module}"), name, None))
        if found[-1] is None:
            return  # this module is the one that imported diffusers, and registers when it is complete
    config, quantizer = found
    if METHOD not in tables.AUTO_QUANTIZATION_CONFIG_MAPPING and METHOD not in tables.AUTO_QUANTIZER_MAPPING:
        tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config
        tables.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer


class _TablesFinder(MetaPathFinder):
    """Finds the module of the tables as Python does, and has its loader add hqdit afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _AddingLoader(spec.loader)
                return spec
        return None


class _AddingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is as if this class had never been there, for tools that ask for its source.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        add_to_tables(module)
