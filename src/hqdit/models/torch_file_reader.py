"""The child process of `hqdit.models.torch_file`: a PyTorch file to a safetensors file, under limits.

`python -m hqdit.models.torch_file_reader FILE TARGET ANSWER WEIGHTS`: the answer is a JSON object, either
{"weights": key or null} or {"found": ..., "needed": ..., "fix": ...}.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

#: As `torch_file.WEIGHTS`, which is not imported: this process knows no more of hqdit than it has to.
_EMA, _MODEL = "ema", "model"
_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_MAX_ENTRIES, _MAX_PICKLE_BYTES = 100_000, 2**26
_GIGABYTE = 2**30
#: Processor time: what a slow machine needs to begin, and for each byte.
_CPU_SECONDS, _CPU_BYTES_PER_SECOND = 60, 20e6
_AGAIN = "download or copy the file again"


class _Refused(Exception):
    """A file that is not taken: what was found, what was needed, how to fix it."""

    def __init__(self, found: str, needed: str = "a state dict that torch.save wrote", fix: str = _AGAIN) -> None:
        super().__init__(found)
        self.answer = {"found": found, "needed": needed, "fix": fix}


def main(arguments: Sequence[str]) -> int:
    """Read, write, answer; returns the exit status, 0 for success."""
    source, target, answer, wanted = Path(arguments[0]), Path(arguments[1]), Path(arguments[2]), arguments[3] or None
    _limit_resources(source.stat().st_size)
    try:
        _require_plain_archive(source)
        key, tensors = _choose(_load(source), wanted)
        save_file(_named_tensors(tensors, source.stat().st_size), target)
    except _Refused as error:
        answer.write_text(json.dumps(error.answer))
        return 1
    except MemoryError:
        answer.write_text(json.dumps(_Refused("more data than a file of its size explains").answer))
        return 1
    except Exception as error:  # whatever a loader of foreign files raises
        answer.write_text(json.dumps(_Refused(f"a file that cannot be read ({_reason(error)})").answer))
        return 1
    answer.write_text(json.dumps({"weights": key}))
    return 0


def _reason(error: Exception) -> str:
    """The first sentence of a foreign message; torch's go on with advice that would be wrong here."""
    text = " ".join(str(error).split()) or type(error).__name__
    if wanted := re.search(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|operand|class) (\S+)", text):
        return f"it wants {wanted[1]}, which is no part of a state dict"
    text = text.partition("WeightsUnpickler error: ")[2] or text
    return text.partition(". ")[0][:200]


def _limit_resources(size: int) -> None:
    """Bound memory, processor time, output and core files; enough for an honest file of `size` bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + _CPU_SECONDS + size / _CPU_BYTES_PER_SECOND)
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: size + _MAX_PICKLE_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    statistics = Path("/proc/self/statm")
    if statistics.exists():  # the file is mapped, its tensors may be copied once, and the interpreter is there already
        mapped = int(statistics.read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = mapped + 2 * size + _GIGABYTE
    for limit, value in limits.items():
        most = resource.getrlimit(limit)[1]
        bounded = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (bounded, bounded))


def _require_plain_archive(path: Path) -> None:
    """Look at the archive's directory: nothing compressed, nothing larger than the file, one pickle of fair size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _Refused(f"a zip archive that is truncated or damaged ({_reason(error)})") from error
    if len(entries) > _MAX_ENTRIES:
        raise _Refused(f"an archive of {len(entries):,} files", f"at most {_MAX_ENTRIES:,}")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise _Refused(
                f"the compressed file {entry.filename[:100]!r} in it", "files that are stored, as torch does"
            )
    total = sum(entry.file_size for entry in entries)
    if total > path.stat().st_size:
        raise _Refused(f"an archive that claims {total:,} bytes in {path.stat().st_size:,}", "files side by side")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise _Refused("a TorchScript archive", fix="get the checkpoint itself, not the compiled model")
    pickles = [entry for entry in entries if entry.filename.partition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise _Refused(f"an archive with {len(pickles)} pickles")
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise _Refused(
            f"a pickle of {pickles[0].file_size:,} bytes", f"at most {_MAX_PICKLE_BYTES:,} beside the tensors"
        )


def _load(path: Path) -> object:
    # A training checkpoint also holds its command line's Namespace: a plain object with attributes, which runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return loaded


def _choose(loaded: object, wanted: str | None) -> tuple[str | None, Mapping[object, object]]:
    """The state dict, or that of a training checkpoint which was asked for, and its key there."""
    if not isinstance(loaded, Mapping):
        raise _Refused(f"a {type(loaded).__name__}")
    inner = {key: loaded[key] for key in (_EMA, _MODEL) if isinstance(loaded.get(key), Mapping)}
    if not inner:
        if wanted is not None:
            raise _Refused(
                f"no {wanted!r} in it ({_some(loaded)})", "a checkpoint that a training wrote", "leave out --weights"
            )
        return None, loaded
    key = wanted or next(iter(inner))
    if key not in inner:
        raise _Refused(f"no {key!r} in it, but {', '.join(inner)}", fix=f"--weights {next(iter(inner))}")
    return key, inner[key]


def _some(names: Mapping[object, object]) -> str:
    shown = [repr(name)[:60] for name in list(names)[:3]]
    return f"{', '.join(shown)}, ..., {len(names):,} names" if len(names) > 3 else ", ".join(shown) or "nothing"


def _named_tensors(state: Mapping[object, object], size: int) -> dict[str, Tensor]:
    """`state`, if it is plain float tensors under names, no more of them than a file of `size` bytes can hold."""
    if not state or len(state) > _MAX_ENTRIES:
        raise _Refused(f"{len(state):,} names", "the tensors of a model")
    tensors = {}
    for name, tensor in state.items():
        shown = f"{name!r:.100}"
        if not isinstance(name, str):
            raise _Refused(f"the name {shown}", "names that are texts")
        if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter):
            raise _Refused(f"{shown}, a {type(tensor).__name__}", "tensors and nothing else")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _FLOAT_DTYPES:
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise _Refused(f"tensor {shown} of {kind}", "dense tensors in float64, float32, float16 or bfloat16")
        if not tensor.is_contiguous():
            raise _Refused(f"tensor {shown}, whose numbers do not lie side by side", "contiguous tensors")
        tensors[name] = tensor.detach()
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > size:
        raise _Refused(f"tensors of {total:,} bytes in a file of {size:,}", "tensors with numbers of their own")
    return tensors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
