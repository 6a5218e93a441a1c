"""Calibration data for any model: what its own pipeline calls it with while it samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.calibration.capture import CalibrationData
from hqdit.calibration.samples import CalibrationSet
from hqdit.errors import CheckpointError, NumericsError, UsageError, reason_of
from hqdit.models.calls import ModelCall
from hqdit.models.weights import read_safetensors, write_safetensors
from hqdit.progress import track
from hqdit.randomness import random_stream

#: Calls that are kept by default. One of them holds all tokens of an image, in both guidance branches as a rule.
DEFAULT_CALLS = 128

_STRUCTURE = "calls.json"
_TENSOR = "tensor"
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RecordedCalls:
    """Calls of one model, in the order in which they were made.

    Attributes:
        recorded: the calls, with their tensors on the CPU.
        model_class: name of the class that was called.
        origin: where the data came from, for the record.

    Raises:
        NumericsError: no calls, or a tensor with a NaN or an infinity.
    """

    recorded: tuple[ModelCall, ...]
    model_class: str
    origin: str = "given"

    def __post_init__(self) -> None:
        if not self.recorded:
            raise NumericsError(
                f"calibration ({self.origin}): found no calls of {self.model_class}, needed at least 1. "
                "Fix: give the pipeline inputs that make it sample"
            )
        for number, call in enumerate(self.recorded):
            for name, tensor in _named_tensors(call):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise NumericsError(
                        f"calibration ({self.origin}): {name} of call {number} holds NaN or infinity, needed finite "
                        "numbers. Fix: sample in float32, or remove this call"
                    )

    def __len__(self) -> int:
        return len(self.recorded)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents, for the record."""
        digest = hashlib.sha256(json.dumps(_structure(self)).encode())
        for call in self.recorded:
            for _, tensor in _named_tensors(call):
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def require_fits(self, model: nn.Module) -> None:
        """Check that the calls are of this kind of model.

        Raises:
            NumericsError: they are of another class.
        """
        if type(model).__name__ != self.model_class:
            raise NumericsError(
                f"calibration ({self.origin}): found calls of {self.model_class}, needed some of "
                f"{type(model).__name__}. Fix: record them from a pipeline with this model"
            )

    def calls(self, model: nn.Module) -> Iterator[ModelCall]:
        """The calls, with 16-bit numbers in the dtype of `model`, so that a pipeline may have run in half precision."""
        dtype = next(model.parameters()).dtype
        for call in self.recorded:
            yield call.map_tensors(lambda tensor: tensor.to(dtype) if tensor.dtype in _HALF else tensor)

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        inputs: Sequence[Mapping[str, Any]],
        samples: int = DEFAULT_CALLS,
        seed: int = 0,
        component: str = "transformer",
    ) -> RecordedCalls:
        """Let a diffusers pipeline sample, and keep some of the calls of its transformer.

        Args:
            pipeline: any pipeline with a transformer; it runs its own denoising loop, guidance included.
            inputs: keyword arguments of one `pipeline(...)` each, such as prompt, num_inference_steps and
                guidance_scale. Where they name no generator, noise comes from `seed` and their position.
            samples: how many calls to keep at most: a seeded choice, so that all time steps occur.
            seed: of noise and choice.
            component: the model's name in the pipeline, where there are several.

        Raises:
            UsageError: no inputs, fewer than one sample, no such component, or arguments that the pipeline refuses.
            NumericsError: the pipeline never called the model, or with numbers that are not finite.
        """
        model = getattr(pipeline, component, None)
        if not inputs or samples < 1 or not isinstance(model, nn.Module):
            raise UsageError(
                f"calibration: found {len(inputs)} inputs, {samples} samples and {type(model).__name__} as {component} "
                f"of {type(pipeline).__name__}, needed at least one of each and a model. Fix: pass the keyword "
                "arguments of one or more pipeline calls"
            )
        stream = random_stream(seed, "calibration calls")
        kept: list[tuple[int, ModelCall]] = []
        seen = 0

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            # Reservoir sampling: every call so far is kept with the same probability.
            place = seen if seen < samples else int(stream.integers(0, seen + 1))
            if place < samples:
                call = ModelCall(args, kwargs).map_tensors(lambda tensor: tensor.detach().cpu().clone())
                kept[place : place + 1] = [(seen, call)]
            seen += 1

        handle = model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for number, arguments in enumerate(track(list(inputs), "calibration pipeline calls")):
                noise = int(random_stream(seed, f"calibration noise/{number}").integers(0, 2**63))
                try:
                    with torch.no_grad():
                        pipeline(**{"generator": torch.Generator().manual_seed(noise), **arguments})
                except (AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
                    raise UsageError(
                        f"calibration: found that {type(pipeline).__name__} cannot run with "
                        f"{', '.join(sorted(arguments))} ({reason_of(error)}), needed arguments that it takes. "
                        "Fix: try the pipeline by itself with them first"
                    ) from error
        finally:
            handle.remove()
        origin = f"{type(pipeline).__name__}: {len(inputs)} calls, {seen} of its {component}, seed {seed}"
        ordered = tuple(call for _, call in sorted(kept, key=lambda entry: entry[0]))
        return cls(ordered, type(model).__name__, origin)

    @classmethod
    def from_file(cls, path: str | Path) -> RecordedCalls:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing or broken file, or one that holds no calls.
            NumericsError: non-finite contents.
        """
        tensors = read_safetensors(Path(path))
        try:
            described = json.loads(tensors[_STRUCTURE].numpy().tobytes().decode("utf-8"))
            calls = [
                ModelCall(_rebuilt(entry["args"], tensors), _rebuilt(entry["kwargs"], tensors))
                for entry in described["calls"]
            ]
            if not all(isinstance(call.args, tuple) and isinstance(call.kwargs, dict) for call in calls):
                raise TypeError("arguments are no tuple and dictionary")
            model_class = str(described["model_class"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: found no calls that can be read ({error!r}), needed a file of RecordedCalls.save. "
                "Fix: record the calls again"
            ) from error
        return cls(tuple(calls), model_class, Path(path).name)

    def save(self, path: str | Path) -> None:
        """Write a file that `from_file` reads.

        Raises:
            UsageError: an argument that is neither a tensor nor a plain value.
        """
        text = json.dumps(_structure(self)).encode()
        tensors = {
            f"{n}.{name}": tensor.contiguous()
            for n, c in enumerate(self.recorded)
            for name, tensor in _named_tensors(c)
        }
        write_safetensors({_STRUCTURE: torch.frombuffer(bytearray(text), dtype=torch.uint8), **tensors}, Path(path))


def read_calibration(path: str | Path) -> CalibrationData:
    """A file of `CalibrationSet.save` or of `RecordedCalls.save`, whichever it is. Raises as their `from_file`."""
    is_calls = _STRUCTURE in read_safetensors(Path(path))
    return RecordedCalls.from_file(path) if is_calls else CalibrationSet.from_file(path)


def _named_tensors(call: ModelCall) -> list[tuple[str, Tensor]]:
    """Path -> tensor of everything in a call, in a fixed order."""
    found: list[tuple[str, Tensor]] = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            found.append((path, value))
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                walk(item, f"{path}.{index}")
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}")

    walk(call.args, "args")
    walk(dict(call.kwargs), "kwargs")
    return found


def _structure(calls: RecordedCalls) -> dict[str, Any]:
    """Everything but the tensors, as plain values; a tensor becomes {"tensor": its name in the file}."""
    described = []
    for number, call in enumerate(calls.recorded):
        names = iter([f"{number}.{name}" for name, _ in _named_tensors(call)])
        args = _described(call.args, names)
        described.append({"args": args, "kwargs": _described(dict(call.kwargs), names)})
    return {"model_class": calls.model_class, "calls": described}


def _described(value: Any, names: Iterator[str]) -> Any:
    if isinstance(value, Tensor):
        return {_TENSOR: next(names)}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_described(item, names) for item in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): _described(item, names) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(
        f"calibration: found an argument of type {type(value).__name__}, needed tensors and plain values. "
        "Fix: keep these calls in memory, or call the pipeline without this argument"
    )


def _rebuilt(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == "dict":
        return {key: _rebuilt(item, tensors) for key, item in content.items()}
    if kind not in ("list", "tuple"):
        raise ValueError(f"found {kind!r}, needed tensor, dict, list or tuple")
    items = [_rebuilt(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
