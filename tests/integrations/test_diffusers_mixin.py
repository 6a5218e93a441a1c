"""diffusers' own tests of quantization backends, run on this one, on the CPU, with tiny local models.

They are not in diffusers' package: set HQDIT_DIFFUSERS_TESTS to a checkout of its repository. docs/diffusers.md lists
what cannot pass, with the reason.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import DIT, DTYPE, FLUX, SD3, WAN, SmallModel

import hqdit
from hqdit.layers.linear import HQLinear

CHECKOUT = os.environ.get("HQDIT_DIFFUSERS_TESTS")
if not CHECKOUT:
    pytest.skip("HQDIT_DIFFUSERS_TESTS names no checkout of diffusers", allow_module_level=True)


def _mixins() -> Any:
    os.environ["DIFFUSERS_TEST_DEVICE"] = "cpu"
    sys.path.insert(0, CHECKOUT)
    # Its tests run on accelerators only unless this mark is taken away before they are imported.
    importlib.import_module("tests.testing_utils").require_accelerator = lambda test: test
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' tests import its deprecated modules
        return importlib.import_module("tests.models.testing_utils.quantization")


mixins = _mixins()
# What diffusers' tests do may warn; only that they pass counts here.
pytestmark = pytest.mark.filterwarnings("default")
PARAMETERS = "packed codes are buffers, and a parameter holds two of them in a byte"
EMBEDDERS = "embedders and final layers stay float by default"


class Backend(mixins.QuantizationTesterMixin, mixins.QuantizationCompileTesterMixin):  # type: ignore[misc, name-defined]
    """The tests that a backend opts into, each with an empty config: the default request."""

    small: SmallModel
    sharded_serialization_config: dict[str, Any] = {}

    @pytest.fixture(autouse=True)
    def _saved(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        torch.compiler.reset()
        self.model_class = self.small.model_class
        self.pretrained_model_name_or_path = str(self.small.save(tmp_path_factory.mktemp("float")))

    def get_dummy_inputs(self) -> dict[str, torch.Tensor]:
        return self.small.inputs()

    def _create_quantized_model(self, config_kwargs: dict[str, Any], **extra: Any) -> Any:
        config_kwargs = dict(config_kwargs)
        names = config_kwargs.pop("modules_to_not_convert", [])
        config = hqdit.HQDiTConfig(exclude=[f"*{name}*" for name in names], **config_kwargs)
        extra = {"quantization_config": config, DTYPE: torch.float32, **extra}
        return self.model_class.from_pretrained(self.pretrained_model_name_or_path, **extra)

    def _verify_if_layer_quantized(self, name: str, module: torch.nn.Module, config_kwargs: dict[str, Any]) -> None:
        assert isinstance(module, HQLinear)

    @pytest.mark.xfail(strict=True, reason=PARAMETERS, raises=AssertionError)
    def test_num_parameters(self) -> None:
        self._test_quantization_num_parameters({})

    def test_memory_footprint(self) -> None:
        self._test_quantization_memory_footprint({})

    def test_inference(self) -> None:
        self._test_quantization_inference({})

    def test_dtype_assignment(self) -> None:
        self._test_quantization_dtype_assignment({})

    def test_lora_inference(self) -> None:
        self._test_quantization_lora_inference({})

    def test_serialization(self, tmp_path: Path) -> None:
        self._test_quantization_serialization({}, tmp_path)

    def test_config_serialization(self) -> None:
        self._test_quantization_config_serialization({})

    def test_original_dtype(self) -> None:
        self._test_original_dtype({})

    @pytest.mark.xfail(strict=True, reason=EMBEDDERS, raises=AssertionError)
    def test_quantized_layers(self) -> None:
        self._test_quantized_layers({})

    def test_keep_modules_in_fp32(self) -> None:
        self._test_keep_modules_in_fp32({})

    def test_modules_to_not_convert(self) -> None:
        self._test_quantization_modules_to_not_convert({}, ["to_q", "to_out"])

    def test_device_map(self) -> None:
        if not getattr(self.model_class, "_no_split_modules", None):
            pytest.skip(f"{self.model_class.__name__} has no _no_split_modules, which device_map='auto' needs")
        self._test_quantization_device_map({})

    def test_cpu_device_map(self) -> None:
        self._test_quantization_cpu_device_map({})

    def test_dequantize(self) -> None:
        self._test_dequantize({})

    def test_training(self) -> None:
        self._test_quantization_training({})

    def test_torch_compile(self) -> None:
        self._test_torch_compile({})

    def test_torch_compile_with_group_offload(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("group offloading needs an accelerator to load groups onto")
        self._test_torch_compile_with_group_offload({})


class TestDiT(Backend):
    small = DIT


class TestSD3(Backend):
    small = SD3


class TestFlux(Backend):
    small = FLUX


class TestWan(Backend):
    small = WAN
