"""Train the class-conditional pixel-space DiT that ships with hqdit as `digits`.

Data: scikit-learn's handwritten digits (1,797 images, 8x8, grey), 80 % of each class for training.
Model: `DiTTransformer2DModel`, 6 blocks of 2 heads x 72 = width 144, MLP 576, patch 2 (16 tokens).
Recipe: `diffusion_training.py`, with light augmentation.

Run `make train-digits` (needs the `train` extra); the result is what `src/hqdit/data/digits` holds.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusion_training import parse_arguments, train
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

RECIPE = {
    "steps": 12000,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "warmup_steps": 200,
    "weight_decay": 0.01,
    "betas": [0.9, 0.99],
    "gradient_norm": 1.0,
    "ema_decay": 0.999,
    "label_dropout": 0.1,
    "embedding_std": 0.02,
    "augmentation": "half of the images: rotation +-8 degrees, scale +-6 %, shift +-0.4 pixel, bicubic",
    "split": {"held_out_fraction": 0.2, "stratified": True, "random_state": 0},
    "seed": 0,
}
ARCHITECTURE = {
    "num_attention_heads": 2,
    "attention_head_dim": 72,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def digits_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, train labels, held-out images, held-out labels; images float32 (n, 1, 8, 8) in [-1, 1]."""
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32) / 8.0 - 1.0).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=data.target, random_state=RECIPE["split"]["random_state"]
    )
    return images[train], labels[train], images[held_out], labels[held_out]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images under a small random rotation, scale and shift (values clamped back to [-1, 1])."""
    n = images.shape[0]
    angle = (torch.rand(n, generator=generator) * 2 - 1) * math.radians(8.0)
    scale = 1 + (torch.rand(n, generator=generator) * 2 - 1) * 0.06
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (0.4 * 2 / images.shape[-1])
    theta = torch.stack(
        [
            torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[:, 0]], 1),
            torch.stack([scale * angle.sin(), scale * angle.cos(), shift[:, 1]], 1),
        ],
        1,
    )
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(
        images, grid, mode="bicubic", padding_mode="border", align_corners=False
    ).clamp(-1, 1)
    keep = torch.rand(n, generator=generator) < 0.5
    return torch.where(keep[:, None, None, None], images, moved)


def main() -> None:
    args = parse_arguments(__doc__, RECIPE["steps"])
    torch.manual_seed(RECIPE["seed"])
    generator = torch.Generator().manual_seed(RECIPE["seed"])
    images, labels, _, _ = digits_split()

    def draw(source: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (RECIPE["batch_size"],), generator=source)
        return augment(images[chosen], source), labels[chosen]

    train(RECIPE | {"steps": args.steps}, ARCHITECTURE, draw, generator, args.out, args.record)


if __name__ == "__main__":
    main()
