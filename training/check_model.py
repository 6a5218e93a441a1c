"""Measure a bundled model against its bar: 1,000 guided samples in the classes asked for, and no copies.

Two classifiers look at the samples: the bundled network, and a support vector machine trained on the same split.
The distance to the nearest training image is set beside that of held-out images. Run `make check-digits` or
`make check-shapes`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from classifier_training import ROOT, labelled_images

from hqdit.evaluation.frechet import GaussianStatistics, frechet_distance
from hqdit.evaluation.surrogate import SURROGATE_DATA, SurrogateClassifier
from hqdit.models.source import find_model, load_scheduler
from hqdit.pipeline.checkpoint import load_folder
from hqdit.pipeline.environment import describe_environment
from hqdit.sampling.sampler import SamplingConfig, generate_images


def nearest_distances(images: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """Root mean square pixel distance to the nearest training image, in units of the range [-1, 1]."""
    pixels = images[0].numel()
    return torch.cdist(images.flatten(1), training.flatten(1)).min(dim=1).values / pixels**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SURROGATE_DATA), required=True, help="whose data and classifier")
    parser.add_argument("--folder", type=Path, help="where the model lies; default: in the package")
    parser.add_argument("--samples", type=int, default=1000, help="how many images")
    parser.add_argument("--record", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    data, network = labelled_images(args.model), SurrogateClassifier.load(args.model)
    folder = find_model(str(args.folder or ROOT / "src/hqdit/data" / args.model))
    sampling = SamplingConfig(steps=50, guidance=1.5)
    classes = [index % 10 for index in range(args.samples)]
    images = generate_images(load_folder(folder), load_scheduler(folder), None, classes, sampling, batch_size=250)
    machine = data.train_svc()
    asked, truth = np.array(classes), data.held_out_labels.numpy()
    features = network.features(images)
    reference = GaussianStatistics.from_features(network.features(data.held_out_images))
    distances = {
        "samples": nearest_distances(images, data.train_images),
        "held_out_images": nearest_distances(data.held_out_images, data.train_images),
    }
    record = {
        "samples": args.samples,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "accuracy": {
            network.name: float((network.classify(images) == asked).mean()),
            "svc": float((machine.predict(data.svc_inputs(images)) == asked).mean()),
        },
        "held_out_accuracy": {
            network.name: float((network.classify(data.held_out_images) == truth).mean()),
            "svc": float((machine.predict(data.svc_inputs(data.held_out_images)) == truth).mean()),
        },
        f"frechet_to_held_out_{network.name}": frechet_distance(GaussianStatistics.from_features(features), reference),
        "rms_distance_to_nearest_training_image": {
            name: {"median": float(values.median()), "min": float(values.min())} for name, values in distances.items()
        },
        "environment": describe_environment(),
    }
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
