"""Inject activation outliers into a float model without changing the function that it computes.

A trained toy model has few outliers, while the paper reports activation channels about 100 times larger than the
rest. Scaling channels of the modulated LayerNorm outputs by c, and dividing the weight columns that read them by c,
gives such channels on demand. These outliers are *compensated* (small weight columns), which a rotation alone
cannot undo: docs/method.md says why.
"""

from __future__ import annotations

import torch
from torch import nn

from hqdit.errors import UsageError
from hqdit.layers.matrix_layers import matrix_shape
from hqdit.models.adapter import adapter_for
from hqdit.randomness import random_stream

DEFAULT_SHARE = 0.05


def inject_outliers(model: nn.Module, factor: float, share: float = DEFAULT_SHARE, seed: int = 0) -> nn.Module:
    """`model`, changed in place: a seeded share of the modulated channels of every block is scaled by `factor`.

    Args:
        model: a float model with an adapter.
        factor: c, positive and finite; 1.0 changes nothing.
        share: fraction of the channels, in (0, 1]; at least one channel is taken.
        seed: which channels.

    Raises:
        UsageError: factor or share out of range.
    """
    if not (0 < factor < float("inf")) or not 0 < share <= 1:
        raise UsageError(
            f"outliers: found factor {factor} and share {share}, needed a positive finite factor and a share in "
            "(0, 1]. Fix: for example factor 10 and share 0.05"
        )
    adapter = adapter_for(model)
    if not adapter.modulated_groups(model):
        raise UsageError(
            f"outliers: found class {type(model).__name__}, needed a model whose modulated inputs can be scaled "
            "(DiTTransformer2DModel). Fix: choose a DiT model"
        )
    width_of = {site.input_group: matrix_shape(model.get_submodule(site.name))[0] for site in adapter.sites(model)}
    factors = {}
    for group in adapter.modulated_groups(model):
        width = width_of[group]
        chosen = random_stream(seed, f"outliers/{group}").permutation(width)[: max(1, round(share * width))]
        scaling = torch.ones(width)
        scaling[torch.from_numpy(chosen.copy())] = factor
        factors[group] = scaling
    adapter.scale_modulated_channels(model, factors)
    return model
