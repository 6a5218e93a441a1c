"""Train the classifier that judges the bundled digits model, and store the held-out digits next to it.

Data: the generative model's split of scikit-learn's digits, so that the held-out fifth is unseen by both.
Recipe: `classifier_training.py`, with the generative model's augmentation.

Run `make train-classifier` (needs the `train` extra); half a minute on one core.
"""

from __future__ import annotations

import torch
from classifier_training import NOISE, LabelledImages, main
from torch import Tensor
from train_digits_model import augment

from hqdit.evaluation.surrogate import from_stored, to_stored


def held_out_file(data: LabelledImages) -> dict[str, dict[str, Tensor]]:
    """The held-out digits in the file's form."""
    stored = to_stored(data.held_out_images)
    if not torch.equal(from_stored(stored), data.held_out_images):
        raise SystemExit("the held-out images are not multiples of 1/8 in [-1, 1], so uint8 cannot hold them")
    return {"held_out.safetensors": {"images": stored, "labels": data.held_out_labels.to(torch.uint8)}}


if __name__ == "__main__":
    main(
        "digits",
        __doc__,
        f"as the generative model, plus Gaussian noise (deviation {NOISE}), clamped to [-1, 1]",
        "the generative model's (digits_split)",
        augment,
        held_out_file,
    )
