"""Injected outliers: really there, and without effect on the function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import BLOCKS, WIDTH, inputs_of, predicted, require_complete, state_hash, tiny_dit
from torch import Tensor, nn

from hqdit.errors import UsageError
from hqdit.models.adapter import adapter_for
from hqdit.models.outliers import DEFAULT_SHARE, inject_outliers
from hqdit.numerics.error import relative_error

READERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj")
CHOSEN = round(DEFAULT_SHARE * WIDTH)  # 4 of 72 channels


def modulated_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Reader -> what it reads, float64 (tokens, width)."""
    seen: dict[str, Tensor] = {}
    handles = []
    for block in range(BLOCKS):
        for reader in READERS:
            name = f"transformer_blocks.{block}.{reader}"

            def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = args[0].reshape(-1, WIDTH).double()

            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    predicted(model, **double_inputs(model))
    for handle in handles:
        handle.remove()
    return seen


def double_inputs(model: Any) -> dict[str, Tensor]:
    fields = inputs_of(model)
    return {**fields, "latents": fields["latents"].to(model.dtype)}


def scaled_channels(model: Any, factor: float, **options: Any) -> dict[str, set[int]]:
    """Reader -> channels that `inject_outliers` scales, measured in float64; every other one must stay."""
    model = copy.deepcopy(model).double()
    before = modulated_inputs(model)
    after = modulated_inputs(inject_outliers(model, factor, **options))
    found = {}
    for name, x in before.items():
        # Both passes differ by rounding in float64 only; 1e-9 is a million times that.
        ratio = after[name].norm(dim=0) / x.norm(dim=0)
        is_scaled = (ratio - factor).abs() < 1e-9 * factor
        assert bool((is_scaled | ((ratio - 1).abs() < 1e-9)).all())
        torch.testing.assert_close(after[name][:, is_scaled], factor * x[:, is_scaled], rtol=1e-9, atol=1e-9)
        found[name] = {int(channel) for channel in is_scaled.nonzero()}
    return found


@pytest.mark.parametrize("factor", [0.125, 10.0, 30.0, 100.0])
def test_share_of_the_channels_is_scaled(factor: float) -> None:
    channels = scaled_channels(tiny_dit(), factor)
    assert all(len(chosen) == CHOSEN for chosen in channels.values())
    for block in range(BLOCKS):
        q, k, v, fc1 = (channels[f"transformer_blocks.{block}.{reader}"] for reader in READERS)
        assert q == k == v
        assert fc1 != q
    assert channels["transformer_blocks.0.attn1.to_q"] != channels["transformer_blocks.1.attn1.to_q"]


@pytest.mark.parametrize(("share", "count"), [(1e-9, 1), (0.01, 1), (0.5, 36), (1.0, 72)])
def test_share(share: float, count: int) -> None:
    assert {len(chosen) for chosen in scaled_channels(tiny_dit(), 8.0, share=share).values()} == {count}


def test_choice_depends_on_the_seed_only() -> None:
    first = scaled_channels(tiny_dit(), 10.0, seed=1)
    assert scaled_channels(tiny_dit(seed=7), 100.0, seed=1) == first
    assert scaled_channels(tiny_dit(), 10.0, seed=2) != first
    assert state_hash(inject_outliers(tiny_dit(), 10.0, seed=1)) == state_hash(
        inject_outliers(tiny_dit(), 10.0, seed=1)
    )


@pytest.mark.parametrize("factor", [2.0**-7, 10.0, 100.0])
@pytest.mark.parametrize("share", [DEFAULT_SHARE, 1.0])
def test_function_stays(factor: float, share: float) -> None:
    # The change is an identity up to rounding. In float64 only rounding is left; what it is in float32 follows from
    # the ratio of the two units in the last place, 2^29, and must stay within the rotation check's 1e-5. (Factors
    # that float32 holds exactly, because the scaling itself is float32.)
    model = tiny_dit()
    exact = predicted(model)
    double = copy.deepcopy(model).double()
    error64 = relative_error(
        predicted(double, **double_inputs(double)),
        predicted(inject_outliers(copy.deepcopy(double), factor, share), **double_inputs(double)),
    )
    assert error64 < 1e-5 * 2.0**-29
    error32 = relative_error(exact, predicted(inject_outliers(model, factor, share)))
    assert error32 < 1e-5
    assert error32 > 0  # something was done


def test_factor_one_changes_nothing() -> None:
    assert state_hash(inject_outliers(tiny_dit(), 1.0)) == state_hash(tiny_dit())


def test_only_modulation_and_its_readers_change() -> None:
    before, after = tiny_dit().state_dict(), inject_outliers(tiny_dit(), 10.0).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        f"transformer_blocks.{block}.{tensor}"
        for block in range(BLOCKS)
        for tensor in ["norm1.linear.weight", "norm1.linear.bias", *(f"{reader}.weight" for reader in READERS)]
    }
    assert changed == expected


def test_returns_the_model_itself() -> None:
    model = tiny_dit()
    assert inject_outliers(model, 2.0) is model


def test_partial_factors_leave_other_groups_alone() -> None:
    model = tiny_dit()
    adapter = adapter_for(model)
    assert adapter.modulated_groups(model) == [
        f"transformer_blocks.{block}.{group}" for block in range(BLOCKS) for group in ("qkv", "fc1")
    ]
    adapter.scale_modulated_channels(model, {"transformer_blocks.1.fc1": torch.full((WIDTH,), 4.0)})
    before = tiny_dit().state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {f"transformer_blocks.1.{n}" for n in ("norm1.linear.weight", "norm1.linear.bias")} | {
        "transformer_blocks.1.ff.net.0.proj.weight"
    }
    assert relative_error(predicted(tiny_dit()), predicted(model)) < 1e-5


@pytest.mark.parametrize(
    ("factor", "share"),
    [(0.0, 0.05), (-1.0, 0.05), (float("inf"), 0.05), (float("nan"), 0.05)]
    + [(10.0, 0.0), (10.0, -0.1), (10.0, 1.01), (10.0, float("nan")), (10.0, float("inf"))],
)
def test_refused_options_change_nothing(factor: float, share: float) -> None:
    model = tiny_dit()
    with pytest.raises(UsageError) as info:
        inject_outliers(model, factor, share)
    assert info.value.exit_code == 2
    require_complete(info.value, str(factor), str(share))
    assert state_hash(model) == state_hash(tiny_dit())
