"""The hooks that diffusers calls while it loads and saves a model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from hqdit.errors import CheckpointError, UsageError
from hqdit.integrations.diffusers_config import HQDiTConfig
from hqdit.integrations.registration import register

if TYPE_CHECKING:
    from hqdit.integrations.arriving_weights import ArrivingWeights

# diffusers imports this module while it imports itself, before there are models: what needs them is imported in the
# methods.


class HQDiTQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Quantizes float weights as they are loaded, or loads weights that hqdit has quantized.

    Args:
        quantization_config: a request for float weights, a description for quantized ones.
        pre_quantized: whether the weights are quantized.

    Raises:
        UsageError: a description where a request is needed.
        CheckpointError: a request where a description is needed.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False

    def __init__(self, quantization_config: HQDiTConfig, **kwargs: Any) -> None:
        # A copy: the caller's config may serve several models, and each model gets a description of its own.
        # from_single_file does not say what the weights are.
        kwargs.setdefault("pre_quantized", quantization_config.description is not None)
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        if self.pre_quantized and quantization_config.description is None:
            raise CheckpointError(
                "config.json: found a quantization_config without the layers of the model, needed one of a quantized "
                "checkpoint. Fix: get the model again, or quantize it again"
            )
        if not self.pre_quantized and quantization_config.description is not None:
            raise UsageError(
                "quantization_config: found the description of a quantized checkpoint for float weights, needed a "
                "request. Fix: pass HQDiTConfig() with the settings that you want"
            )
        self._weights: ArrivingWeights | None = None
        #: Of the finished model; `save_pretrained` writes these and no others.
        self.tensor_names: frozenset[str] = frozenset()

    # What diffusers asks before it loads

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise `UsageError` for a device map that leaves weights on disk, past the quantizer."""
        device_map = kwargs.get("device_map")
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise UsageError(
                "device_map: found modules on disk, needed devices or cpu, because weights on disk are never "
                "quantized. Fix: leave more memory, or use enable_group_offload after loading"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype of the unquantized rest: as asked of diffusers, or `keep_dtype`.

        Raises:
            UsageError: both were asked for, and differ.
        """
        kept = self.quantization_config.request.keep_dtype
        if self.pre_quantized or kept is None:
            return torch_dtype
        keep_dtype: torch.dtype = getattr(torch, kept)
        if torch_dtype not in (None, keep_dtype):
            raise UsageError(
                f"keep_dtype: found {kept} and a load dtype of {torch_dtype}, needed one dtype for the unquantized "
                "rest. Fix: leave out one of the two"
            )
        return keep_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """Half a byte per number, for the planning of device maps."""
        from accelerate.utils import CustomDtype

        return CustomDtype.INT4

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """A tenth less: an input group is there in float32 while it is quantized."""
        return {key: value * 0.9 if isinstance(value, int) else value for key, value in max_memory.items()}  # type: ignore[misc]

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """What does not have half a byte per number: scales, and everything unquantized."""
        return self._started.special_dtypes(torch_dtype or torch.float32)

    def get_cuda_warm_up_factor(self) -> int:
        """An eighth of the elements in 16 bits is what 4-bit weights take at least."""
        return 8

    @property
    def supports_parallel_loading(self) -> bool:
        """Never: which float weights are there at once would depend on the threads."""
        return False

    # Loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any = None, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        from hqdit.integrations.attachment import announce
        from hqdit.integrations.load_quantized import QuantizedWeights
        from hqdit.integrations.quantize_on_load import FloatWeights
        from hqdit.models.source import set_time_frequencies

        set_time_frequencies(model, cast(Any, model).config, type(model).__name__)
        if self.pre_quantized:
            self._weights = QuantizedWeights(model, self.quantization_config.description, keep_in_fp32_modules or [])
        else:
            self._weights = FloatWeights(model, self.quantization_config.request, keep_in_fp32_modules or [])
        announce(model, self)

    @property
    def _started(self) -> ArrivingWeights:
        assert self._weights is not None  # diffusers has called _process_model_before_weight_loading
        return self._weights

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Nothing: a tensor that the files lack is an error, of which diffusers would only warn."""
        missing = sorted(set(missing_keys) - self._started.not_in_files)
        if missing:
            raise CheckpointError(
                f"{type(model).__name__}: found no {', '.join(missing[:5])} in the weight files ({len(missing)} "
                "missing), needed every tensor of the model. Fix: use the weights that belong to this config.json"
            )
        return []

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether the tensor comes to `create_quantized_param`, as all do, so that all are checked."""
        return True

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Raise `CheckpointError`: diffusers asks only where the shapes differ."""
        raise CheckpointError(
            f"{param_name}: found shape {tuple(loaded_param.shape)}, needed {tuple(current_param.shape)} as "
            "config.json says. Fix: use the weights that belong to this config.json"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Take one tensor; a layer appears with the last one that it needs, and the model is finished with the last.

        `param_value` has been cast to the load dtype, scales included; the tensor as stored is in `state_dict`.
        """
        if unexpected_keys:
            raise CheckpointError(
                f"{type(model).__name__}: found the unknown tensors {', '.join(sorted(unexpected_keys)[:5])} in the "
                f"weight files ({len(unexpected_keys)} in all), needed exactly those of the model. Fix: use the "
                "weights that belong to this config.json"
            )
        from hqdit.integrations.attachment import config_of

        self._started.take(param_name, state_dict[param_name], dtype, torch.device(target_device))
        if self._started.record is not None:
            self.quantization_config.description = config_of(model, self._started.record).description
            self.tensor_names = frozenset(model.state_dict())

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._started.require_complete()
        self._weights = None
        return model

    # Saving, and what the model can be used for

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that the files get: each once, none of them beside those of config.json.

        Raises:
            UsageError: a pickle is asked for, or the tensors are not those that were quantized.
        """
        from hqdit.integrations.model_tensors import without_aliases

        if not safe_serialization:
            raise UsageError(
                "save_pretrained: found safe_serialization=False, needed safetensors, because hqdit reads no pickles. "
                "Fix: leave it out"
            )
        other = sorted(self.tensor_names ^ state_dict.keys())
        if other:
            raise UsageError(
                f"save_pretrained: found layers changed since the model was quantized ({other[0]}), needed the model "
                "without adapters. Fix: save these with the pipeline's save_lora_weights, and take them off with "
                "unload_lora"
            )
        return without_aliases(state_dict, self.quantization_config.description["shared_tensors"]), {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        from hqdit.integrations.attachment import detach

        return detach(model)

    @property
    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Around the codes: adapters and unquantized layers get gradients, the codes do not change."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Also as one graph."""
        return True


register()
