"""Tiles: sides of powers of two that hold everything, and a choice that only its file can change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqdit.errors import CheckpointError
from hqdit.kernels.triton import tiles
from hqdit.kernels.triton.tiles import ProductTile, candidates, product_tile, tile_key, token_tile, write_tile


@pytest.fixture(autouse=True)
def tiles_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "tiles.json"
    monkeypatch.setenv(tiles.TILES_VARIABLE, str(path))
    return path


@pytest.mark.parametrize(("number", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (36, 64), (1025, 2048)])
def test_powers_of_two(number: int, expected: int) -> None:
    assert tiles.power_of_two(number) == expected


@given(st.integers(0, 6), st.sampled_from([1, 12, 20, 36]), st.integers(1, 80), st.integers(1, 5))
def test_token_tiles_hold_their_token(log: int, paley: int, inner: int, blocks: int) -> None:
    width = blocks * 2**log * paley * inner
    for group_size in (width, paley * inner):
        tile = token_tile(width, 2**log, paley, inner, group_size)
        assert tile.used_rows * paley * inner == width
        assert tile.rows % 2**log == 0
        assert tile.rows >= tile.used_rows
        assert tile.paley >= paley
        assert tile.inner >= inner
        groups = width // group_size
        assert tile.groups >= groups
        assert tile.group_size >= group_size
        for side in (tile.rows, tile.paley, tile.inner, tile.groups, tile.group_size, tile.warps):
            assert side & (side - 1) == 0


def test_layers_of_known_models_fit_into_a_program() -> None:
    # Shared memory of a program: 99 KiB on Ada, 163 on A100, 227 on Hopper.
    ada, ampere, hopper = (kib * 1024 for kib in (99, 163, 227))
    dit, flux = token_tile(4608, 128, 36, 1, 4608), token_tile(12288, 1024, 12, 1, 12288)
    assert [dit.fits(limit) for limit in (ada, ampere, hopper)] == [True, True, True]
    assert [flux.fits(limit) for limit in (ada, ampere, hopper)] == [False, True, True]
    assert not token_tile(1 << 16, 1 << 16, 1, 1, 1 << 16).fits(1 << 30)


def test_choice_is_the_first_candidate_or_what_the_file_says(tiles_file: Path) -> None:
    shape = ("a GPU", 500, 1152, 4608, 1)
    assert product_tile(*shape) == candidates(500, 1152)[0]
    measured = ProductTile(64, 32, 64, 4, 8, 2)
    write_tile(tile_key(*shape), measured)
    assert product_tile(*shape) == measured
    assert product_tile("a GPU", 512, 1152, 4608, 1) == measured  # up to the next power of two
    others = [("a GPU", 513, 1152, 4608, 1), ("another", 500, 1152, 4608, 1), ("a GPU", 500, 1152, 4608, 9)]
    assert measured not in [product_tile(*other) for other in others]
    second = ProductTile(32, 32, 32, 8, 4, 3)
    write_tile(tile_key(*others[0]), second)
    assert [product_tile(*shape), product_tile(*others[0])] == [measured, second]
    assert [path.name for path in tiles_file.parent.iterdir()] == ["tiles.json"]


def test_a_process_keeps_what_it_read(tiles_file: Path) -> None:
    shape = ("a GPU", 500, 1152, 4608, 1)
    write_tile(tile_key(*shape), ProductTile(64, 32, 64, 4, 8, 2))
    before = product_tile(*shape)
    tiles_file.write_text("{}")
    assert product_tile(*shape) == before


@pytest.mark.parametrize(
    "text",
    [
        "no json", "[]", '{"a": 3}', '{"a": {"tokens": 64}}',
        json.dumps({"a": {"tokens": 64, "channels": 48, "depth": 64, "rows_together": 8, "warps": 4, "stages": 3}}),
        json.dumps({"a": {"tokens": 64, "channels": 64, "depth": 16, "rows_together": 8, "warps": 4, "stages": 3}}),
        json.dumps({"a": {"tokens": 64, "channels": 64, "depth": 64, "rows_together": 0, "warps": 4, "stages": 3}}),
        json.dumps({"a": {"tokens": 64, "channels": 64, "depth": 64, "rows_together": True, "warps": 4, "stages": 3}}),
    ],
)  # fmt: skip
def test_file_that_is_not_one_is_refused(tiles_file: Path, text: str) -> None:
    tiles_file.parent.mkdir()
    tiles_file.write_text(text)
    with pytest.raises(CheckpointError, match=r"tiles.json: found .*, needed measured tiles .* Fix: "):
        product_tile("a GPU", 500, 1152, 4608, 1)


def test_place_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(tiles.TILES_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiles.tiles_path() == tmp_path / "hqdit" / "triton_tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tiles.tiles_path() == Path.home() / ".cache" / "hqdit" / "triton_tiles.json"


@pytest.mark.parametrize("tokens", [1, 16, 17, 128, 129, 100_000])
@pytest.mark.parametrize("group_size", [4, 36, 64, 1152])
def test_candidates_can_be_compiled(tokens: int, group_size: int) -> None:
    found = candidates(tokens, group_size)
    assert len(set(found)) == len(found) > 1
    for tile in found:
        for side in (tile.tokens, tile.channels, tile.depth, tile.warps):
            assert side & (side - 1) == 0
        assert tile.depth >= tiles.LEAST_DEPTH
