"""Sizes from shapes, and the converted model against the original's forward pass, written out from the paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_dit import State, original_forward, original_state
from tiny import require_complete
from torch import Tensor

from hqdit.errors import CheckpointError
from hqdit.models.original_dit import (
    OriginalSizes,
    expected_shapes,
    read_sizes,
    require_positions,
    to_diffusers,
)
from hqdit.models.source import TIME_FREQUENCY_SHIFT, ModelFolder, build_skeleton

WHERE = Path("file.pt")
HEADS = 4


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(CheckpointError) as info:
        call()
    assert info.value.exit_code == 3
    require_complete(info.value, "file.pt", *parts)


def converted(state: State, heads: int = HEADS, **changes: Any) -> Any:
    """diffusers' model with the weights of `state`."""
    sizes = read_sizes(state, WHERE, heads)
    model = build_skeleton(ModelFolder(WHERE, WHERE, {**sizes.transformer_config(), **changes}))
    model.load_state_dict(to_diffusers(state, sizes))
    return model


def inputs(size: int = 8, channels: int = 4, classes: int = 5) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)
    return {
        "latents": torch.randn(6, channels, size, size, generator=random),
        "timesteps": torch.tensor([0, 1, 37, 250, 731, 999]),
        "classes": torch.arange(6) % (classes + 1),
    }


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(given["latents"], timestep=given["timesteps"], class_labels=given["classes"]).sample
    assert isinstance(output, Tensor)
    return output


def as_double(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


# --- the function


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch": 4},
        {"patch": 8},
        {"out_channels": 4},
        {"size": 16, "blocks": 1},
        {"channels": 3, "out_channels": 6},
        {"width": 96, "classes": 1},
    ],
    ids=str,
)
def test_the_converted_model_computes_what_the_original_does(changes: dict[str, int]) -> None:
    state = original_state(**changes)
    given = inputs(changes.get("size", 8), changes.get("channels", 4), changes.get("classes", 5))
    expected = original_forward(as_double(state), **as_double(given), heads=HEADS)
    found = run(converted(state), given)
    assert found.shape == expected.shape
    # float32 against float64: angles of the time step up to 999 with float32 frequencies, 999 / e 2^-24 = 2e-5 radians,
    # and some dozen products of rounding 2^-24 each.
    assert relative(found.double(), expected) < 2e-4


def test_the_converted_model_in_double_precision() -> None:
    """At time step 0 no angle is rounded, so that nothing but the order of float64 sums is left."""
    state, given = original_state(), inputs()
    given["timesteps"] = torch.zeros(6).long()
    expected = original_forward(as_double(state), **as_double(given), heads=HEADS)
    model = converted(state).double()
    assert relative(run(model, as_double(given)), expected) < 1e-12
    # Any other epsilon of the LayerNorms is seen, and diffusers' default is another one.
    other = original_forward(as_double(state), **as_double(given), heads=HEADS, eps=1e-5)
    assert relative(other, expected) > 1e-6
    assert relative(run(converted(state, norm_eps=1e-5).double(), as_double(given)), expected) > 1e-6


def test_the_time_step_has_the_frequencies_of_the_original() -> None:
    state, given = original_state(), inputs()
    expected = original_forward(as_double(state), **as_double(given), heads=HEADS)
    as_diffusers = converted(state, **{TIME_FREQUENCY_SHIFT: 1})
    found = run(as_diffusers, given).double()
    assert relative(found, expected) > 0.1
    assert relative(found, original_forward(as_double(state), **as_double(given), heads=HEADS, frequencies=127)) < 2e-4


def test_every_tensor_of_the_original_matters() -> None:
    state, given = original_state(), inputs()
    expected = run(converted(state), given)
    assert len(state) == 2 * (3 + 2 + 5 * 2) + 2
    for name in state.keys() - {"pos_embed"}:
        changed = {**state, name: state[name] + 0.1 * torch.rand(state[name].shape)}
        assert not torch.allclose(run(converted(changed), given), expected, atol=1e-4), name


def test_blocks_do_not_share_memory() -> None:
    """Else they could not be written to one file; slices of q, k and v are views that do not overlap."""
    sizes = read_sizes(state := original_state(), WHERE, HEADS)
    found = to_diffusers(state, sizes)
    tables = [found[f"transformer_blocks.{index}.norm1.emb.class_embedder.embedding_table.weight"] for index in (0, 1)]
    assert torch.equal(*tables) and tables[0].data_ptr() != tables[1].data_ptr()


# --- sizes


#: Model -> parameters in millions: DiT's table 1 and appendix, at patch size 2 (8 and 4 differ by the patches alone).
PAPER = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}


