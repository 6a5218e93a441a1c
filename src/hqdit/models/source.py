"""Finding a model on disk, on the hub or in this package, and loading it in float32."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hqdit.errors import CheckpointError, EnvironmentUnavailable, UsageError, reason_of
from hqdit.models.weights import read_json, read_weights, require_finite, require_float, require_state

#: Models that ship with the package.
BUNDLED_MODELS = ("digits", "shapes")

CONFIG_NAME, PIPELINE_INDEX_NAME = "config.json", "model_index.json"

#: Scheduler of a bare transformer folder: DDIM on DiT's linear betas (arXiv 2212.09748, section 4).
DEFAULT_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}

#: What is taken of a repository: data, and neither pickles nor code. Tokenizers have the last two.
DATA_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")

#: Old hub checkpoints say Transformer2DModel; by its norm_type it is one of today's classes.
_LEGACY_CLASS = "Transformer2DModel"
_LEGACY_CLASSES = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}

#: Key of a DiT's config.json for the frequencies 10000^(-k / (128 - shift)) with which its time step is embedded: 1 is
#: what diffusers builds; 0 is what the original was trained with (as ADM, arXiv 2105.05233). diffusers skips the key.
TIME_FREQUENCY_SHIFT = "_downscale_freq_shift"

#: Sizes in a config.json and their bounds, so that a wrong number is answered before it has filled the memory.
_LARGEST_SIZES = {
    "num_layers": 1000,
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "sample_size", "patch_size"), 10_000),
    **dict.fromkeys(("in_channels", "out_channels"), 10_000),
}
#: Numbers in the table of positions, which is computed when the model is built: 16 times that of DiT-XL/2 on images of
#: 1024 x 1024 pixels.
_LARGEST_POSITION_TABLE = 2**28


@dataclass(frozen=True)
class ModelFolder:
    """Where the parts of one model lie.

    Attributes:
        root: the folder that was named.
        transformer: the folder with config.json and weights; `root` itself for a bare transformer.
        config: the transformer's config.json.
    """

    root: Path
    transformer: Path
    config: dict[str, Any]

    @property
    def is_pipeline(self) -> bool:
        """Whether `root` is a pipeline folder around the transformer."""
        return self.root != self.transformer

    @property
    def is_quantized(self) -> bool:
        """Whether config.json says that the weights are quantized, by whatever method."""
        return "quantization_config" in self.config


def _looks_like_path(source: str) -> bool:
    if source.startswith((".", "/", "~", "\\")) or source.count("/") != 1 or source.endswith("/") or "\\" in source:
        return True
    return Path(source).parent.is_dir()  # `out/missing` beside an existing `out` is a mistyped path


def find_model(source: str | Path) -> ModelFolder:
    """The folder behind a bundled name, a hub id, a pipeline folder or a transformer folder.

    Args:
        source: a bundled name is one of `BUNDLED_MODELS` (write ./digits for a folder of that name); anything else
            that exists on disk is a folder; `owner/name` that does not exist is a hub id, unless `owner` is a folder;
            everything else is a missing file.

    Raises:
        CheckpointError: missing, or not a model folder.
        EnvironmentUnavailable: a hub id, and the hub cannot be reached.
    """
    text = str(source)
    path = Path(text).expanduser()
    if not text.strip():
        raise UsageError("model: found an empty name, needed a folder, a hub id or a bundled name. Fix: name a model")
    if source in BUNDLED_MODELS:
        return _inspect(Path(str(resources.files("hqdit") / "data" / text)))
    if path.exists():
        return _inspect(path)
    if isinstance(source, Path) or _looks_like_path(text):
        raise CheckpointError(
            f"{text}: found no such file or folder, needed a model folder, a hub id (owner/name) or one of "
            f"{', '.join(BUNDLED_MODELS)}. Fix: check the path"
        )
    return _inspect(_download(text))


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(DATA_FILES)))
    except HFValidationError as error:
        raise CheckpointError(
            f"{repository}: found no such folder and no valid hub id ({reason_of(error)}), needed one of both. "
            "Fix: check the name"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentUnavailable(
            f"{repository}: found no such folder, and the hub did not give the model ({reason_of(error)}), needed "
            "a connection and an existing repository. Fix: check name, network and token, or pass a local folder"
        ) from error


def _inspect(root: Path) -> ModelFolder:
    if not root.is_dir():
        raise CheckpointError(
            f"{root}: found a file, needed a model folder. Fix: name the folder that holds config.json"
        )
    if (root / PIPELINE_INDEX_NAME).exists():
        read_json(root / PIPELINE_INDEX_NAME, "a pipeline's model_index.json")
        transformer = root / "transformer"
    elif (root / "transformer" / CONFIG_NAME).exists():
        transformer = root / "transformer"
    else:
        transformer = root
    if not (transformer / CONFIG_NAME).exists():
        raise CheckpointError(
            f"{root}: found no {CONFIG_NAME} and no {PIPELINE_INDEX_NAME} with a transformer, needed a diffusers model "
            "or pipeline folder. Fix: name the folder that save_pretrained wrote"
        )
    return ModelFolder(root, transformer, read_json(transformer / CONFIG_NAME, "a model's config.json"))


def build_skeleton(folder: ModelFolder, is_empty: bool = False) -> nn.Module:
    """The model that config.json describes, float32, without its weights loaded.

    Args:
        folder: where config.json lies.
        is_empty: leave the parameters on the meta device, without memory, for tensors that will be assigned.

    Raises:
        CheckpointError: another class, or a key that the class does not know.
    """
    from accelerate import init_empty_weights
    from diffusers import Transformer2DModel

    config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    where = folder.transformer / CONFIG_NAME
    model_class = _transformer_class(config, where)
    known = set(inspect.signature(model_class.__init__).parameters)
    is_legacy = config["_class_name"] == _LEGACY_CLASS
    tolerated = set(inspect.signature(Transformer2DModel.__init__).parameters) if is_legacy else set()
    unknown = sorted(key for key in config if not key.startswith("_") and key not in known | tolerated)
    if unknown:
        raise CheckpointError(
            f"{where}: found the unknown keys {', '.join(unknown)}, needed only those of {model_class.__name__}. "
            "Fix: remove them or upgrade diffusers"
        )
    _require_sizes(config, where)
    settings = {key: value for key, value in config.items() if key in known}
    try:
        with init_empty_weights(include_buffers=False) if is_empty else nullcontext():
            model: nn.Module = model_class(**settings)
    except Exception as error:  # whatever comes out of a constructor that does not expect these values
        raise CheckpointError(
            f"{where}: found values that build no model ({reason_of(error)}), needed those of a "
            f"{model_class.__name__}. Fix: get the file again or correct it"
        ) from error
    set_time_frequencies(model, config, where)
    return model.eval()


def _require_sizes(config: Mapping[str, Any], where: Path) -> None:
    """Raise `CheckpointError` for sizes that no model has, before anything of that size is made."""
    for key, largest in _LARGEST_SIZES.items():
        size = config.get(key)
        if isinstance(size, float) or (isinstance(size, int) and not 1 <= size <= largest):
            raise CheckpointError(
                f"{where}: found {key} {size}, needed a whole number from 1 to {largest}. Fix: get the file again or "
                "correct it"
            )
    sides = [config.get(key) for key in ("sample_size", "patch_size", "num_attention_heads", "attention_head_dim")]
    if all(isinstance(side, int) for side in sides):
        sample, patch, heads, head_dim = cast("list[int]", sides)
        positions, width = (sample // patch) ** 2, heads * head_dim
        if positions * width > _LARGEST_POSITION_TABLE:
            raise CheckpointError(
                f"{where}: found {positions:,} positions of width {width:,}, needed a table of positions of at most "
                f"{_LARGEST_POSITION_TABLE:,} numbers. Fix: get the file again or correct it"
            )


def _transformer_class(config: dict[str, Any], where: Path) -> type[nn.Module]:
    """The class that a config.json names.

    Raises:
        CheckpointError: it is none of the installed diffusers' transformers.
    """
    import diffusers

    name = config.get("_class_name")
    if name == _LEGACY_CLASS:
        name = _LEGACY_CLASSES.get(str(config.get("norm_type")), name)
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_transformer = isinstance(found, type) and found.__module__.startswith("diffusers.models.transformers.")
    if not is_transformer or name == _LEGACY_CLASS:
        raise CheckpointError(
            f"{where}: found model class {name!r}, needed one of the transformers of diffusers "
            f"{diffusers.__version__}, such as DiTTransformer2DModel. Fix: choose such a model, or upgrade diffusers"
        )
    return cast("type[nn.Module]", found)


def set_time_frequencies(model: nn.Module, config: Mapping[str, Any], where: Path | str) -> None:
    """Embed the time step with the frequencies that a config.json asks for, and remember it in the model's own.

    diffusers passes over keys that begin with an underscore.

    Raises:
        CheckpointError: another number than 0 and 1, or another class than DiT.
    """
    if TIME_FREQUENCY_SHIFT not in config:
        return
    shift, name = config[TIME_FREQUENCY_SHIFT], type(model).__name__
    if name != "DiTTransformer2DModel" or isinstance(shift, bool) or shift not in (0, 1):
        raise CheckpointError(
            f"{where}: found {TIME_FREQUENCY_SHIFT} {shift!r} for a {name}, needed 0 or 1 for a DiTTransformer2DModel. "
            "Fix: get the file again or correct it"
        )
    if shift == 0:
        for block in cast(Any, model).transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        cast(Any, model).register_to_config(**{TIME_FREQUENCY_SHIFT: 0})


def load_float_transformer(folder: ModelFolder) -> nn.Module:
    """The trained model in float32 and evaluation mode; `source_dtypes` on it remembers what the file held.

    Raises:
        CheckpointError: quantized already, broken or non-finite weights, or weights that do not fit the config.
    """
    if folder.is_quantized:
        method = folder.config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{folder.transformer}: found weights that are already quantized ({method}), needed a float checkpoint. "
            "Fix: start from the original model"
        )
    model = build_skeleton(folder, is_empty=True)
    tensors = read_weights(folder.transformer)
    require_state(tensors, persistent_state(model), folder.transformer)
    require_float(tensors, folder.transformer)
    require_finite(tensors, folder.transformer)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, assign=True)
    model.source_dtypes = dtypes  # type: ignore[assignment]
    return model


def persistent_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of `model` holds."""
    return dict(model.state_dict())


