"""Recipes of the small networks, their training, and what they have to reach.

One recipe with one torch, processor and number of threads gives the same weights: fixed seeds, no choice by held-out
results, the last weights kept.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.errors import NumericsError
from hqdit.experiments.cache import ResultCache
from hqdit.experiments.small_networks.examples import (
    Examples,
    digest,
    digits_images,
    patches,
    python_text,
    text_windows,
    window_starts,
)
from hqdit.experiments.small_networks.networks import (
    LANGUAGE_MODEL,
    MIXER,
    VISION_TRANSFORMER,
    Architecture,
    SmallNetwork,
)
from hqdit.progress import track

#: AdamW with a one-cycle learning rate; the recipe says how high it gets.
WEIGHT_DECAY, BETAS, GRADIENT_NORM = 0.05, (0.9, 0.98), 1.0
#: Deviation of the noise, and largest shift in pixels, that training digits get.
NOISE, SHIFT = 0.1, 1
LN2 = math.log(2)


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        shape: of the network.
        steps: of the optimizer.
        batch: images or windows in a step.
        learning_rate: the highest.
        bound: what the held-out score must reach: accuracy in percent at least, or bits per byte at most.
        calibration: training images or windows for GPTQ.
        held_out: images or windows that are judged; digits have 360.
        seed: of weights and batches.
    """

    shape: Architecture
    steps: int
    batch: int
    learning_rate: float
    bound: float
    calibration: int
    held_out: int
    seed: int = 0

    @property
    def is_text(self) -> bool:
        """Whether it reads bytes, and its score is bits per byte, lower being better."""
        return self.shape.kind == LANGUAGE_MODEL


RECIPES: tuple[Recipe, ...] = (
    Recipe(Architecture(VISION_TRANSFORMER, 64, 256, 3, 16, 4, 10, heads=4), 800, 64, 2e-3, 95.0, 256, 360),
    Recipe(Architecture(MIXER, 64, 256, 3, 16, 4, 10, token_hidden=64), 600, 64, 3e-3, 95.0, 256, 360),
    Recipe(Architecture(LANGUAGE_MODEL, 128, 512, 2, 128, 256, 256, heads=4), 400, 16, 4e-3, 3.0, 32, 96),
)


def draws(recipe: Recipe) -> Callable[[torch.Generator], Examples]:
    """A source of training batches."""
    if recipe.is_text:
        text, _ = python_text()
        length = recipe.shape.tokens

        def windows(generator: torch.Generator) -> Examples:
            starts = torch.randint(len(text) - length, (recipe.batch,), generator=generator)
            return text_windows(text, starts, length)

        return windows
    images, labels, _, _ = digits_images()

    def digits(generator: torch.Generator) -> Examples:
        chosen = torch.randint(len(images), (recipe.batch,), generator=generator)
        shifted = torch.nn.functional.pad(images[chosen], (SHIFT,) * 4, value=-1.0)
        down, right = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
        moved = shifted[:, :, down : down + images.shape[2], right : right + images.shape[3]]
        noisy = moved + NOISE * torch.randn(moved.shape, generator=generator)
        return Examples(patches(noisy), labels[chosen])

    return digits


def calibration_inputs(recipe: Recipe, seed: int) -> Tensor:
    """Training inputs for GPTQ, without augmentation."""
    if recipe.is_text:
        text, _ = python_text()
        starts = window_starts(text, recipe.calibration, recipe.shape.tokens, seed, "beyond-dit calibration")
        return text_windows(text, starts, recipe.shape.tokens).inputs
    images, _, _, _ = digits_images()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: recipe.calibration]
    return patches(images[chosen])


def held_out_examples(recipe: Recipe) -> Examples:
    """What the network never saw: held-out digits, or evenly spaced windows of held-out files."""
    if recipe.is_text:
        _, text = python_text()
        starts = torch.linspace(0, len(text) - recipe.shape.tokens - 1, recipe.held_out).to(torch.int64)
        return text_windows(text, starts, recipe.shape.tokens)
    _, _, images, labels = digits_images()
    return Examples(patches(images[: recipe.held_out]), labels[: recipe.held_out])


def data_digest(recipe: Recipe) -> str:
    """SHA-256 of everything that the network is trained on and judged by."""
    return digest(*(python_text() if recipe.is_text else digits_images()))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def scores(logits: Tensor, examples: Examples) -> Tensor:
    """One score per sample: 100 or 0 percent for an image, mean bits per byte for a text.

    Returns:
        float64 (n,).
    """
    if examples.targets.ndim == 1:
        return 100.0 * (logits.argmax(dim=1) == examples.targets).to(torch.float64)
    log_probability = logits.to(torch.float64).log_softmax(dim=-1)
    of_target = log_probability.gather(-1, examples.targets.unsqueeze(-1)).squeeze(-1)
    return -of_target.mean(dim=1) / LN2


def train(recipe: Recipe) -> SmallNetwork:
    """A trained network in evaluation mode; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(recipe.seed)
        network = SmallNetwork(recipe.shape)
        draw, generator = draws(recipe), torch.Generator().manual_seed(recipe.seed)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=recipe.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
        for _ in track(range(recipe.steps), f"training the {recipe.shape.kind}"):
            examples = draw(generator)
            loss = loss_of(network(examples.inputs), examples.targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM)
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Trained:
    """A network that reached its bound.

    Attributes:
        network: float32, in evaluation mode.
        examples: held out.
        seconds: of its training, whenever that was.
        score: held-out mean of `scores`.
    """

    network: SmallNetwork
    examples: Examples
    seconds: float
    score: float


@torch.no_grad()
def trained(cache: ResultCache, recipe: Recipe) -> Trained:
    """The recipe's network, from the cache if it was trained before.

    Raises:
        EnvironmentUnavailable: the data is not here.
        NumericsError: the network misses its bound.
    """
    key: dict[str, Any] = {"what": "small network", "recipe": dataclasses.asdict(recipe), "data": data_digest(recipe)}

    def compute() -> dict[str, Tensor]:
        start = time.perf_counter()
        network = train(recipe)
        return {**network.state_dict(), "seconds": torch.tensor(time.perf_counter() - start)}

    tensors = cache.tensors(key, compute)
    seconds = float(tensors.pop("seconds"))
    network = SmallNetwork(recipe.shape).eval().requires_grad_(False)
    network.load_state_dict(tensors)
    examples = held_out_examples(recipe)
    score = float(scores(network(examples.inputs), examples).mean())
    if not (score <= recipe.bound if recipe.is_text else score >= recipe.bound):
        needed = f"at most {recipe.bound:g} bits per byte" if recipe.is_text else f"at least {recipe.bound:g} %"
        raise NumericsError(
            f"beyond-dit, {recipe.shape.kind}: found a held-out score of {score:.3f}, needed {needed}. "
            "Fix: train for more steps"
        )
    return Trained(network, examples, seconds, score)
