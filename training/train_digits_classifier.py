"""Train the classifier that judges the bundled digits model, and store the held-out digits next to it.

Data: the generative model's split of scikit-learn's digits, so that the held-out fifth is unseen by both.
Recipe: AdamW with a one-cycle learning rate, the generative model's augmentation plus noise, the last weights
kept; the held-out digits are looked at once, at the end.

Run `python training/train_digits_classifier.py` (needs the `train` extra). It takes about half a minute on
one core and writes the same bytes on every run on one kind of CPU: one thread, a fixed seed, no time stamps.
(Another instruction set sums in another order; the record names the one that was used.)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from sklearn.svm import SVC
from torch import Tensor, nn
from train_digits_model import augment, digits_split

from hqdit.evaluation.surrogate import (
    EXTRACTOR_NAME,
    NAME_KEY,
    DigitsClassifierNetwork,
    SurrogateClassifier,
    from_stored,
    to_stored,
)

SEED = 0
STEPS = 1500
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
NOISE = 0.1
RECIPE = {
    "steps": STEPS,
    "batch_size": BATCH_SIZE,
    "optimizer": "AdamW",
    "learning_rate": LEARNING_RATE,
    "schedule": "one cycle",
    "weight_decay": WEIGHT_DECAY,
    "augmentation": f"as the generative model, plus Gaussian noise (deviation {NOISE}), clamped to [-1, 1]",
    "split": "the generative model's (digits_split)",
    "kept": "the last weights; no choice by held-out accuracy",
}
ROOT = Path(__file__).resolve().parents[1]


def train(images: Tensor, labels: Tensor) -> DigitsClassifierNetwork:
    """A trained network; images float32 (n, 1, 8, 8) in [-1, 1], labels int64 (n,)."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network = DigitsClassifierNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=STEPS)
    for step in range(STEPS):
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        moved = augment(images[chosen], generator)
        noisy = (moved + NOISE * torch.randn(moved.shape, generator=generator)).clamp(-1, 1)
        loss = nn.functional.cross_entropy(network(noisy), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{STEPS}  loss {float(loss.detach()):.4f}", flush=True)
    return network


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, object]:
    """Write a safetensors file; its size and digest for the record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blob = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    path.write_bytes(blob)
    return {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}


def main() -> None:
    """Train, write the package data, measure what was written, and keep a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "src/hqdit/data/digits_evaluation",
        help="folder for the two safetensors files",
    )
    parser.add_argument(
        "--record",
        type=Path,
        default=ROOT / "training/digits_classifier_record.json",
        help="JSON file for the record",
    )
    args = parser.parse_args()

    # The order of a sum depends on the number of threads; one thread makes it the same everywhere.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()
    images, labels, held_out_images, held_out_labels = digits_split()
    network = train(images, labels)

    stored = to_stored(held_out_images)
    if not torch.equal(from_stored(stored), held_out_images):
        raise SystemExit("the held-out images are not multiples of 1/8 in [-1, 1], so uint8 cannot hold them")
    written = {
        "classifier.safetensors": write(
            args.out / "classifier.safetensors", network.state_dict(), {NAME_KEY: EXTRACTOR_NAME}
        ),
        "held_out.safetensors": write(
            args.out / "held_out.safetensors", {"images": stored, "labels": held_out_labels.to(torch.uint8)}
        ),
    }

    classifier = SurrogateClassifier(EXTRACTOR_NAME, network)
    # A classifier of another kind on the same split: shows what the digits allow.
    support_vectors = SVC().fit(images.flatten(1).numpy(), labels.numpy())
    record = {
        "extractor": EXTRACTOR_NAME,
        "recipe": RECIPE,
        "seed": SEED,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "train_images": len(images),
        "held_out_images": len(held_out_images),
        "train_accuracy": float(np.mean(classifier.classify(images) == labels.numpy())),
        "held_out_accuracy": float(np.mean(classifier.classify(held_out_images) == held_out_labels.numpy())),
        "svm_held_out_accuracy": float(
            support_vectors.score(held_out_images.flatten(1).numpy(), held_out_labels.numpy())
        ),
        # The extractor's name promises these features; a change of the architecture's definition shows here.
        "held_out_mean_square_feature": float(np.square(classifier.features(held_out_images)).mean()),
        "files": written,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "seconds": round(time.monotonic() - start, 1),
    }
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
