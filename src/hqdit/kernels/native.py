"""The native backend: compiled CPU kernels, for what they cover; everything else as the torch backend does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hqdit.kernels import native_library, native_ops
from hqdit.kernels.activation import QuantizedActivation
from hqdit.kernels.backend import TorchBackend
from hqdit.kernels.linear import NO_EPILOGUE, Epilogue, PackedWeight
from hqdit.kernels.preparation import Front, InputPreparation, LayerNormModulate, Pointwise, in_parts


class NativeBackend(TorchBackend):
    """C++ kernels for 4-bit weights and int8 levels on CPUs.

    Layers with wider weights or levels beyond int8, attention in other dtypes than float32 and bfloat16 or with heads
    beyond 256, and tensors on other devices run as in the torch backend, which this class inherits from: they have no
    native kernel. That is a property of the layer and its device, not of the moment.
    """

    name = "native"

    @property
    def description(self) -> str:
        return f"{self.name} ({native_library.current_instruction_set()})"

    def unavailable_reason(self) -> str | None:
        return native_library.unavailable_reason()

    def quantize_input(
        self, x: Tensor, preparation: InputPreparation, front: Front = None, samples: int = 1
    ) -> QuantizedActivation:
        if preparation.tables is None or x.device.type != "cpu":
            return super().quantize_input(x, preparation, front, samples)
        if preparation.is_plain:
            return self._quantize_plain(x, preparation, front)
        return in_parts(x, preparation, front, samples, self._quantize_plain)

    def _quantize_plain(self, x: Tensor, preparation: InputPreparation, front: Front = None) -> QuantizedActivation:
        """One call of the kernel, for a plain preparation with tables."""
        tables = preparation.tables
        assert tables is not None  # the caller looked, and INT8 has them
        function = scale = shift = None
        eps = 0.0
        if isinstance(front, Pointwise):
            function = front.function
        elif isinstance(front, LayerNormModulate):
            scale, shift, eps = front.scale, front.shift, front.eps
        activation = preparation.activation
        # Granularity channel has no scale but the folded one: a static scale of 1.
        static = None if activation.has_dynamic_scale else preparation.static_scale
        if not activation.has_dynamic_scale and static is None:
            static = torch.ones(1)
        levels, token_scale = native_ops.rotate_quantize(
            _in_rows(x if x.dtype in native_ops.KERNEL_DTYPES else x.to(torch.float32)),
            # Where a part of the rotation is folded into the value projection, the signs are part of that part.
            None if preparation.rotation.is_folded else preparation.rotation_signs,
            tables.sylvester,
            tables.paley,
            tables.paley_matrix,
            tables.inner,
            tables.normalization,
            preparation.input_shift,
            preparation.input_scale,
            preparation.channel_scale,
            static,
            activation.scale_rule,
            activation.scale_factor,
            activation.has_short_scales,
            activation.group_size or x.shape[1],
            tables.thresholds,
            tables.rung_levels,
            function,
            scale,
            shift,
            eps,
        )
        return QuantizedActivation(levels, token_scale)

    def product(
        self,
        activation: QuantizedActivation,
        weights: Sequence[PackedWeight],
        epilogue: Epilogue = NO_EPILOGUE,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        has_kernel = (
            activation.levels.device.type == "cpu"
            and activation.levels.dtype in (torch.int8, torch.uint8)
            and epilogue.function != "silu"
            and (epilogue.gate is None) == (epilogue.residual is None)
        )
        tables = [weight.level_tables for weight in weights]
        if not has_kernel or any(table is None for table in tables):
            return super().product(activation, weights, epilogue, dtype)
        # Other dtypes are rounded from float32, which is what they mean: the residual is added in float32 as well.
        kernel_dtype = dtype if dtype in native_ops.KERNEL_DTYPES else torch.float32
        outputs: list[Tensor] = native_ops.product(
            activation.levels,
            activation.scale.contiguous(),
            [weight.packed for weight in weights],
            tables,
            [weight.format_index for weight in weights],
            [weight.scale.contiguous() for weight in weights],
            [None if weight.bias is None else weight.bias.to(torch.float32).contiguous() for weight in weights],
            epilogue.function,
            epilogue.gate,
            None if epilogue.residual is None else _in_rows(epilogue.residual.to(kernel_dtype)),
            kernel_dtype,
        )
        return [output.to(dtype) for output in outputs]

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        has_kernel = query.device.type == "cpu" and query.dtype in native_ops.KERNEL_DTYPES
        if not has_kernel or query.shape[-1] > native_ops.LARGEST_HEAD:
            return super().attention(query, key, value)
        result: Tensor = native_ops.attention(_in_rows(query), _in_rows(key), _in_rows(value))
        return result


def _in_rows(x: Tensor) -> Tensor:
    """`x` if each row lies in one piece, else a copy that does: a patch embedding may give a transposed view."""
    return x if x.stride(-1) == 1 else x.contiguous()
