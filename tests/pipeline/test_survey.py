"""A survey says what plain hooks on the float model see."""

from __future__ import annotations

import torch
from tiny import calibration, tiny_dit
from torch import Tensor

from hqdit.calibration.capture import MODULATION_PAIRS
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.survey import SAMPLE_TOKENS, TokenSample, survey_inputs


@torch.no_grad()
def test_statistics_are_those_of_all_tokens() -> None:
    model, data = tiny_dit(), calibration()
    seen: dict[str, list[Tensor]] = {"qkv": [], "fc2": []}
    block = model.transformer_blocks[1]
    handles = [
        layer.register_forward_pre_hook(
            lambda _m, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, layer in (("qkv", block.attn1.to_q), ("fc2", block.ff.net[2]))
    ]
    for call in data.calls(model):
        call(model)
    for handle in handles:
        handle.remove()
    surveys = survey_inputs(model, plan_quantization(model, QuantizationConfig()), data, 0)
    assert len(surveys) == 2 * 5
    for name, batches in seen.items():
        x, survey = torch.cat(batches).double(), surveys[f"transformer_blocks.1.{name}"]
        assert torch.equal(survey.absmax, x.abs().amax(dim=0))
        assert torch.allclose(survey.mean, x.mean(dim=0), rtol=1e-9, atol=1e-9)
        assert torch.allclose(survey.rms, x.square().mean(dim=0).sqrt(), rtol=1e-9)
        rows = {tuple(row) for row in x.float().tolist()}
        assert len(survey.sample) == min(SAMPLE_TOKENS, len(x))
        assert all(tuple(row) in rows for row in survey.sample.tolist())
        # Samples of 4 tokens each, whose mean goes with each of them.
        by_sample = x.float().reshape(-1, 4, x.shape[1])
        rest = {tuple(t): r for s in by_sample for t, r in zip(s.tolist(), s - s.mean(dim=0), strict=True)}
        expected = torch.stack([rest[tuple(row)] for row in survey.sample.tolist()])
        assert survey.has_samples and torch.allclose(survey.rest, expected, rtol=0, atol=1e-5)
    modulation = surveys["transformer_blocks.0.modulation"]
    assert modulation.sample.shape == (min(SAMPLE_TOKENS, MODULATION_PAIRS), 72)
    assert not modulation.has_samples


def test_a_sample_does_not_depend_on_batches_and_repeats_no_token() -> None:
    x = torch.arange(100.0).unsqueeze(1)
    whole, parts = TokenSample(10, 0, "test"), TokenSample(10, 0, "test")
    whole.add(x)
    for batch in x.split(7):
        parts.add(batch)
    assert torch.equal(whole.tokens(1), parts.tokens(1))
    assert len(set(whole.tokens(1).flatten().tolist())) == 10
    few = TokenSample(10, 0, "test")
    few.add(x[:3])
    assert sorted(few.tokens(1).flatten().tolist()) == [0.0, 1.0, 2.0]
    assert TokenSample(10, 0, "test").tokens(4).shape == (0, 4)
