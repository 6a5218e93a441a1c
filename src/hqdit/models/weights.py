"""Reading safetensors files strictly: every fault becomes one line that names the file and the fix."""

from __future__ import annotations

import json
import math
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hqdit.errors import CheckpointError, ResourceError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = WEIGHTS_NAME + ".index.json"
READABLE_BY_ALL = 0o644

#: What unquantized weights may be stored in.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_PICKLE = "a Python pickle", "convert it with diffusers' save_pretrained(safe_serialization=True)"
#: First bytes of files that hold no weights but lie under their name: what they are, and what to do.
NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git-LFS pointer", "run git lfs pull in the repository it came from"),
    (b"<", "an HTML or XML page", "download the file again; that is an error page"),
)
#: The same, and files that hold weights in another way.
_OTHER_FILES = (
    *NOT_WEIGHTS,
    *((bytes((0x80, protocol)), *_PICKLE) for protocol in range(2, 6)),
    (b"PK\x03\x04", "a zip archive or torch .pt file", "convert it with safetensors.torch.save_file"),
)
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8}


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: missing, not JSON, or not an object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: found no such file, needed {what}. Fix: check the path")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: found a file that cannot be read ({error.strerror}), needed {what}. Fix: check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise CheckpointError(
            f"{path}: found no valid JSON ({error}), needed {what}. Fix: get the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: found a JSON {type(value).__name__}, needed an object, {what}. Fix: get the file again"
        )
    return value


def check_safetensors(path: Path) -> None:
    """Look at magic, header and length before anything is allocated.

    Raises:
        CheckpointError: not a regular file, a Git-LFS pointer, a pickle or zip, an HTML page, a broken header, or
            a data section that is shorter or longer than the header says.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: found no such regular file, needed a safetensors file. Fix: check the path")
    size = path.stat().st_size
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"{path}: found a file that cannot be read ({error.strerror}), needed a safetensors file. "
            "Fix: check its permissions"
        ) from error
    with file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little") if len(start) >= 8 else -1
        is_plausible = 2 <= length <= min(_MAX_HEADER_BYTES, size - 8)
        # A header of 640 bytes starts as a pickle does, so that the length is looked at first.
        for magic, found, fix in () if is_plausible and start[8:9] == b"{" else _OTHER_FILES:
            if start.startswith(magic):
                raise CheckpointError(f"{path}: found {found}, needed a safetensors file. Fix: {fix}")
        if not is_plausible:
            raise CheckpointError(
                f"{path}: found {size} bytes with a header length of {length}, needed a safetensors header. "
                "Fix: download or copy the file again"
            )
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_names)
        end = max([0, *(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")])
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in _BITS:
                continue
            begin, stop = entry["data_offsets"]
            if (stop - begin) * 8 != math.prod(entry["shape"]) * _BITS[entry["dtype"]]:
                raise ValueError(f"tensor {name!r} does not fill its byte range")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: found a header that cannot be read ({error}), needed a safetensors header. "
            "Fix: download or copy the file again"
        ) from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: found {size} bytes, needed {8 + length + end} according to its header. "
            "Fix: the file is truncated or has trailing bytes; download or copy it again"
        )


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different; json.loads alone would keep the last of two."""
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name stands in it twice")
    return names


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file, readable by all.

    Raises:
        ResourceError: the system refused, for example because the disk is full.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors wraps what the system said
        raise ResourceError(
            f"{path.name}: found no way to write it ({error}), needed space and permission. Fix: free space or choose "
            "another folder"
        ) from error
    path.chmod(READABLE_BY_ALL)  # safetensors writes through a private temporary file


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, on the CPU.

    Raises:
        CheckpointError: see `check_safetensors`.
    """
    check_safetensors(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: found a file that cannot be read ({error}), needed a sound safetensors file. "
            "Fix: download or copy the file again"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder: one, or the shards that its index lists.

    Raises:
        CheckpointError: none, only pickles, or shard names that leave the folder.
    """
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json(index, "a shard index").get("weight_map")
        shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        for shard in shards:
            if PureWindowsPath(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: found the shard name {shard!r}, needed a plain .safetensors file name. "
                    "Fix: get the index again from where the model came"
                )
        if shards:
            return [folder / shard for shard in shards]
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".safetensors"))
    found = f"only {', '.join(others)}" if others else "no weight file"
    raise CheckpointError(
        f"{folder}: found {found}, needed {WEIGHTS_NAME} or {INDEX_NAME}. "
        "Fix: save the model with diffusers' save_pretrained(safe_serialization=True)"
    )


