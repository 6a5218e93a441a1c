"""Measure the bundled model against its bar: 1,000 guided samples in the classes asked for, and no copies.

Two classifiers look at the samples: the bundled network, and a support vector machine trained on the same split.
The distance to the nearest training image is set beside that of held-out images. Run `make check-digits`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC
from train_digits_model import digits_split

from hqdit.evaluation.frechet import GaussianStatistics, frechet_distance
from hqdit.evaluation.surrogate import SurrogateClassifier
from hqdit.models.source import find_model, load_scheduler
from hqdit.pipeline.checkpoint import load_folder
from hqdit.pipeline.environment import describe_environment
from hqdit.sampling.sampler import SamplingConfig, generate_images

SAMPLES = 1000


def nearest_distances(images: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """Root mean square pixel distance to the nearest training image, in units of the range [-1, 1]."""
    pixels = images[0].numel()
    return torch.cdist(images.flatten(1), training.flatten(1)).min(dim=1).values / pixels**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="bundled name or folder")
    parser.add_argument("--record", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    train_images, train_labels, held_images, held_labels = digits_split()
    folder = find_model(args.model)
    sampling = SamplingConfig(steps=50, guidance=1.5)
    classes = [index % 10 for index in range(SAMPLES)]
    images = generate_images(load_folder(folder), load_scheduler(folder), None, classes, sampling, batch_size=250)
    network = SurrogateClassifier.load()
    machine = SVC().fit(train_images.flatten(1).numpy(), train_labels.numpy())
    asked, truth = np.array(classes), held_labels.numpy()
    features = network.features(images)
    reference = GaussianStatistics.from_features(network.features(held_images))
    ours, theirs = nearest_distances(images, train_images), nearest_distances(held_images, train_images)
    record = {
        "samples": SAMPLES,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "accuracy": {
            network.name: float((network.classify(images) == asked).mean()),
            "svc": float((machine.predict(images.flatten(1).numpy()) == asked).mean()),
        },
        "held_out_accuracy": {
            network.name: float((network.classify(held_images) == truth).mean()),
            "svc": float((machine.predict(held_images.flatten(1).numpy()) == truth).mean()),
        },
        f"frechet_to_held_out_{network.name}": frechet_distance(GaussianStatistics.from_features(features), reference),
        "rms_distance_to_nearest_training_image": {
            name: {"median": float(values.median()), "min": float(values.min())}
            for name, values in (("samples", ours), ("held_out_images", theirs))
        },
        "environment": describe_environment(),
    }
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