def load_scheduler(folder: ModelFolder) -> Any:
    """The pipeline's scheduler, or DDIM with `DEFAULT_SCHEDULER` for a bare transformer.

    Raises:
        CheckpointError: a scheduler that diffusers does not know, or values that it cannot work with.
    """
    import diffusers

    path = folder.root / "scheduler" / "scheduler_config.json"
    if not folder.is_pipeline or not path.exists():
        return diffusers.DDIMScheduler(**DEFAULT_SCHEDULER)
    config = read_json(path, "a scheduler's configuration")
    scheduler = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise CheckpointError(
            f"{path}: found scheduler class {config.get('_class_name')!r}, needed one that diffusers "
            f"{diffusers.__version__} knows. Fix: correct the file or upgrade diffusers"
        )
    try:
        return cast(Any, scheduler).from_config(config)
    except Exception as error:  # whatever comes out of a constructor that does not expect these values
        raise CheckpointError(
            f"{path}: found values that build no scheduler ({reason_of(error)}), needed those of a "
            f"{scheduler.__name__}. Fix: get the file again or correct it"
        ) from error


def load_vae(folder: ModelFolder, device: torch.device | str = "cpu") -> Any | None:
    """The pipeline's autoencoder in evaluation mode on `device`, or None: then the model works on pixels.

    Raises:
        CheckpointError: a folder that diffusers cannot load.
    """
    path = folder.root / "vae"
    if not folder.is_pipeline or not path.is_dir():
        return None
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(path, use_safetensors=True).eval().to(device)
    except Exception as error:  # whatever comes out of a loader that does not expect these files
        raise CheckpointError(
            f"{path}: found an autoencoder that cannot be loaded ({reason_of(error)}), needed an AutoencoderKL folder. "
            "Fix: get the folder again"
        ) from error
