"""The readers of foreign bytes, each as a function that gets any bytes at all and may raise `HQDiTError` only.

Every target writes the bytes where its reader looks for them, in a folder that is its own, and reads them as the
commands do. `SEEDS` are sound files to begin with; what was found is kept beside them in `corpus/NAME`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from original_dit import original_state
from safetensors.torch import save

from hqdit.calibration.recording import RecordedCalls, read_calibration
from hqdit.calibration.samples import CalibrationSet
from hqdit.errors import HQDiTError
from hqdit.evaluation.image_files import read_images
from hqdit.models import torch_file_reader
from hqdit.models.calls import ModelCall
from hqdit.models.class_names import read_class_names
from hqdit.models.original_dit import expected_shapes, read_sizes, to_diffusers
from hqdit.models.source import build_skeleton, find_model
from hqdit.models.weights import (
    WEIGHTS_NAME,
    read_safetensors,
    read_tensor,
    read_weights,
    require_finite,
    require_float,
    require_state,
    stored_tensor_facts,
)
from hqdit.pipeline.checkpoint import save as save_model
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.description import place_empty_layers, read_description
from hqdit.pipeline.manifest import MANIFEST_NAME, require_sound, write_manifest
from hqdit.pipeline.quantize import quantize
from hqdit.records.run_record import RECORD_NAME, Bars, Column, ImageGrid, Interval, Lines, RunRecord, Series, Table
from hqdit.records.run_record_reader import read_run_records

CORPUS = Path(__file__).parent / "corpus"
SMALL: dict[str, Any] = {"attention_head_dim": 12, "num_layers": 1}
LARGEST_BYTES = 1 << 16


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        prepare: makes what lies beside the file in a new folder.
        file: name of the file that the bytes are written to.
        read: reads it, given the folder.
        seeds: sound contents.
    """

    file: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    prepare: Callable[[Path], object] = lambda folder: None

    def __call__(self, folder: Path, data: bytes) -> bool:
        """Whether the bytes were read; raises what is a defect."""
        (folder / self.file).write_bytes(data)
        try:
            self.read(folder)
        except HQDiTError as error:
            line = str(error).splitlines()[0]
            assert "needed" in line and "Fix: " in line, line
            return False
        return True


# safetensors files


def _read_weights(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    facts = stored_tensor_facts(folder)
    found = read_safetensors(path)
    assert facts.keys() == found.keys()
    for name, tensor in found.items():
        assert (facts[name].shape, facts[name].bytes) == (tuple(tensor.shape), tensor.nbytes)
        assert read_tensor(path, name).shape == tensor.shape
    require_float(read_weights(folder), folder)
    require_finite(found, folder)


def _weights_seeds() -> list[bytes]:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool)
    mixed = {f"layer.{number}": torch.ones(2, 3).to(kind) for number, kind in enumerate(kinds)}
    return [save({"a": torch.ones(2)}), save(mixed, {"format": "pt"}), save({"b.weight": torch.zeros(0, 3)})]


# config.json


def _read_config(folder: Path) -> None:
    found = find_model(folder)
    build_skeleton(found, is_empty=True)


def _read_description(folder: Path) -> None:
    found = find_model(folder)
    # The model is the sound one, so that only the description is at fault.
    model = tiny.tiny_dit(**SMALL)
    place_empty_layers(model, read_description(found.config.get("quantization_config"), folder), folder)


def _config_seeds() -> list[bytes]:
    flux = tiny.tiny_flux(num_layers=1, num_single_layers=1)
    return [model.to_json_string().encode() for model in (tiny.tiny_dit(**SMALL), flux)]


def _description_seeds() -> list[bytes]:
    import tempfile

    seeds = []
    for changes in ({}, {"weight_granularity": "group", "group_size": 4}, {"low_rank": 2}):
        config = QuantizationConfig.preset("minmax").replace(rotation="full", **changes)
        with tempfile.TemporaryDirectory() as temporary:
            save_model(quantize(tiny.tiny_dit(**SMALL), config), Path(temporary) / "q")
            whole = json.loads((Path(temporary) / "q" / "config.json").read_text())
        layers = whole["quantization_config"]["layers"]
        for name in list(layers)[2:]:  # all have the same keys
            del layers[name]
        seeds.append(json.dumps(whole).encode())
    return seeds


