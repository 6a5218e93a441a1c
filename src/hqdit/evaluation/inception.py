"""Inception-v3 as a feature extractor, from a weights file that the user names; nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.evaluation.extractors import Features
from hqdit.evaluation.inception_network import InceptionNetwork
from hqdit.pipeline.manifest import require_regular

#: Name of the extractor with the public weights; only its numbers are comparable with published ones.
PUBLIC_NAME = "inception-2015-12-05"
#: Of the public PyTorch conversion of these weights, pt_inception-2015-12-05-6726825d.pth: by torch's convention its
#: file name carries the first eight digits.
PUBLIC_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_BATCH = 16  # bounds the memory for activations
_COUNT = "num_batches_tracked"  # name of a batch normalization's count of the batches seen in training


class InceptionExtractor:
    """Inception-v3 with fixed weights, in float32.

    Attributes:
        name: `PUBLIC_NAME` with the public weights, "inception-v3-" and eight digits of the file's SHA-256 with others.
        is_inception: true; its numbers are FID, sFID and the Inception Score.
        network: without gradients, in evaluation mode.
    """

    is_inception = True

    def __init__(self, name: str, network: InceptionNetwork) -> None:
        self.name = name
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path, sha256: str | None = None, device: torch.device | str = "cpu") -> InceptionExtractor:
        """The extractor with the weights in a file.

        Args:
            path: a state dict with the names of the public conversion: safetensors if it ends so, else what
                `torch.load` reads without running code.
            sha256: of the file, 64 hexadecimal digits; None means `PUBLIC_SHA256`.
            device: where the network runs.

        Raises:
            UsageError: `sha256` is no digest.
            CheckpointError: no such file, another digest, or not these weights.
        """
        needed = PUBLIC_SHA256 if sha256 is None else sha256.lower()
        if not re.fullmatch("[0-9a-f]{64}", needed):
            raise UsageError(
                f"--sha256: found {sha256!r}, needed 64 hexadecimal digits. Fix: paste what sha256sum prints"
            )
        try:
            require_regular(path.expanduser())
            blob = path.expanduser().read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{path}: found no file that can be read ({error.strerror}), needed Inception weights. "
                "Fix: check the path"
            ) from error
        digest = hashlib.sha256(blob).hexdigest()
        if digest != needed:
            expected = "that of the public weights" if sha256 is None else "as given"
            raise CheckpointError(
                f"{path}: found SHA-256 {digest}, needed {needed} ({expected}). Fix: get the file again, or pass "
                "--sha256 with the digest of a file that you trust"
            )
        with torch.device("meta"):  # the weights come from the file, so none are drawn
            network = InceptionNetwork()
        _load_strictly(network, _state_dict(path, blob), path)
        return cls(PUBLIC_NAME if digest == PUBLIC_SHA256 else f"inception-v3-{digest[:8]}", network.to(device))

    def extract(self, images: Tensor) -> Features:
        """Pooled (n, 2048), spatial (n, 2023) and probabilities (n, 1008) of images.

        Images are rounded to the 256 levels of a file first, because the graph reads files; one channel is repeated.

        Args:
            images: floating point (n, 1 or 3, height, width) in [-1, 1].

        Raises:
            UsageError: images of another form or range.
            NumericsError: a feature is not finite.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape or not images.is_floating_point():
            raise UsageError(
                f"{self.name}: found images {images.dtype} of shape {tuple(images.shape)}, needed floating point ones"
                " of shape (n, 1 or 3, height, width). Fix: convert them"
            )
        if not bool((images.abs() <= 1).all()):
            raise UsageError(
                f"{self.name}: found pixels that are NaN or outside [-1, 1], needed images in that range. "
                "Fix: clamp them"
            )
        device = self.network.fc.weight.device
        weight = self.network.fc.weight
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.inference_mode():
            for batch in torch.split(images.detach(), _BATCH):
                pixels = (batch.to(device, torch.float32) * 127.5 + 127.5).round()
                outputs = self.network(pixels.expand(-1, 3, -1, -1).to(weight.dtype))
                probabilities = torch.softmax(outputs.logits.to(torch.float64), dim=1)
                found.append((outputs.pooled, outputs.spatial, probabilities))
        pooled, spatial, probabilities = (
            torch.cat(parts).to("cpu", torch.float64) for parts in zip(*found, strict=True)
        )
        if not (torch.isfinite(pooled).all() and torch.isfinite(spatial).all()):
            raise NumericsError(
                f"{self.name}: found NaN or infinite features, needed finite ones. Fix: check the weights"
            )
        return Features(pooled.numpy(), spatial.numpy(), probabilities.numpy())


def _state_dict(path: Path, blob: bytes) -> object:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(blob)
        return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: found a file that cannot be read ({reason}), needed a state dict of tensors. "
            "Fix: get the file again"
        ) from error


def _load_strictly(network: InceptionNetwork, state: object, path: Path) -> None:
    """Copy a state dict, all of it and nothing else, into the network."""
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path}: found {type(state).__name__} that is no state dict, needed tensors by name. "
            "Fix: get the file again"
        )
    # The number of batches seen in training says nothing about the function, and older files lack it.
    own = network.state_dict()
    counts = {name: torch.zeros_like(own.pop(name), device="cpu") for name in list(own) if name.endswith(_COUNT)}
    given = {name: value for name, value in state.items() if not str(name).endswith(_COUNT)}
    wrong = sorted(
        str(name)
        for name in own.keys() | given.keys()
        if name not in own or name not in given or own[name].shape != given[name].shape
    )
    wrong += sorted(name for name in own.keys() & given.keys() if not bool(torch.isfinite(given[name]).all()))
    if wrong:
        raise CheckpointError(
            f"{path}: found {len(wrong)} tensors missing, unknown, of another shape or not finite (first: {wrong[0]}), "
            f"needed the {len(own)} of Inception-v3 with 1008 classes. Fix: use the public conversion of the 2015 "
            "weights"
        )
    network.load_state_dict({name: value.to(torch.float32) for name, value in given.items()} | counts, assign=True)
