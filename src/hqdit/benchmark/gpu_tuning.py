"""Measuring which tile is fastest for a product, for the file that `kernels.triton.tiles` reads."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from hqdit.benchmark.clock import Clock
from hqdit.benchmark.gpu_products import product_inputs
from hqdit.errors import reason_of
from hqdit.kernels.selection import BACKENDS
from hqdit.kernels.triton.library import device_name, does_not_fit
from hqdit.kernels.triton.tiles import ProductTile, candidates, tile_key, use_tile, write_tile

REPEATS = 20


@torch.inference_mode()
def tune(shapes: Sequence[tuple[int, int, int]], clock: Clock, tell: Callable[[str], None]) -> dict[str, ProductTile]:
    """The fastest tile of each shape (tokens, in_features, out_features) with a scale per channel; also in the file.

    A tile that a device cannot hold (too little shared memory) is told and left out.
    """
    chosen = {}
    for tokens, width, channels in shapes:
        *_, activation, packed = product_inputs(tokens, width, channels, clock.device)
        seconds: dict[ProductTile, float] = {}
        for tile in candidates(tokens, width):
            run = partial(BACKENDS["triton"].linear, activation, [packed], dtype=torch.bfloat16)
            with use_tile(tile):
                try:
                    run()
                except Exception as error:
                    if not does_not_fit(error):
                        raise
                    tell(f"{tokens}x{width}x{channels}: no {tile}: {reason_of(error)}")
                    continue
                seconds[tile] = statistics.median(clock.seconds(run, has_head_start=True) for _ in range(REPEATS))
        key = tile_key(device_name(clock.device), tokens, width, channels, 1)
        chosen[key] = min(seconds, key=lambda tile: seconds[tile])
        write_tile(key, chosen[key])
        tell(f"{key}: {chosen[key]}")
    return chosen