def _weights_by_file(folder: Path) -> dict[Path, dict[str, Tensor]]:
    tensors: dict[Path, dict[str, Tensor]] = {}
    names: set[str] = set()
    for path in weight_files(folder):
        tensors[path] = read_safetensors(path)
        for name in sorted(names & tensors[path].keys()):
            raise CheckpointError(
                f"{path}: found tensor {name!r}, which lies in two shards, needed it in one. Fix: get the model again"
            )
        names |= tensors[path].keys()
    return tensors


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, from one file or from shards.

    Raises:
        CheckpointError: a broken file, or a tensor that lies in two shards.
    """
    return {name: tensor for tensors in _weights_by_file(folder).values() for name, tensor in tensors.items()}


def locate_weights(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a model folder; no number is read. Raises as `read_weights`."""
    return {name: path for path, tensors in _weights_by_file(folder).items() for name in tensors}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a sound file, on the CPU, mapped by itself.

    The tensors of `read_safetensors` share one mapping of the file, whose pages stay in memory for as long as one
    of them is in use; these go with the tensor.
    """
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def require_float(tensors: dict[str, Tensor], where: Path | str) -> None:
    """Raise `CheckpointError` naming the first tensor whose numbers are not in one of `FLOAT_DTYPES`."""
    for name in sorted(tensors):
        if tensors[name].dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{where}: tensor {name!r} has dtype {tensors[name].dtype}, needed one of "
                f"{', '.join(map(str, FLOAT_DTYPES))}. Fix: convert the checkpoint, or get the original one"
            )


def require_finite(tensors: dict[str, Tensor], where: Path | str) -> None:
    """Raise `CheckpointError` naming the first tensor with a NaN or an infinity, its index and the count."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if not tensor.is_floating_point():
            continue
        # torch cannot ask numbers of 8 bits.
        is_bad = ~torch.isfinite(tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor)
        if bool(is_bad.any()):
            first = tuple(int(i) for i in is_bad.nonzero()[0])
            raise CheckpointError(
                f"{where}: tensor {name!r} holds {int(is_bad.sum())} NaN or infinite numbers (first at index {first}), "
                "needed finite weights. Fix: get the checkpoint again or look into its training"
            )


def require_state(
    found: dict[str, Tensor],
    needed: dict[str, Tensor],
    where: Path,
    what: str = "config.json",
    fix: str = "use the config.json that belongs to these weights",
) -> None:
    """Compare names and shapes with those that `what` asks for.

    Raises:
        CheckpointError: missing, unexpected or differently shaped tensors, counted and then listed.
    """
    missing, unexpected = sorted(needed.keys() - found.keys()), sorted(found.keys() - needed.keys())
    wrong = [name for name in sorted(found.keys() & needed.keys()) if found[name].shape != needed[name].shape]
    if not (missing or unexpected or wrong):
        return
    lines = [f"  missing     {name}" for name in missing[:5]]
    lines += [f"  unexpected  {name}" for name in unexpected[:5]]
    lines += [
        f"  shape       {name}: found {tuple(found[name].shape)}, needed {tuple(needed[name].shape)}"
        for name in wrong[:5]
    ]
    raise CheckpointError(
        f"{where}: weights do not fit {what} ({len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} "
        f"of another shape), needed exactly its tensors. Fix: {fix}\n" + "\n".join(lines)
    )
