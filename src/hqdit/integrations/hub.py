"""A quantized model on the Hugging Face Hub: the files, and the card that says how to load them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from huggingface_hub import HfApi
from torch import nn

import hqdit
from hqdit.errors import UsageError
from hqdit.integrations.attachment import attach
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.record import QuantizationRecord

CARD_NAME = "README.md"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "10GB",
) -> str:
    """Upload what `save_pretrained` writes together with `model_card`, which diffusers' own upload does not know.

    Args:
        model: as `hqdit.quantize`, `hqdit.load` or diffusers' `from_pretrained` gives it.
        repo_id: owner/name; it is created if it does not exist.
        private: of a new repository; None is the owner's default.
        token: of the hub; None is the one that was stored at login.
        commit_message: None for a fixed one.
        create_pr: open a pull request instead of writing to the main branch.
        max_shard_size: of the weight files, as of `save_pretrained`.

    Returns:
        Where the commit or the pull request is.

    Raises:
        UsageError: a float model, or one with adapters.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_hub_folder(model, folder, repo_id, max_shard_size)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        uploaded = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(model).__name__} quantized by hqdit",
            create_pr=create_pr,
        )
    return uploaded.pr_url or uploaded.commit_url


def write_hub_folder(model: nn.Module, folder: str | Path, repo_id: str, max_shard_size: int | str = "10GB") -> None:
    """The folder that `push_to_hub` uploads: config.json, weights in one file or in shards, and the card.

    Raises:
        UsageError: as for `push_to_hub`.
    """
    card = model_card(model, repo_id)
    attach(model)
    cast(Any, model).save_pretrained(folder, max_shard_size=max_shard_size)
    (Path(folder) / CARD_NAME).write_text(card, encoding="utf-8")


def model_card(model: nn.Module, repo_id: str) -> str:
    """The card of a quantized model in Markdown; the same model and name give the same text.

    Raises:
        UsageError: a float model.
    """
    record: QuantizationRecord | None = getattr(model, "quantization_record", None)
    if record is None:
        raise UsageError(
            "model card: found a float model, needed one that hqdit has quantized. Fix: use the model's own push_to_hub"
        )
    layers = quantized_layers(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(layer.storage_bytes for layer in layers)
    name = type(model).__name__
    rows = {
        "quantized layers": f"{len(layers)}",
        "quantized parameters": f"{100 * weights / record.parameters:.1f} % of {record.parameters:,}",
        "weight formats": _counted(str(fmt) for layer in layers for fmt in layer.spec.weight.formats),
        "activation formats": _counted(str(layer.spec.activation.format) for layer in layers),
        "bits per weight": f"{8 * stored / weights:.3f}, scales and signs included",
        "memory": f"{cast(Any, model).get_memory_footprint():,} bytes of tensors",
        "calibration": str(record.calibration.get("origin", "none")),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    request = json.dumps(record.config.to_json(), indent=2)
    return _CARD.format(
        title=repo_id.rpartition("/")[2],
        name=name,
        repo=repo_id,
        version=hqdit.__version__,
        table=table,
        request=request,
    )


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(Counter(names).items()))


_CARD = """---
library_name: diffusers
tags:
- diffusers
- hqdit
- quantization
- fp4
---

# {title}

`{name}`, weights and activations quantized after training by hqdit {version} (HQ-DiT, arXiv 2405.19751).

```python
import hqdit  # diffusers learns the method from it
from diffusers import {name}

transformer = {name}.from_pretrained("{repo}")
```

Without `import hqdit` diffusers says that it does not know the quantization type. The transformer goes into a pipeline
as any other: `DiffusionPipeline.from_pretrained(..., transformer=transformer)`.

| | |
|---|---|
{table}

Made with:

```json
{request}
```
"""
