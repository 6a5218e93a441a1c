"""How tokens and products are cut into tiles, whose sides are powers of two; and which tiles were measured fastest.

Tiles of a product change its speed and no bit of its result. Which one a product gets is a function of its shape, of
the device's name and of one file that `hqdit bench --device cuda --tune` writes; nothing is measured on the way.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hqdit.errors import CheckpointError, reason_of

#: The file of measured tiles, if not the one below the user's cache folder.
TILES_VARIABLE = "HQDIT_TRITON_TILES"
#: Numbers of one token in registers, padding included: 64 for each of the threads of the largest program.
LARGEST_TOKEN_TILE = 32768
#: Shared memory that the compiled kernels take to change the layout of a token: bytes a number, and besides.
SHARED_BYTES_PER_NUMBER, SHARED_BYTES_BESIDES = 8, 32768
#: Numbers of a token that one warp of 32 threads takes, and warps of a program (Hopper's tensor cores serve 4 at once).
TOKEN_NUMBERS_PER_WARP, FEWEST_WARPS, MOST_WARPS = 1024, 4, 16
#: The least depth of an int8 product on tensor cores.
LEAST_DEPTH = 32

_forced: ContextVar[ProductTile | None] = ContextVar("hqdit_triton_tile", default=None)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True)
class TokenTile:
    """A token as (rows, Paley order, inner) with padding; rows = blocks times Sylvester order.

    Attributes:
        used_rows: rows without padding.
        rows, paley, inner: padded sides.
        groups, group_size: padded sides of the same numbers by group.
    """

    used_rows: int
    rows: int
    paley: int
    inner: int
    groups: int
    group_size: int

    @property
    def numbers(self) -> int:
        """Of the larger of both views."""
        return max(self.rows * self.paley * self.inner, self.groups * self.group_size)

    @property
    def warps(self) -> int:
        """Of the program for one token."""
        return min(MOST_WARPS, max(FEWEST_WARPS, power_of_two(self.numbers // TOKEN_NUMBERS_PER_WARP)))

    def fits(self, shared_bytes: int) -> bool:
        """Whether one program can hold the token, on a device with this much shared memory for it."""
        needed = SHARED_BYTES_PER_NUMBER * self.numbers + SHARED_BYTES_BESIDES
        return self.numbers <= LARGEST_TOKEN_TILE and needed <= shared_bytes


def token_tile(width: int, sylvester: int, paley: int, inner: int, group_size: int) -> TokenTile:
    """The tile of a token of `width` channels under a transform of these factors, in groups of `group_size`."""
    used_rows = width // (paley * inner)
    rows = max(sylvester, power_of_two(used_rows))
    view = TokenTile(used_rows, rows, power_of_two(paley), power_of_two(inner), 1, 1)
    groups = width // group_size
    if groups == 1:  # the same view serves both
        return TokenTile(used_rows, rows, view.paley, view.inner, 1, rows * view.paley * view.inner)
    return TokenTile(used_rows, rows, view.paley, view.inner, power_of_two(groups), power_of_two(group_size))


@dataclass(frozen=True)
class ProductTile:
    """How one product is cut.

    Attributes:
        tokens, channels: sides of the output of one program.
        depth: input channels at a time.
        rows_together: rows of tiles that run side by side.
        warps, stages: of a program; how many loads run ahead.
    """

    tokens: int
    channels: int
    depth: int
    rows_together: int
    warps: int
    stages: int


def candidates(tokens: int, group_size: int) -> list[ProductTile]:
    """Tiles that are worth measuring, the default first."""
    deep = max(LEAST_DEPTH, min(128, power_of_two(group_size)))
    shallow = max(LEAST_DEPTH, deep // 2)
    if tokens <= 16:  # adaLN: the weight is read once, whatever the tile; many small programs keep memory busy
        sides = [(16, 32, 4), (16, 16, 2), (16, 64, 4), (16, 128, 4)]
    elif tokens <= 128:
        sides = [(64, 64, 4), (32, 64, 4), (64, 128, 4), (128, 64, 4)]
    else:
        sides = [(128, 128, 8), (128, 64, 4), (128, 256, 8), (256, 128, 8), (64, 128, 4), (64, 256, 8)]
    return [
        ProductTile(rows, columns, depth, 8, warps, stages)
        for rows, columns, warps in sides
        for depth in dict.fromkeys((deep, shallow))
        for stages in (3, 4)
    ]


def tile_key(device_name: str, tokens: int, width: int, channels: int, groups: int) -> str:
    """What a measured tile is found under; numbers of tokens share one up to the next power of two."""
    return f"{device_name}|{power_of_two(tokens)}x{width}x{channels}|{groups}"


def product_tile(device_name: str, tokens: int, width: int, channels: int, groups: int) -> ProductTile:
    """The tile of a product: the measured one if the file has it, else the first candidate.

    Raises:
        CheckpointError: the file is not one that `write_tile` wrote.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    measured = _read_tiles(tiles_path())
    found = measured.get(tile_key(device_name, tokens, width, channels, groups))
    return found or candidates(tokens, width // groups)[0]


@contextmanager
def use_tile(tile: ProductTile) -> Iterator[None]:
    """Run the body with this tile for every product, whatever was measured."""
    token = _forced.set(tile)
    try:
        yield
    finally:
        _forced.reset(token)


def tiles_path() -> Path:
    """The file of measured tiles."""
    named = os.environ.get(TILES_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hqdit" / "triton_tiles.json"


@functools.cache
def _read_tiles(path: Path) -> dict[str, ProductTile]:
    """Every measured tile, read once in a process, so that a product cannot change its tile on the way."""
    if not path.exists():
        return {}
    try:
        entries: dict[str, Any] = json.loads(path.read_text())
        return {key: _checked(key, entry) for key, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: found {reason_of(error)}, needed measured tiles as hqdit wrote them. Fix: remove the file, or "
            "measure again with hqdit bench --device cuda --tune"
        ) from error


def _checked(key: str, entry: Any) -> ProductTile:
    names = [field.name for field in fields(ProductTile)]
    if sorted(entry) != sorted(names) or any(type(side) is not int or side < 1 for side in entry.values()):
        raise ValueError(f"{entry} for {key}")
    tile = ProductTile(**entry)
    sides = (tile.tokens, tile.channels, tile.depth, tile.warps)
    if any(side != power_of_two(side) for side in sides) or tile.depth < LEAST_DEPTH or tile.tokens < 16:
        raise ValueError(f"{entry} for {key}")
    return tile


def write_tile(key: str, tile: ProductTile) -> None:
    """Add a measured tile to the file, which appears whole or not at all; processes that run keep what they read."""
    path = tiles_path()
    entries = {name: asdict(known) for name, known in _read_tiles(path).items()} | {key: asdict(tile)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(dict(sorted(entries.items())), file, indent=1)
    os.replace(file.name, path)
    _read_tiles.cache_clear()
