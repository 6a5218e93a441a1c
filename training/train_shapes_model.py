"""Train the class-conditional pixel-space DiT that ships with hqdit as `shapes`.

Data: 20,000 images of coloured shapes and textures, drawn by `hqdit.evaluation.shapes` (32x32, RGB, ten classes).
Model: `DiTTransformer2DModel`, 4 blocks of 4 heads x 32 = width 128, MLP 512, patch 4 (64 tokens).
Recipe: `diffusion_training.py`, without augmentation.

Run `make train-shapes` (needs the `train` extra); the result is what `src/hqdit/data/shapes` holds.
"""

from __future__ import annotations

import torch
from diffusion_training import parse_arguments, train
from torch import Tensor

from hqdit.evaluation.shapes import SHAPES_CLASSES, SIZE, shapes_images

RECIPE = {
    "steps": 4000,
    "images": 20000,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "warmup_steps": 200,
    "weight_decay": 0.01,
    "betas": [0.9, 0.99],
    "gradient_norm": 1.0,
    "ema_decay": 0.999,
    "label_dropout": 0.1,
    "embedding_std": None,
    "inverse_snr_bounds": [0.1, 10.0],
    "seed": 0,
}
ARCHITECTURE = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 4,
    "sample_size": SIZE,
    "patch_size": 4,
    "num_embeds_ada_norm": len(SHAPES_CLASSES),
}


def main() -> None:
    args = parse_arguments(__doc__, RECIPE["steps"])
    torch.manual_seed(RECIPE["seed"])
    generator = torch.Generator().manual_seed(RECIPE["seed"])
    images, labels = shapes_images("train", RECIPE["images"])

    def draw(source: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (RECIPE["batch_size"],), generator=source)
        return images[chosen], labels[chosen]

    train(RECIPE | {"steps": args.steps}, ARCHITECTURE, draw, generator, args.out, args.record)


if __name__ == "__main__":
    main()
