"""From a checkpoint file of the original DiT to a pipeline folder of diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from hqdit.errors import CheckpointError
from hqdit.models.class_names import ID2LABEL, read_class_names
from hqdit.models.original_dit import (
    OriginalSizes,
    expected_shapes,
    read_sizes,
    require_positions,
    to_diffusers,
)
from hqdit.models.source import (
    CONFIG_NAME,
    DEFAULT_SCHEDULER,
    PIPELINE_INDEX_NAME,
    ModelFolder,
    build_skeleton,
    load_vae,
    persistent_state,
)
from hqdit.models.torch_file import read_torch_file
from hqdit.models.weights import (
    INDEX_NAME,
    WEIGHTS_NAME,
    read_json,
    require_finite,
    require_state,
    weight_files,
    write_safetensors,
)
from hqdit.pipeline.publish import publish_folder, require_free


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        sizes: of the model.
        weights: the key they lay under in a training checkpoint, else None.
        parameters: of the model, each counted once.
        has_vae: whether an autoencoder was put beside it.
        has_class_names: whether its classes have names.
    """

    sizes: OriginalSizes
    weights: str | None
    parameters: int
    has_vae: bool
    has_class_names: bool


def convert_original(
    checkpoint: Path,
    out: Path,
    *,
    weights: str | None = None,
    heads: int | None = None,
    vae: Path | None = None,
    class_names: Path | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write the pipeline folder of an original DiT; it appears whole or not at all.

    Args:
        checkpoint: a .pt file; read in a child process, see `models.torch_file`.
        out: transformer/, scheduler/ (DDIM on DiT's variances), model_index.json, and vae/ if one is given.
        weights: which weights of a training checkpoint, see `models.torch_file.read_torch_file`.
        heads: of each attention, for widths of no published model.
        vae: folder of an AutoencoderKL, whose configuration and weights are copied.
        class_names: file with the names of the classes, see `models.class_names.read_class_names`.
        overwrite: replace what lies at `out`.

    Raises:
        UsageError: `out` exists or touches what is read.
        CheckpointError: anything wrong in the checkpoint, the autoencoder or the names.
    """
    sources = [path for path in (checkpoint, vae, class_names) if path is not None]
    require_free(out, overwrite, *sources)
    if vae is not None:
        require_vae_files(vae)
    with publish_folder(out, overwrite) as staged:
        tensors, key = read_torch_file(checkpoint, weights, staged)
        sizes = read_sizes(tensors, checkpoint, heads)
        require_state(
            tensors,
            expected_shapes(sizes),
            checkpoint,
            f"a {sizes.name}, which the shapes of some tell",
            "get the checkpoint of an original DiT",
        )
        require_finite(tensors, checkpoint)
        names = None if class_names is None else read_class_names(class_names, sizes.classes)
        config = {**sizes.transformer_config(), "_diffusers_version": version("diffusers")}
        inner = staged / "transformer"
        inner.mkdir()
        skeleton = build_skeleton(ModelFolder(staged, inner, config), is_empty=True)
        require_positions(tensors["pos_embed"], cast(Any, skeleton).pos_embed.pos_embed, checkpoint)
        converted = to_diffusers(tensors, sizes)
        require_state(converted, persistent_state(skeleton), checkpoint)
        write_safetensors(converted, inner / WEIGHTS_NAME)
        _write_json(config, inner / CONFIG_NAME)
        (staged / "scheduler").mkdir()
        scheduler = {"_class_name": "DDIMScheduler", "_diffusers_version": version("diffusers"), **DEFAULT_SCHEDULER}
        _write_json(scheduler, staged / "scheduler" / "scheduler_config.json")
        if vae is not None:
            _copy_vae(vae, staged, sizes)
        _write_json(_pipeline_index(vae is not None, names), staged / PIPELINE_INDEX_NAME)
    counted = sum(tensor.numel() for name, tensor in tensors.items() if name != "pos_embed")
    return Conversion(sizes, key, counted, vae is not None, names is not None)


def _pipeline_index(has_vae: bool, names: dict[int, str] | None) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
    }
    if names is not None:
        index[ID2LABEL] = {str(number): name for number, name in sorted(names.items())}
    return index


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_vae_files(folder: Path) -> None:
    """Raise `CheckpointError` unless `folder` holds the configuration of an AutoencoderKL and its weights."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: found no such folder, needed that of an AutoencoderKL. Fix: check --vae")
    name = read_json(folder / CONFIG_NAME, "an autoencoder's config.json").get("_class_name")
    if name != "AutoencoderKL":
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: found model class {name!r}, needed AutoencoderKL. Fix: name its own folder with "
            "--vae"
        )
    weight_files(folder)


def _copy_vae(vae: Path, staged: Path, sizes: OriginalSizes) -> None:
    """Copy the autoencoder and prove that it loads and fits."""
    (staged / "vae").mkdir()
    index = [vae / INDEX_NAME] if (vae / INDEX_NAME).exists() and not (vae / WEIGHTS_NAME).exists() else []
    for path in (vae / CONFIG_NAME, *weight_files(vae), *index):
        shutil.copyfile(path, staged / "vae" / path.name)
    loaded = load_vae(ModelFolder(staged, staged / "transformer", {}))
    channels = int(cast(Any, loaded).config.latent_channels)
    if channels != sizes.in_channels:
        raise CheckpointError(
            f"{vae}: found an autoencoder with {channels} latent channels, needed {sizes.in_channels} as the model "
            "has. Fix: name the one that belongs to it with --vae"
        )
