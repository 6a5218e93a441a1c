"""What the small networks learn and are judged by: scikit-learn's digits, and the text of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hqdit.errors import EnvironmentUnavailable
from hqdit.randomness import random_stream

HELD_OUT_FRACTION = 0.2
#: Every tenth file of the standard library, by name, is held out.
HELD_OUT_EVERY = 10
BYTE_VALUES = 256
PATCH = 2


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and what the network should say to them.

    Attributes:
        inputs: float32 (n, 16, 4) patches of digits, or int64 (n, tokens) bytes.
        targets: int64 (n,) classes, or (n, tokens) bytes that come next.
    """

    inputs: Tensor
    targets: Tensor


def patches(images: Tensor) -> Tensor:
    """(n, 1, 8, 8) -> (n, 16, 4): squares of 2 x 2 pixels, row by row."""
    return torch.nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2).contiguous()


@cache
def digits_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, train labels, held-out images, held-out labels; the bundled model's split.

    Returns:
        Images float32 (n, 1, 8, 8) in [-1, 1], labels int64 (n,).

    Raises:
        EnvironmentUnavailable: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise EnvironmentUnavailable(
            "beyond-dit: found no scikit-learn, which holds the digits, needed it. Fix: pip install 'hqdit[train]'"
        ) from error
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32) / 8.0 - 1.0).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT_FRACTION, stratify=data.target, random_state=0
    )
    return images[train], labels[train], images[held_out], labels[held_out]


def text_files(folder: Path) -> list[Path]:
    """The modules at the top of a standard library, by name.

    Names with a leading underscore are left out: among them is one that the machine's own build wrote.
    """
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


@cache
def python_text() -> tuple[Tensor, Tensor]:
    """Source text of Python's standard library: bytes to train on, and held-out ones.

    The text is that of the interpreter that runs; its digest belongs into every key and record.

    Returns:
        Two uint8 (n,), whole files one after another.

    Raises:
        EnvironmentUnavailable: this installation has no sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = text_files(folder)
    if len(files) < 2 * HELD_OUT_EVERY:
        raise EnvironmentUnavailable(
            f"beyond-dit: found {len(files)} source files of the standard library in {folder}, needed at least "
            f"{2 * HELD_OUT_EVERY}. Fix: run it with a Python that has its .py files unpacked"
        )
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, path in enumerate(files):
        parts[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(path.read_bytes())
    train, held_out = (torch.from_numpy(np.frombuffer(b"".join(part), np.uint8).copy()) for part in parts)
    return train, held_out


def text_windows(text: Tensor, starts: Tensor, length: int) -> Examples:
    """The windows of `length` bytes at `starts`, each byte with the next one as its target."""
    at = starts.unsqueeze(1) + torch.arange(length + 1)
    window = text[at].to(torch.int64)
    return Examples(window[:, :-1].contiguous(), window[:, 1:].contiguous())


def window_starts(text: Tensor, count: int, length: int, seed: int, name: str) -> Tensor:
    """Random places of windows in `text`, int64 (count,): a function of `seed` and `name`."""
    return torch.from_numpy(random_stream(seed, name).integers(0, len(text) - length, count))


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the numbers, for keys and records."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def bigram_bits(train: Tensor, examples: Examples) -> float:
    """Bits per byte of the model that knows one byte of context: counts of byte pairs, each with one added.

    What a language model has to beat to have learned more than pairs.
    """
    pairs = train[:-1].to(torch.int64) * BYTE_VALUES + train[1:].to(torch.int64)
    counts = torch.bincount(pairs, minlength=BYTE_VALUES**2).reshape(BYTE_VALUES, BYTE_VALUES).to(torch.float64) + 1
    probability = counts / counts.sum(dim=1, keepdim=True)
    found = probability[examples.inputs.flatten(), examples.targets.flatten()]
    return float(-found.log2().mean())