@pytest.mark.parametrize("pixels", [256, 512])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("letters", PAPER)
def test_published_models(letters: str, patch: int, pixels: int) -> None:
    width, blocks, heads, millions = PAPER[letters]
    sizes = OriginalSizes(width, blocks, heads, patch, 4, 8, pixels // 8, 1000)
    shapes = expected_shapes(sizes)
    assert read_sizes(shapes, WHERE) == sizes
    assert sizes.name == f"DiT-{letters}/{patch}"
    count = sum(tensor.numel() for name, tensor in shapes.items() if name != "pos_embed")
    assert count / 1e6 == pytest.approx(millions, abs=1.0)
    config = sizes.transformer_config()
    assert (config["num_layers"], config["num_attention_heads"], config["attention_head_dim"]) == (
        blocks,
        heads,
        width // heads,
    )
    assert (config["sample_size"], config["num_embeds_ada_norm"], config["out_channels"]) == (pixels // 8, 1000, 8)


def test_shapes_of_the_largest_published_model() -> None:
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in expected_shapes(OriginalSizes(1152, 28, 16, 2, 4, 8, 32, 1000)).items()
    }
    assert len(shapes) == 2 * (3 + 2 + 5 * 28) + 2
    for name, shape in {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "blocks.27.attn.qkv.weight": (3456, 1152),
        "blocks.0.mlp.fc1.bias": (4608,),
        "blocks.27.adaLN_modulation.1.weight": (6912, 1152),
        "final_layer.linear.weight": (32, 1152),
    }.items():
        assert shapes[name] == shape


def test_a_small_state_dict_has_the_expected_shapes() -> None:
    state = original_state()
    sizes = read_sizes(state, WHERE, HEADS)
    assert sizes == OriginalSizes(48, 2, 4, 2, 4, 8, 8, 5)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in expected_shapes(sizes).items()
    }
    assert "width 48" in sizes.name and "4 heads" in sizes.name
    assert replace(sizes, width=384, blocks=12, heads=6).name == "DiT-S/2"
    assert replace(sizes, width=384, blocks=11, heads=6).name != "DiT-S/2"


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight"])
def test_no_dit(name: str) -> None:
    state = original_state()
    del state[name]
    refused(lambda: read_sizes(state, WHERE, HEADS), name)
    refused(lambda: read_sizes({**state, name: torch.zeros(3)}, WHERE, HEADS), name, "dimensions")
    refused(lambda: read_sizes({"weight": torch.zeros(1)}, WHERE), "x_embedder.proj.weight", "weight")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x_embedder.proj.weight", (48, 4, 2, 3)),
        ("x_embedder.proj.weight", (48, 4, 0, 0)),
        ("x_embedder.proj.weight", (0, 4, 2, 2)),
        ("pos_embed", (1, 17, 48)),
        ("pos_embed", (1, 0, 48)),
        ("final_layer.linear.weight", (33, 48)),
        ("final_layer.linear.weight", (0, 48)),
        ("y_embedder.embedding_table.weight", (1, 48)),
    ],
)
def test_contradictory_shapes(name: str, shape: tuple[int, ...]) -> None:
    refused(lambda: read_sizes({**original_state(), name: torch.zeros(shape)}, WHERE, HEADS), "square")


@pytest.mark.parametrize("heads", [None, 0, -1, 5])
def test_heads_that_nobody_can_know(heads: int | None) -> None:
    refused(lambda: read_sizes(original_state(), WHERE, heads), "width 48", "--heads")


def test_positions_of_another_model() -> None:
    computed = original_state()["pos_embed"]
    require_positions(computed + 5e-3, computed, WHERE)
    require_positions(computed.half(), computed, WHERE)
    swapped = computed.reshape(1, 4, 4, 48).transpose(1, 2).reshape(1, 16, 48)
    noise = torch.randn(computed.shape, generator=torch.Generator().manual_seed(0))
    for stored in (swapped, computed + 0.02, noise, torch.full_like(computed, math.nan)):
        refused(lambda stored=stored: require_positions(stored, computed, WHERE), "pos_embed")


# --- the key in config.json


@pytest.mark.parametrize("shift", [2, -1, 0.5, "0", None, True])
def test_frequencies_that_no_model_has(shift: object) -> None:
    config = {**read_sizes(original_state(), WHERE, HEADS).transformer_config(), TIME_FREQUENCY_SHIFT: shift}
    refused(
        lambda: build_skeleton(ModelFolder(WHERE, WHERE, config)),
        TIME_FREQUENCY_SHIFT,
        "0 or 1 for a DiTTransformer2DModel",
    )


def test_frequencies_of_another_architecture() -> None:
    config = {"_class_name": "PixArtTransformer2DModel", "num_layers": 1, TIME_FREQUENCY_SHIFT: 0}
    refused(lambda: build_skeleton(ModelFolder(WHERE, WHERE, config), is_empty=True), "PixArt", "for a DiT")
