"""Train the class-conditional pixel-space DiT that ships with hqdit as `digits`.

Data: scikit-learn's handwritten digits (1,797 images, 8x8, grey), 80 % of each class for training.
Model: `DiTTransformer2DModel`, 6 blocks of 2 heads x 72 = width 144, MLP 576, patch 2 (16 tokens).
Recipe: epsilon prediction on 1,000 linear betas, AdamW with warm-up and cosine decay, 10 % of the labels
replaced by the null class, adaLN-zero initialisation, an exponential moving average of the weights.

Run `make train-digits` (needs the `train` extra); the result is what `src/hqdit/data/digits` holds.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from hqdit import PixelDiTPipeline

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
    "augmentation": "half of the images: rotation +-8 degrees, scale +-6 %, shift +-0.4 pixel, bicubic",
    "split": {"held_out_fraction": 0.2, "stratified": True, "random_state": 0},
    "seed": 0,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
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
LOG_EVERY = 50


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


def initialise(model: DiTTransformer2DModel) -> None:
    """adaLN-zero: every block starts as the identity and the output at zero (DiT, arXiv 2212.09748, section 3.2)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        torch.nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
        torch.nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
    for head in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(head.weight)


def learning_rate(step: int) -> float:
    warmup, total = RECIPE["warmup_steps"], RECIPE["steps"]
    if step < warmup:
        return RECIPE["learning_rate"] * (step + 1) / warmup
    progress = (step - warmup) / (total - warmup)
    return RECIPE["learning_rate"] * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--record", type=Path, required=True, help="JSON file for recipe, machine and loss curve")
    parser.add_argument("--steps", type=int, default=RECIPE["steps"], help="training steps")
    args = parser.parse_args()
    RECIPE["steps"] = args.steps

    torch.manual_seed(RECIPE["seed"])
    generator = torch.Generator().manual_seed(RECIPE["seed"])
    images, labels, _, _ = digits_split()
    scheduler = DDIMScheduler(**SCHEDULER)
    model = DiTTransformer2DModel(**ARCHITECTURE)
    # eval() for the whole training: in train() mode diffusers drops the class label independently in every
    # block, so that no block ever sees a consistent null branch. Labels are dropped below, once per sample.
    model.eval()
    initialise(model)
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=RECIPE["learning_rate"],
        betas=tuple(RECIPE["betas"]),
        weight_decay=RECIPE["weight_decay"],
    )
    curve: list[dict[str, float]] = []
    running, start = 0.0, time.monotonic()
    for step in range(RECIPE["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        chosen = torch.randint(len(images), (RECIPE["batch_size"],), generator=generator)
        clean = augment(images[chosen], generator)
        dropped = torch.rand(len(chosen), generator=generator) < RECIPE["label_dropout"]
        classes = torch.where(dropped, ARCHITECTURE["num_embeds_ada_norm"], labels[chosen])
        timesteps = torch.randint(SCHEDULER["num_train_timesteps"], (len(chosen),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = model(noisy, timestep=timesteps, class_labels=classes).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["gradient_norm"])
        optimizer.step()
        # A short run-in keeps the average from being dominated by the initialisation.
        decay = min(RECIPE["ema_decay"], (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1 - decay)
        running += float(loss.detach())
        if (step + 1) % LOG_EVERY == 0:
            elapsed = time.monotonic() - start
            left = elapsed / (step + 1) * (RECIPE["steps"] - step - 1)
            curve.append({"step": step + 1, "loss": round(running / LOG_EVERY, 6)})
            print(
                f"step {step + 1}/{RECIPE['steps']}  loss {running / LOG_EVERY:.4f}  {left / 60:.1f} min left",
                flush=True,
            )
            running = 0.0
        if (step + 1) % 1000 == 0 or step + 1 == RECIPE["steps"]:
            save(model, average, scheduler, args.out)
            record = {
                "recipe": RECIPE,
                "scheduler": SCHEDULER,
                "architecture": ARCHITECTURE,
                "finished_steps": step + 1,
                "seconds": round(time.monotonic() - start, 1),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
                "loss_curve": curve,
            }
            args.record.parent.mkdir(parents=True, exist_ok=True)
            args.record.write_text(json.dumps(record, indent=1) + "\n")


def save(model: DiTTransformer2DModel, average: dict[str, Tensor], scheduler: DDIMScheduler, folder: Path) -> None:
    """Write the averaged weights and the scheduler in diffusers layout."""
    averaged = DiTTransformer2DModel.from_config(model.config)
    averaged.load_state_dict(average)
    PixelDiTPipeline(averaged, scheduler).save_pretrained(folder)


if __name__ == "__main__":
    main()
