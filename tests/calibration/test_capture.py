"""Captured inputs are those of a plain forward pass, block after block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BLOCKS, CLASSES, WIDTH, inputs_of, predicted, random_calibration, state_hash, tiny_dit
from torch import Tensor, nn

from hqdit.calibration.capture import MODULATION_PAIRS, BlockStream
from hqdit.calibration.samples import CALL_SIZE, CalibrationSet
from hqdit.errors import NumericsError
from hqdit.models.adapter import LinearSite, adapter_for

SAMPLES = CALL_SIZE + 7  # a whole batch and a part of one


def sites_of(model: nn.Module, block: int) -> list[LinearSite]:
    return [site for site in adapter_for(model).sites(model) if site.block == block]


def captured(stream: BlockStream, site: LinearSite) -> list[Tensor]:
    batches: list[Tensor] = []
    stream.capture(site, lambda x: batches.append(x.clone()), "test")
    return batches


def plain_inputs(model: nn.Module, calibration: CalibrationSet) -> dict[str, list[Tensor]]:
    """Name -> inputs of every site, batch after batch, of the whole model's forward pass."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for site in adapter_for(model).sites(model):

        def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = site.name) -> None:
            seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())

        handles.append(model.get_submodule(site.name).register_forward_pre_hook(hook))
    for start in range(0, len(calibration), CALL_SIZE):
        rows = slice(start, start + CALL_SIZE)
        predicted(
            model,
            latents=calibration.latents[rows],
            timesteps=calibration.timesteps[rows],
            classes=calibration.classes[rows],
        )
    for handle in handles:
        handle.remove()
    return seen


def test_inputs_are_those_of_a_plain_forward_pass() -> None:
    model = tiny_dit()
    calibration = random_calibration(model, SAMPLES)
    expected = plain_inputs(model, calibration)
    before = state_hash(model)
    stream = BlockStream(model, calibration, seed=0)
    for block in range(BLOCKS):
        for site in sites_of(model, block):
            if not site.is_modulation:
                found = captured(stream, site)
                assert [len(x) for x in found] == [CALL_SIZE * 4, (SAMPLES - CALL_SIZE) * 4]  # 4 tokens a sample
                assert all(torch.equal(a, b) for a, b in zip(found, expected[site.name], strict=True))
                again = captured(stream, site)
                assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        stream.advance(block)
    assert state_hash(model) == before


def test_advance_runs_the_block_as_it_is_now() -> None:
    model: Any = tiny_dit()
    calibration = random_calibration(model, 10)
    site = sites_of(model, 1)[1]
    unchanged = plain_inputs(model, calibration)[site.name][0]
    stream = BlockStream(model, calibration, seed=0)
    replacement = nn.Linear(4 * WIDTH, WIDTH).requires_grad_(False)  # stands for a quantized layer
    model.transformer_blocks[0].ff.net[2] = replacement
    stream.advance(0)
    found = captured(stream, site)[0]
    assert torch.equal(found, plain_inputs(model, calibration)[site.name][0])
    assert not torch.equal(found, unchanged)


def test_later_stages_see_earlier_layers_as_they_are_now() -> None:
    model: Any = tiny_dit()
    calibration = random_calibration(model, 10)
    stream = BlockStream(model, calibration, seed=0)
    fc2 = sites_of(model, 0)[-1]
    before = captured(stream, fc2)[0]
    model.transformer_blocks[0].attn1.to_v.weight.data *= 1.5
    after = captured(stream, fc2)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, plain_inputs(model, calibration)[fc2.name][0])


def test_modulation_sees_many_pairs() -> None:
    model = tiny_dit()
    stream = BlockStream(model, random_calibration(model, 3), seed=0)
    for block in range(BLOCKS):
        site = sites_of(model, block)[0]
        found = torch.cat(captured(stream, site))
        assert found.shape == (MODULATION_PAIRS, WIDTH) and MODULATION_PAIRS >= 8192
        assert not found.requires_grad
        assert len({tuple(row) for row in found[:64].tolist()}) > 60
        # Far more vectors than channels: the Hessian has full rank, which 3 samples alone could not give it.
        assert int(torch.linalg.matrix_rank(found.double().T @ found.double())) == WIDTH


def test_modulation_pairs_cover_time_steps_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dit()
    asked: list[tuple[int, int]] = []
    adapter = adapter_for(model)
    original = type(adapter).modulation_input

    def recorded(self: Any, model: nn.Module, block: int, timesteps: Tensor, classes: Tensor) -> Tensor:
        asked.extend(zip(timesteps.tolist(), classes.tolist(), strict=True))
        return original(self, model, block, timesteps, classes)

    monkeypatch.setattr(type(adapter), "modulation_input", recorded)
    for seed in (0, 0, 1):
        captured(BlockStream(model, random_calibration(model, 3), seed), sites_of(model, 1)[0])
    first, again, other = (asked[i * MODULATION_PAIRS : (i + 1) * MODULATION_PAIRS] for i in range(3))
    assert first == again != other
    timesteps, classes = {t for t, _ in first}, {c for _, c in first}
    assert classes == set(range(CLASSES + 1))
    assert timesteps <= set(range(1000))
    # 8192 draws from 1000 miss a given one with probability e^-8.2: 0.3 misses are expected, 10 never happen.
    assert len(timesteps) > 990


def test_modulation_input_does_not_depend_on_the_calibration_data() -> None:
    model = tiny_dit()
    site = sites_of(model, 0)[0]
    few, many = (BlockStream(model, random_calibration(model, n), seed=4) for n in (2, 70))
    assert all(torch.equal(a, b) for a, b in zip(captured(few, site), captured(many, site), strict=True))


def test_an_error_in_the_consumer_comes_through_and_leaves_no_hook() -> None:
    model = tiny_dit()
    stream = BlockStream(model, random_calibration(model, 3), seed=0)
    site = sites_of(model, 0)[1]
    expected = predicted(model)

    def broken(_x: Tensor) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        stream.capture(site, broken, "test")
    assert torch.equal(predicted(model), expected)
    assert len(captured(stream, site)) == 1
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_data_that_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(NumericsError, match="latents"):
        BlockStream(tiny_dit(), random_calibration(tiny_dit(in_channels=3), 3), seed=0)
    wrong = inputs_of(tiny_dit(), 3)
    wrong["classes"][1] = 99
    with pytest.raises(NumericsError, match="sample 1"):
        BlockStream(tiny_dit(), CalibrationSet(**wrong), seed=0)


def test_samples_are_counted_where_they_have_tokens() -> None:
    model = tiny_dit()
    stream = BlockStream(model, random_calibration(model, SAMPLES), seed=0)
    counts: dict[str, list[tuple[int, int | None]]] = {}
    for site in sites_of(model, 0):
        seen = counts.setdefault(site.name.removeprefix("transformer_blocks.0."), [])
        stream.capture_samples(site, lambda x, samples, seen=seen: seen.append((len(x), samples)), "test")
    assert counts["attn1.to_q"] == counts["ff.net.2"] == [(4 * CALL_SIZE, CALL_SIZE), (4 * 7, 7)]
    assert {samples for _, samples in counts["norm1.linear"]} == {None}
