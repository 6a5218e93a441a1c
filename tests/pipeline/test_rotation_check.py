"""The proof that rotation alone changes nothing: it holds where it should, and it can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import latent_dit, require_complete, state_hash, tiny_dit
from torch import Tensor

from hqdit.errors import NumericsError
from hqdit.models.outliers import inject_outliers
from hqdit.pipeline import rotation_check
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.quantize import quantize
from hqdit.pipeline.rotation_check import (
    TOLERANCE,
    layer_rotation_error,
    probe_call,
    require_rotation_is_exact,
    rotation_error,
    signs_of,
)

ROTATIONS: dict[str, dict[str, Any]] = {
    "full": {"rotation": "full"},
    "folded": {"rotation": "full", "fold_value_rotation": True},
    "block:36": {"rotation": "block:36"},
    "block:4": {"rotation": "block:4"},
    "part": {"rotation": "full", "include": ("*.1.*", "*to_k"), "exclude": ("*.1.*to_v",)},
}


def planned(model: Any, **values: Any) -> Any:
    return plan_quantization(model, QuantizationConfig(**values))


def error_of(model: Any, plan: Any, seed: int) -> float:
    call = probe_call(model, seed, "rotation check")
    assert call is not None
    return rotation_error(model, plan, seed, call)


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize(
    "build",
    [tiny_dit, latent_dit, lambda: tiny_dit(attention_bias=False), lambda: inject_outliers(tiny_dit(), 100.0)],
    ids=["pixels", "learned sigma", "no attention bias", "outliers"],
)
def test_rotation_is_exact(name: str, build: Any) -> None:
    model = build()
    before = state_hash(model)
    for seed in range(3):
        error = error_of(model, planned(model, **ROTATIONS[name]), seed)
        assert 0 < error <= TOLERANCE == 1e-5  # something was rotated, and nothing changed
    assert state_hash(model) == before
    assert all(not module._forward_hooks for module in model.modules())


def test_no_rotation_no_error() -> None:
    # Weights go through float64 and back, the product is the same: not a bit changes.
    assert error_of(tiny_dit(), planned(tiny_dit(), rotation="none"), 0) == 0.0


@pytest.mark.parametrize(
    "victim", ["norm1.linear", "attn1.to_q", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
)
def test_one_wrong_sign_is_found(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_dit()
    linear = model.get_submodule(f"transformer_blocks.1.{victim}")
    original = rotation_check.rotate
    wrong_calls = 0

    def rotate(weight: Tensor, spec: Any, signs: Tensor | None) -> Tensor:
        nonlocal wrong_calls
        if weight.shape == linear.weight.shape and torch.equal(weight, linear.weight.double()):
            assert signs is not None
            signs = signs.clone()
            signs[3] *= -1
            wrong_calls += 1
        return original(weight, spec, signs)

    monkeypatch.setattr(rotation_check, "rotate", rotate)
    plan = planned(model, rotation="full")
    error = error_of(model, plan, 0)
    assert wrong_calls == 1
    assert error > 10 * TOLERANCE
    with pytest.raises(NumericsError) as info:
        require_rotation_is_exact(model, plan, 0)
    assert info.value.exit_code == 4
    require_complete(info.value, "rotation check", f"{error:.2e}", "1e-05")


@pytest.mark.parametrize("sabotage", ["no online rotation", "rotated twice", "no fold"])
def test_missing_and_double_rotations_are_found(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    online = rotation_check.rotate_online
    if sabotage == "no online rotation":
        monkeypatch.setattr(rotation_check, "rotate_online", lambda x, _spec, _signs: x)
    elif sabotage == "rotated twice":
        monkeypatch.setattr(rotation_check, "rotate_online", lambda x, *how: online(online(x, *how), *how))
    else:
        monkeypatch.setattr(rotation_check, "fold_into_value", lambda weight, bias, *_: (weight, bias))
    assert error_of(tiny_dit(), planned(tiny_dit(), rotation="full", fold_value_rotation=True), 0) > 0.01


def test_quantize_stops_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dit()
    monkeypatch.setattr(rotation_check, "rotate_online", lambda x, _spec, _signs: x)
    with pytest.raises(NumericsError, match="rotation check"):
        quantize(model, QuantizationConfig(gptq=False))
    assert state_hash(model) == state_hash(tiny_dit())
    assert not hasattr(model, "quantization_record")


def test_not_a_number_does_not_pass() -> None:
    model = tiny_dit()
    model.transformer_blocks[0].ff.net[2].weight.data[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="change of (nan|inf)"):
        require_rotation_is_exact(model, planned(model, rotation="full"), 0)


def test_signs_are_shared_by_a_group_and_differ_between_groups() -> None:
    layers = planned(tiny_dit(), rotation="full").layers
    signs = {layer.site.name: signs_of(layer, 5) for layer in layers}
    by_group: dict[str, set[tuple[float, ...]]] = {}
    for layer in layers:
        found = signs[layer.site.name]
        assert found is not None and found.shape == (layer.in_features,) and set(found.tolist()) == {-1.0, 1.0}
        by_group.setdefault(layer.site.input_group, set()).add(tuple(found.tolist()))
    assert all(len(found) == 1 for found in by_group.values())
    assert len(set.union(*by_group.values())) == len(by_group) == 10
    other = signs_of(layers[0], 6)
    assert other is not None and not torch.equal(other, signs[layers[0].site.name])
    assert signs_of(planned(tiny_dit(), rotation="none").layers[0], 5) is None


def test_layers_by_themselves() -> None:
    # What is checked where no inputs of the model are at hand.
    model = tiny_dit()
    error = layer_rotation_error(model, planned(model), 0)
    assert 0 < error <= TOLERANCE
    assert layer_rotation_error(model, planned(model, rotation="none"), 0) < 1e-6


def test_a_wrong_rotation_of_one_layer_is_found_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dit()
    original = rotation_check.rotate
    broken = model.transformer_blocks[1].ff.net[2].weight

    def rotate(x: Tensor, *args: Any) -> Tensor:
        y = original(x, *args)
        return y.roll(1, dims=-1) if x.shape == broken.shape else y

    monkeypatch.setattr(rotation_check, "rotate", rotate)
    assert layer_rotation_error(model, planned(model), 0) > 0.1
