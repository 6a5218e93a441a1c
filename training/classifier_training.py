"""The training of the bundled classifiers: the recipe, the data sets, an independent classifier, and the record.

AdamW with a one-cycle learning rate, noise on the images, the last weights kept; the held-out images are looked at
once, at the end. A run writes the same bytes again on one kind of CPU: one thread, a fixed seed, no time stamps.
(Another instruction set sums in another order; the record names the one that was used.)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from sklearn.svm import SVC
from torch import Tensor, nn
from train_digits_model import digits_split
from train_shapes_model import RECIPE as SHAPES_RECIPE

from hqdit.evaluation.shapes import shapes_images
from hqdit.evaluation.surrogate import (
    NAME_KEY,
    SURROGATE_DATA,
    ClassifierNetwork,
    SurrogateClassifier,
    held_out_images,
)

SEED = 0
STEPS = 1500
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
NOISE = 0.1
#: Images that the independent classifier is trained on, at most: its cost grows with their square.
SVC_IMAGES = 3000
ROOT = Path(__file__).resolve().parents[1]

#: Moves a batch of images a little, with the generator.
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A bundled data set: images float32 (n, channels, height, width) in [-1, 1], labels int64 (n,)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    def train_svc(self) -> SVC:
        """A classifier of another kind on the same split: shows what the images allow."""
        inputs = self.svc_inputs(self.train_images[:SVC_IMAGES])
        return SVC().fit(inputs, self.train_labels[:SVC_IMAGES].numpy())

    def svc_inputs(self, images: Tensor) -> npt.NDArray[np.float32]:
        """Digits as pixels; shapes as their brightness at half the resolution, without its mean and contrast."""
        if self.name == "digits":
            return images.flatten(1).numpy()
        brightness = torch.nn.functional.avg_pool2d(images.amax(dim=1, keepdim=True), 2).flatten(1)
        centred = brightness - brightness.mean(dim=1, keepdim=True)
        return (centred / centred.std(dim=1, keepdim=True)).numpy()


def labelled_images(name: str) -> LabelledImages:
    """The images of a bundled data set, split as the diffusion model's training split them."""
    if name == "digits":
        return LabelledImages(name, *digits_split())
    return LabelledImages(name, *shapes_images("train", SHAPES_RECIPE["images"]), *held_out_images(name))


def train(data: LabelledImages, augment: Augment | None = None, steps: int = STEPS) -> ClassifierNetwork:
    """A network trained on the training images."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network = ClassifierNetwork(SURROGATE_DATA[data.name].image_shape)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(data.train_images), (BATCH_SIZE,), generator=generator)
        images = data.train_images[chosen]
        moved = images if augment is None else augment(images, generator)
        noisy = (moved + NOISE * torch.randn(moved.shape, generator=generator)).clamp(-1, 1)
        loss = nn.functional.cross_entropy(network(noisy), data.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {float(loss.detach()):.4f}", flush=True)
    return network


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, object]:
    """Write a safetensors file; its size and digest for the record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blob = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    path.write_bytes(blob)
    return {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}


def main(
    name: str,
    description: str | None,
    augmentation: str,
    split: str,
    augment: Augment | None = None,
    further_files: Callable[[LabelledImages], dict[str, dict[str, Tensor]]] = lambda _data: {},
) -> None:
    """Train, write the package data, measure what was written, and keep a record.

    Args:
        name: of the data set.
        description: of the command line.
        augmentation: what is done to the images, in words.
        split: where the split comes from, in words.
        augment: applied in front of the noise.
        further_files: file name -> tensors to write beside the weights.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / f"src/hqdit/data/{name}_evaluation", help="folder for the safetensors files"
    )
    parser.add_argument(
        "--record", type=Path, default=ROOT / f"training/{name}_classifier_record.json", help="JSON file for the record"
    )
    args = parser.parse_args()

    # The order of a sum depends on the number of threads; one thread makes it the same everywhere.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()
    data = labelled_images(name)
    network = train(data, augment)
    extractor = SURROGATE_DATA[name].extractor
    written = {
        "classifier.safetensors": write(
            args.out / "classifier.safetensors", network.state_dict(), {NAME_KEY: extractor}
        )
    }
    for file, tensors in further_files(data).items():
        written[file] = write(args.out / file, tensors)

    classifier = SurrogateClassifier(extractor, network)
    held_out, truth = data.held_out_images, data.held_out_labels.numpy()
    record = {
        "extractor": extractor,
        "recipe": {
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "optimizer": "AdamW",
            "learning_rate": LEARNING_RATE,
            "schedule": "one cycle",
            "weight_decay": WEIGHT_DECAY,
            "augmentation": augmentation,
            "split": split,
            "kept": "the last weights; no choice by held-out accuracy",
        },
        "seed": SEED,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "train_images": len(data.train_images),
        "held_out_images": len(held_out),
        "train_accuracy": float(np.mean(classifier.classify(data.train_images) == data.train_labels.numpy())),
        "held_out_accuracy": float(np.mean(classifier.classify(held_out) == truth)),
        "svm_held_out_accuracy": float(data.train_svc().score(data.svc_inputs(held_out), truth)),
        # The extractor's name promises these features; a change of the architecture's definition shows here.
        "held_out_mean_square_feature": float(np.square(classifier.features(held_out)).mean()),
        "files": written,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "seconds": round(time.monotonic() - start, 1),
    }
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
