"""Results of earlier runs, found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqdit.kernels.selection import current_backend
from hqdit.models.weights import read_safetensors, write_safetensors
from hqdit.pipeline.environment import code_digest, library_versions
from hqdit.pipeline.publish import publish_text


class ResultCache:
    """A folder of results, each under the SHA-256 of its configuration.

    A result is published with a rename, so that an interrupted run leaves whole results only, and the next run takes
    them up.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.hits = 0
        self.misses = 0

    def _path(self, key: Mapping[str, Any], suffix: str) -> Path:
        surroundings = {
            "code": code_digest(),
            **library_versions(),
            "backend": current_backend().description,
            "threads": torch.get_num_threads(),
        }
        text = json.dumps({**surroundings, **key}, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}{suffix}"

    def numbers(self, key: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `compute`, plain JSON values, from an earlier run with the same key if there is one.

        Args:
            key: plain JSON values that name everything the result depends on, besides code and torch.
            compute: called if there is none.
        """
        path = self._path(key, ".json")
        if path.is_file():
            self.hits += 1
        else:
            self.misses += 1
            path.parent.mkdir(parents=True, exist_ok=True)
            publish_text(path, json.dumps({"key": dict(key), "result": compute()}))
        # Read back in either case, so that a first run and a repeated one see the same values.
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["result"]
        return result

    def tensors(self, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """As `numbers`, for tensors."""
        path = self._path(key, ".safetensors")
        if path.is_file():
            self.hits += 1
        else:
            self.misses += 1
            path.parent.mkdir(parents=True, exist_ok=True)
            # Two processes may compute the same result; each renames a file of its own.
            partial = path.with_suffix(f".{os.getpid()}.partial")
            write_safetensors({name: tensor.contiguous() for name, tensor in compute().items()}, partial)
            partial.replace(path)
        return read_safetensors(path)
