"""Train the classifier that judges the bundled shapes model.

Data: the 20,000 training images that the generative model sees, drawn by `hqdit.evaluation.shapes`; the held-out split
comes from another random stream.
Recipe: `classifier_training.py`.

Run `make train-shapes-classifier` (needs the `train` extra).
"""

from __future__ import annotations

from classifier_training import NOISE, main

if __name__ == "__main__":
    main(
        "shapes",
        __doc__,
        f"Gaussian noise (deviation {NOISE}), clamped to [-1, 1]",
        "shapes_images: the streams train and held-out",
    )
