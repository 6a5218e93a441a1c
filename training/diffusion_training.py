"""The training loop of the bundled diffusion transformers: noise prediction in pixel space, with classes.

Epsilon prediction on 1,000 linear betas, AdamW with warm-up and cosine decay, 10 % of the labels replaced by the null
class, adaLN-zero initialisation, an exponential moving average of the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from hqdit import PixelDiTPipeline

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
}
LOG_EVERY = 50
SAVE_EVERY = 1000

#: Draws one batch with the generator: images float32 (n, channels, height, width) in [-1, 1] and labels int64 (n,).
DrawBatch = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def initialise(model: DiTTransformer2DModel, embedding_std: float | None) -> None:
    """adaLN-zero: every block starts as the identity and the output at zero (DiT, arXiv 2212.09748, section 3.2).

    Args:
        model: changed in place.
        embedding_std: of class and time embedders; DiT's 0.02 makes the modulation depend on them late in a short
            training, because Adam moves all weights at one pace. None: 1 for classes, Xavier for the time's layers.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        embedders = block.norm1.emb
        torch.nn.init.normal_(embedders.class_embedder.embedding_table.weight, std=embedding_std or 1.0)
        if embedding_std is not None:
            for layer in (embedders.timestep_embedder.linear_1, embedders.timestep_embedder.linear_2):
                torch.nn.init.normal_(layer.weight, std=embedding_std)
    for head in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(head.weight)


def learning_rate(step: int, recipe: dict[str, Any]) -> float:
    warmup, total = recipe["warmup_steps"], recipe["steps"]
    if step < warmup:
        return float(recipe["learning_rate"] * (step + 1) / warmup)
    progress = (step - warmup) / (total - warmup)
    return float(recipe["learning_rate"] * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))))


def loss_weights(alphas_cumprod: Tensor, bounds: list[float] | None) -> Tensor:
    """Weight of each time step's squared noise error: 1, or 1 / SNR within bounds.

    The squared error of the noise is that of the clean image times SNR = alpha / (1 - alpha), so that equal weights
    leave little for the noisy steps, where the shape of the whole image is decided (Hang et al., arXiv 2303.09556).
    """
    if bounds is None:
        return torch.ones_like(alphas_cumprod)
    return ((1 - alphas_cumprod) / alphas_cumprod).clamp(*bounds)


def save(model: DiTTransformer2DModel, average: dict[str, Tensor], scheduler: DDIMScheduler, folder: Path) -> None:
    """Write the averaged weights and the scheduler in diffusers layout."""
    averaged = DiTTransformer2DModel.from_config(model.config)
    averaged.load_state_dict(average)
    PixelDiTPipeline(averaged, scheduler).save_pretrained(folder)


def train(
    recipe: dict[str, Any],
    architecture: dict[str, Any],
    draw: DrawBatch,
    generator: torch.Generator,
    out: Path,
    log: Path,
) -> None:
    """Train, and write model and record every `SAVE_EVERY` steps and at the end.

    Args:
        recipe: steps, batch_size, learning_rate, warmup_steps, betas, weight_decay, gradient_norm, ema_decay,
            label_dropout, embedding_std for `initialise`, and optionally inverse_snr_bounds for `loss_weights`.
        architecture: arguments of `DiTTransformer2DModel`.
        draw: gives the batches.
        generator: of batches, labels, time steps and noise.
        out: pipeline folder to write.
        log: JSON file for recipe, machine and loss curve.
    """
    scheduler = DDIMScheduler(**SCHEDULER)
    model = DiTTransformer2DModel(**architecture)
    # eval() for the whole training: in train() mode diffusers drops the class label independently in every
    # block, so that no block ever sees a consistent null branch. Labels are dropped below, once per sample.
    model.eval()
    initialise(model, recipe["embedding_std"])
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe["learning_rate"],
        betas=tuple(recipe["betas"]),
        weight_decay=recipe["weight_decay"],
    )
    weights = loss_weights(scheduler.alphas_cumprod, recipe.get("inverse_snr_bounds"))
    curve: list[dict[str, float]] = []
    running, start = 0.0, time.monotonic()
    for step in range(recipe["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        clean, labels = draw(generator)
        dropped = torch.rand(len(clean), generator=generator) < recipe["label_dropout"]
        classes = torch.where(dropped, architecture["num_embeds_ada_norm"], labels)
        timesteps = torch.randint(SCHEDULER["num_train_timesteps"], (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = model(noisy, timestep=timesteps, class_labels=classes).sample
        error = torch.nn.functional.mse_loss(predicted, noise, reduction="none").flatten(1).mean(dim=1)
        loss = (error * weights[timesteps]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["gradient_norm"])
        optimizer.step()
        # A short run-in keeps the average from being dominated by the initialisation.
        decay = min(recipe["ema_decay"], (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1 - decay)
        running += float(loss.detach())
        if (step + 1) % LOG_EVERY == 0:
            left = (time.monotonic() - start) / (step + 1) * (recipe["steps"] - step - 1)
            curve.append({"step": step + 1, "loss": round(running / LOG_EVERY, 6)})
            print(
                f"step {step + 1}/{recipe['steps']}  loss {running / LOG_EVERY:.4f}  {left / 60:.1f} min left",
                flush=True,
            )
            running = 0.0
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe["steps"]:
            save(model, average, scheduler, out)
            record = {
                "recipe": recipe,
                "scheduler": SCHEDULER,
                "architecture": architecture,
                "finished_steps": step + 1,
                "seconds": round(time.monotonic() - start, 1),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
                "loss_curve": curve,
            }
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(json.dumps(record, indent=1) + "\n")


def parse_arguments(description: str, steps: int) -> argparse.Namespace:
    """--out, --record and --steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--record", type=Path, required=True, help="JSON file for recipe, machine and loss curve")
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    return parser.parse_args()
