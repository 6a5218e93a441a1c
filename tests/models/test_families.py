"""Every family's table against a forward pass of a tiny model of its class, and the whole of quantization on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import TRANSFORMERS, TinyTransformer
from torch import Tensor, nn

import hqdit
from hqdit.calibration.capture import BlockStream
from hqdit.layers.linear import HQLinear
from hqdit.layers.matrix_layers import channels_last, is_matrix_layer
from hqdit.models.adapter import ROLES, LinearSite, adapter_for
from hqdit.models.calls import ModelCall
from hqdit.models.families import FAMILIES
from hqdit.models.families.family import FamilyAdapter
from hqdit.models.generic import GenericAdapter
from hqdit.numerics.error import sqnr_db
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.quantize import quantize
from hqdit.pipeline.rotation_check import TOLERANCE, rotation_error

# diffusers' own: a class that uses what another of its files deprecates, and one whose arithmetic is for accelerators.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]

DATA_FREE = QuantizationConfig(gptq=False)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=TRANSFORMERS)
def tiny(request: pytest.FixtureRequest) -> TinyTransformer:
    return TRANSFORMERS[request.param]


@dataclass(frozen=True)
class ListedCalls:
    """Calls from a list as calibration data."""

    listed: tuple[ModelCall, ...]
    origin: str = "a list"
    fingerprint: str = "0" * 64

    def __len__(self) -> int:
        return len(self.listed)

    def require_fits(self, model: nn.Module) -> None:
        pass

    def calls(self, model: nn.Module) -> Iterator[ModelCall]:
        return iter(self.listed)


def calls_of(tiny: TinyTransformer) -> ListedCalls:
    return ListedCalls((tiny.call(1), tiny.call(2)))


def inputs(model: nn.Module, call: ModelCall) -> list[tuple[str, Tensor]]:
    """(name, the very tensor that it reads) of each call of a matrix layer, in order."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, args, name=name: seen.append((name, args[0])))
        for name, module in model.named_modules()
        if is_matrix_layer(module)
    ]
    call.output(model)
    for handle in handles:
        handle.remove()
    return seen


def stages_of(model: nn.Module) -> list[list[LinearSite]]:
    """Sites that share an input, block after block and stage after stage."""
    groups: dict[tuple[int, int], list[LinearSite]] = {}
    for site in adapter_for(model).sites(model):
        groups.setdefault((site.block, site.stage), []).append(site)
    return [groups[key] for key in sorted(groups)]


def test_every_class_of_every_family_is_tried_and_none_is_in_two() -> None:
    classes = Counter(name for family in FAMILIES for name in family.classes)
    assert set(classes.values()) == {1}
    assert {tiny.class_name for tiny in TRANSFORMERS.values()} == set(classes)


def test_every_layer_of_a_block_is_a_site_with_a_role(tiny: TinyTransformer) -> None:
    model = tiny.model()
    adapter = adapter_for(model)
    assert isinstance(adapter, FamilyAdapter)
    sites = adapter.sites(model)
    names = {id(module): name for name, module in model.named_modules()}
    for index, block in enumerate(adapter.blocks(model)):
        inside = {names[id(module)] for module in block.modules() if is_matrix_layer(module)}
        assert inside == {site.name for site in sites if site.block == index}
    assert {site.role for site in sites} <= set(ROLES)
    assert set(adapter.kept_layers(model).values()) <= {"outside the repeated blocks"}
    assert len({site.name for site in sites}) == len(sites)


def test_sites_of_one_stage_and_no_others_read_one_tensor(tiny: TinyTransformer) -> None:
    model = tiny.model()
    read = dict(inputs(model, tiny.call()))
    for stage in stages_of(model):
        assert len({site.input_group for site in stage}) == 1
        assert all(read[site.name] is read[stage[0].name] for site in stage)
    for before, after in zip(stages_of(model), stages_of(model)[1:], strict=False):
        for first in before:
            same = [site.name for site in after if read[site.name] is read[first.name]]
            assert not same or first.block != after[0].block


