"""The backend for GPUs: Triton kernels for what they cover; everything else as the torch backend does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from hqdit.errors import UsageError
from hqdit.kernels.activation import QuantizedActivation
from hqdit.kernels.backend import TorchBackend
from hqdit.kernels.linear import NO_EPILOGUE, Epilogue, PackedWeight
from hqdit.kernels.preparation import Front, InputPreparation, LayerNormModulate, Pointwise, in_parts
from hqdit.kernels.triton import library, product_operation, rotate_quantize_operation, tiles
from hqdit.quantizers.spec import ActivationSpec

#: What the kernels, or the operations around them, heed of an input's specification.
KNOWN_FIELDS = (
    "format",
    "granularity",
    "group_size",
    "smoothing",
    "scale_rule",
    "scale_factor",
    "scale_format",
    "centring",
    "emphasis",
)


class TritonBackend(TorchBackend):
    """Triton kernels for 4-bit weights and int8 levels on CUDA devices.

    Layers with wider weights or levels beyond int8, inputs too wide for one program, and attention run as in the torch
    backend, which this class inherits from: they have no kernel here. That is a property of the layer. Tensors on
    other devices are refused.
    """

    name = "triton"

    @property
    def description(self) -> str:
        return f"{self.name} (interpreted)" if library.is_interpreted() else self.name

    def unavailable_reason(self) -> str | None:
        return library.unavailable_reason()

    def quantize_input(
        self, x: Tensor, preparation: InputPreparation, front: Front = None, samples: int = 1
    ) -> QuantizedActivation:
        _require_known(preparation.activation)
        if preparation.is_plain:
            return self._quantize_plain(x, preparation, front)
        return in_parts(x, preparation, front, samples, self._quantize_plain)

    def _quantize_plain(self, x: Tensor, preparation: InputPreparation, front: Front = None) -> QuantizedActivation:
        """One call of the kernel where there is one; the preparation is plain."""
        tables, activation = preparation.tables, preparation.activation
        group_size = activation.group_size or x.shape[1]
        # Scales in 8 bits have no kernel here.
        if tables is None or activation.has_short_scales:
            return super().quantize_input(x, preparation, front)
        tile = tiles.token_tile(x.shape[1], tables.sylvester, tables.paley, tables.inner, group_size)
        if not tile.fits(library.shared_memory(x.device)):
            return super().quantize_input(x, preparation, front)
        function = scale = shift = None
        eps = 0.0
        if isinstance(front, Pointwise):
            function = front.function
        elif isinstance(front, LayerNormModulate):
            scale, shift, eps = _in_rows(front.scale), _in_rows(front.shift), front.eps
        is_dynamic = activation.granularity in ("token", "channel-token", "group")
        # Granularity channel has no scale but the folded one: a static scale of 1.
        static = None if is_dynamic else preparation.static_scale
        if not is_dynamic and static is None:
            static = torch.ones(1, device=x.device)
        levels, token_scale = rotate_quantize_operation.rotate_quantize(
            _in_rows(x if x.dtype in library.KERNEL_DTYPES else x.to(torch.float32)),
            # Where a part of the rotation is folded into the value projection, the signs are part of that part.
            None if preparation.rotation.is_folded else preparation.rotation_signs,
            tables.sylvester,
            tables.paley,
            tables.inner,
            tables.normalization,
            preparation.input_shift,
            preparation.input_scale,
            preparation.channel_scale,
            static,
            activation.scale_rule,
            activation.scale_factor,
            group_size,
            activation.format.name,
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
        has_kernel = activation.levels.dtype == torch.int8 and all(w.level_tables is not None for w in weights)
        if not has_kernel:
            return super().product(activation, weights, epilogue, dtype)
        # Other dtypes are rounded from float32, which is what they mean: the residual is added in float32 as well.
        kernel_dtype = dtype if dtype in library.KERNEL_DTYPES else torch.float32
        residual = None if epilogue.residual is None else _in_rows(epilogue.residual.to(kernel_dtype))
        outputs = [
            product_operation.product(
                _in_rows(activation.levels),
                activation.scale.contiguous(),
                weight.packed,
                [fmt.name for fmt in weight.formats],
                weight.format_index,
                weight.scale.contiguous(),
                None if weight.bias is None else weight.bias.to(torch.float32).contiguous(),
                epilogue.function,
                None if epilogue.gate is None else _in_rows(epilogue.gate),
                residual,
                kernel_dtype,
            )
            for weight in weights
        ]
        return [output.to(dtype) for output in outputs]


def _require_known(activation: ActivationSpec) -> None:
    """Raise UsageError if a layer asks for something that the kernels do not know, which they would leave out."""
    for field in fields(activation):
        found = getattr(activation, field.name)
        if field.name not in KNOWN_FIELDS and found != field.default:
            raise UsageError(
                f"--backend triton: found {field.name} {found!r} in the specification of a layer's input, needed one "
                f"that asks for {', '.join(KNOWN_FIELDS)} alone. Fix: choose another backend"
            )


def _in_rows(x: Tensor) -> Tensor:
    """`x` if each row lies in one piece, else a copy that does."""
    return x if x.stride(-1) == 1 else x.contiguous()
