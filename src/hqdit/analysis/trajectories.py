"""Running a model over noisy latents, time step by time step, for hooks that look on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hqdit.progress import track
from hqdit.sampling.sampler import predict_branches


class NoisyInputs(Protocol):
    """What a model is run on; `evaluation.fidelity.EvaluationInputs` is one."""

    @property
    def latents(self) -> Sequence[Tensor]:
        """One float32 (pairs, channels, height, width) per time step."""

    @property
    def timesteps(self) -> Sequence[int]:
        """The time steps, in the order of sampling."""

    @property
    def classes(self) -> Tensor:
        """int64 (pairs,)."""


@contextmanager
def before_forward(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside the body, hand the first argument of the named modules to their hooks."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(_first_argument(hook)))
        yield


def _first_argument(hook: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def call(_module: nn.Module, args: tuple[Any, ...]) -> None:
        hook(args[0])

    return call


@torch.no_grad()
def run_each_timestep(model: nn.Module, inputs: NoisyInputs, what: str) -> Iterator[int]:
    """Run the conditional branch on all pairs of one time step after the other; yields the position when it is done.

    Args:
        model: with an adapter.
        inputs: where to run it.
        what: title of the progress bar.
    """
    for position, timestep in enumerate(track(inputs.timesteps, what)):
        times = torch.full_like(inputs.classes, timestep)
        predict_branches(model, inputs.latents[position], times, inputs.classes, 1.0)
        yield position