def test_stages_are_in_the_order_in_which_they_run(tiny: TinyTransformer) -> None:
    model = tiny.model()
    order = {name: position for position, (name, _) in reversed(list(enumerate(inputs(model, tiny.call()))))}
    first_calls = [[order[site.name] for site in stage] for stage in stages_of(model)]
    for before, after in zip(first_calls, first_calls[1:], strict=False):
        assert max(before) < min(after)


def test_rotation_alone_leaves_the_output_unchanged(tiny: TinyTransformer) -> None:
    model = tiny.model()
    assert float(tiny.call().output(model).std()) > 0.1  # there is an output to change
    assert rotation_error(model, plan_quantization(model, DATA_FREE), 0, tiny.call()) <= TOLERANCE


def test_every_layer_is_quantized_without_data(tiny: TinyTransformer) -> None:
    require_quantized(tiny, DATA_FREE, None)


def test_every_layer_is_quantized_with_calibration_and_saved_bit_by_bit(tiny: TinyTransformer, tmp_path: Path) -> None:
    model = require_quantized(tiny, QuantizationConfig(), calls_of(tiny))
    hqdit.save(model, tmp_path / "model")
    assert torch.equal(tiny.call().output(hqdit.load(tmp_path / "model")), tiny.call().output(model))


def require_quantized(tiny: TinyTransformer, config: QuantizationConfig, calibration: ListedCalls | None) -> nn.Module:
    model = tiny.model()
    planned = {layer.site.name for layer in plan_quantization(model, config).layers}
    exact = tiny.call(3).output(model)
    quantize(model, config, calibration)
    assert {name for name, module in model.named_modules() if isinstance(module, HQLinear)} == planned
    assert planned == {site.name for site in adapter_for(model).sites(model)}
    found = tiny.call(3).output(model)
    assert bool(found.isfinite().all())
    assert sqnr_db(exact, found) > 6, sqnr_db(exact, found)
    methods = {facts["method"] for facts in model.quantization_record.layers.values()}  # type: ignore[union-attr]
    assert methods == {"nearest" if calibration is None else "gptq"}
    return model


def test_shared_inputs_are_rotated_once(tiny: TinyTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize(tiny.model(), DATA_FREE)
    asked: Counter[str] = Counter()
    original = HQLinear.quantize_input

    def counted(layer: HQLinear, *args: Any) -> Any:
        asked[layer.spec.name] += 1
        return original(layer, *args)

    monkeypatch.setattr(HQLinear, "quantize_input", counted)
    tiny.call().output(model)
    times = Counter(name for name, _ in inputs(tiny.model(), tiny.call()))
    assert asked.total() == sum(times[stage[0].name] for stage in stages_of(model))


def test_captured_inputs_are_those_of_a_plain_forward_pass(tiny: TinyTransformer) -> None:
    require_plain_inputs(tiny)


def require_plain_inputs(tiny: TinyTransformer) -> None:
    model = tiny.model()
    adapter = adapter_for(model)
    expected: dict[str, list[Tensor]] = {}
    for call in calls_of(tiny).listed:
        for name, x in inputs(model, call):
            x = channels_last(model.get_submodule(name), x)
            expected.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))
    stream = BlockStream(model, calls_of(tiny), seed=0)
    for block in range(len(adapter.blocks(model))):
        for site in adapter.sites(model):
            if site.block == block:
                for _ in range(2):  # nothing that a capture reads is changed by it
                    found: list[Tensor] = []
                    stream.capture(site, found.append, "test")
                    assert all(torch.equal(a, b) for a, b in zip(found, expected[site.name], strict=True))
        stream.advance(block)


def test_without_its_table_a_model_is_calibrated_on_the_same_inputs(
    tiny: TinyTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {site.name for site in adapter_for(tiny.model()).sites(tiny.model())}
    monkeypatch.setattr("hqdit.models.adapter._ADAPTERS", [])
    model = tiny.model()
    adapter = adapter_for(model)
    assert isinstance(adapter, GenericAdapter)
    found = {site.name for site in adapter.sites(model)}
    assert found >= known, sorted(known - found)
    require_plain_inputs(tiny)
    assert rotation_error(model, plan_quantization(model, DATA_FREE), 0, tiny.call()) <= TOLERANCE