# manifests and records


def _published(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "a").write_bytes(b"a")
    (folder / "b").write_bytes(b"")


def _manifest_seeds() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        _published(Path(temporary))
        return [write_manifest(Path(temporary)).read_bytes(), b'{"files": {}, "manifest_version": 1}']


def _record_seeds() -> list[bytes]:
    series = Series("s", (1.0, None, float("inf")), (1.0, 2.0, 3.0), (0.0, None, 1.0), (2.0, None, 9.0))
    record = RunRecord(
        "name",
        "title",
        "question",
        ("answer",),
        (Table("t", (Column("a"), Column("b", "dB", 1, "higher")), (("x", Interval(1.0, 0.5, 2.0)), (3, None))),),
        (Lines("l", "x", "y", (series,)), Bars("b", ("p", "q"), "y", (Series("s", (1.0, 2.0)),))),
        (ImageGrid("i", "i.png", "c"),),
    )
    return [record.to_text().encode(), RunRecord("n", "t", "q", ()).to_text().encode()]


# PyTorch files


def _read_torch_file(folder: Path) -> None:
    """What the child process does, without its limits, and then what `hqdit convert` does with its answer."""
    source, handed, answer = folder / "x.pt", folder / "handed.safetensors", folder / "answer.json"
    for path in (handed, answer):
        path.unlink(missing_ok=True)
    status = torch_file_reader.main([str(source), str(handed), str(answer), ""])
    said = json.loads(answer.read_text())
    if status:
        assert said.keys() == {"found", "needed", "fix"} and all(said.values())
        return
    tensors = read_safetensors(handed)
    sizes = read_sizes(tensors, source, 2)
    require_state(tensors, expected_shapes(sizes), source)
    require_finite(tensors, source)
    to_diffusers(tensors, sizes)


def _without_limits(_folder: Path) -> None:
    torch_file_reader._limit_resources = lambda size: None  # they would be those of the whole run


def _torch_seeds() -> list[bytes]:
    state = original_state(width=8, blocks=1, patch=2, size=4, classes=2)
    seeds = []
    for content in (state, {"a": torch.ones(2), "b": torch.zeros(3).half()}, {"ema": state, "opt": {}, "args": None}):
        stream = io.BytesIO()
        torch.save(content, stream)
        seeds.append(stream.getvalue())
    return seeds


# calibration data, names of classes, images


def _calibration_seeds() -> list[bytes]:
    import tempfile

    fields = torch.zeros(2, 1, 2, 2), torch.arange(2), torch.arange(2)
    calls = (ModelCall((torch.ones(2),), {"x": [torch.zeros(1), None, "text"], "y": {"z": (1, 2.5)}}),)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "c"
        CalibrationSet(*fields).save(path)
        first = path.read_bytes()
        RecordedCalls(calls, "Model").save(path)
        return [first, path.read_bytes()]


def _names_seeds() -> list[bytes]:
    return [b"a\nb\nc, d\n", b'["a", "b", "c"]', b'{"id2label": {"0": "a", "1": "b", "2": "c"}}', b'{"0": "a"}']


def _image_seeds() -> list[bytes]:
    stream = io.BytesIO()
    np.savez(stream, arr_0=np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3))
    packed = io.BytesIO()
    np.savez_compressed(packed, arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=np.zeros(2))
    return [stream.getvalue(), packed.getvalue()]


TARGETS = {
    "safetensors": Target(WEIGHTS_NAME, _read_weights, _weights_seeds),
    "config": Target("config.json", _read_config, _config_seeds),
    "description": Target("config.json", _read_description, _description_seeds),
    "manifest": Target(MANIFEST_NAME, require_sound, _manifest_seeds, _published),
    "run_record": Target(RECORD_NAME, read_run_records, _record_seeds),
    "torch_file": Target("x.pt", _read_torch_file, _torch_seeds, _without_limits),
    "calibration": Target("c", lambda folder: read_calibration(folder / "c"), _calibration_seeds),
    "class_names": Target("names", lambda folder: read_class_names(folder / "names", 3), _names_seeds),
    "images": Target("i.npz", lambda folder: read_images(folder / "i.npz"), _image_seeds),
}


def corpus(name: str) -> list[bytes]:
    """The committed files of a target, by name: seeds and what was found."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
