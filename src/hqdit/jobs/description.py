"""What the result of a job depends on, as plain JSON values: a change of any of them is another job."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import hqdit
from hqdit.models.source import CONFIG_NAME, ModelFolder
from hqdit.models.weights import weight_files
from hqdit.pipeline.environment import code_digest, cpu_name, library_versions
from hqdit.pipeline.manifest import files_of, sha256_of


def surroundings() -> dict[str, Any]:
    """Code, libraries and machine."""
    return {"hqdit": hqdit.__version__, "code": code_digest(), **library_versions(), "processor": cpu_name()}


def model_digest(folder: ModelFolder) -> str:
    """SHA-256 over all that a job reads of a model: every file of a pipeline, weights and config of a transformer.

    Raises:
        CheckpointError: no weights.
    """
    if folder.is_pipeline:
        found = {name: facts.sha256 for name, facts in files_of(folder.root).items()}
    else:
        paths = [folder.transformer / CONFIG_NAME, *weight_files(folder.transformer)]
        found = {path.name: sha256_of(path) for path in paths}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode("utf-8")).hexdigest()
