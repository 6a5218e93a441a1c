"""HQLinear: a linear layer with both operands quantized."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hqdit.formats.packed_layout import packed_row_bytes
from hqdit.kernels.activation import QuantizedActivation, quantize_activation
from hqdit.kernels.backend import current_backend
from hqdit.kernels.linear import PackedWeight, low_bit_linear
from hqdit.numerics.codes import pack_codes, unpack_codes
from hqdit.quantizers.quantized_tensor import QuantizedTensor
from hqdit.quantizers.spec import LinearSpec
from hqdit.transforms.rotation import rotate_online, unrotate

SIGNS_PER_BYTE = 8


def pack_signs(signs: Tensor) -> Tensor:
    """+-1 (n,) as bits, uint8 (ceil(n / 8),): bit i of byte j is set where element 8 j + i is -1."""
    bits = torch.nn.functional.pad((signs < 0).to(torch.uint8), (0, -len(signs) % SIGNS_PER_BYTE))
    weights = 2 ** torch.arange(SIGNS_PER_BYTE, dtype=torch.uint8, device=signs.device)
    return (bits.reshape(-1, SIGNS_PER_BYTE) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_signs`: float32 (count,)."""
    bits = (packed.unsqueeze(1) >> torch.arange(SIGNS_PER_BYTE, dtype=torch.uint8, device=packed.device)) & 1
    return 1.0 - 2.0 * bits.flatten()[:count].to(torch.float32)


class HQLinear(nn.Linear):
    """y = x W^T + b with x rotated and quantized on the fly and W held in packed codes.

    The weight was rotated once, offline, so rotating x leaves the product unchanged up to rounding:
    (x R)(W R)^T = x W^T because R R^T = I. Source: HQ-DiT (arXiv 2405.19751), section 3.

    It is a subclass of `nn.Linear` so that libraries which look for linear layers (peft, for one) find it; its
    `weight` is the packed tensor and cannot be assigned.

    Buffers, which are the checkpoint (docs/checkpoint.md):
        qweight: uint8 (out_features, in_features / 2) packed codes; (out_features, in_features) above 4 bits.
        weight_scale: float32 (1, 1), (out_features, 1) or (out_features, groups).
        format_index: uint8 (out_features,), only where every output channel chose its format.
        rotation_signs: uint8 (ceil(in_features / 8),), only where the input is rotated.
        channel_scale: float32 (in_features,), only for static per-channel activation scales.
        static_scale: float32 (1,), only for a static scale per tensor.
    Parameter:
        bias: (out_features,), if the layer had one.
    """

    qweight: Tensor
    weight_scale: Tensor
    format_index: Tensor | None
    rotation_signs: Tensor | None
    channel_scale: Tensor | None
    static_scale: Tensor | None

    def __init__(self, spec: LinearSpec, bias: bool = True, device: torch.device | str | None = None) -> None:
        """Empty buffers of the shapes that `spec` asks for; `from_quantized` or a state dict fills them."""
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a float weight
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features

        def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, wanted: bool = True) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if wanted else None)

        row_bytes = packed_row_bytes(spec.in_features, spec.weight.formats[0])
        add("qweight", (spec.out_features, row_bytes), torch.uint8)
        add("weight_scale", spec.weight.scale_shape(spec.out_features, spec.in_features), torch.float32)
        add("format_index", (spec.out_features,), torch.uint8, wanted=len(spec.weight.formats) > 1)
        sign_bytes = -(-spec.in_features // SIGNS_PER_BYTE)
        add("rotation_signs", (sign_bytes,), torch.uint8, wanted=not spec.rotation.is_identity)
        add("channel_scale", (spec.in_features,), torch.float32, wanted=spec.activation.has_channel_scale)
        add("static_scale", (1,), torch.float32, wanted=spec.activation.has_static_scale)
        empty_bias = nn.Parameter(torch.zeros(spec.out_features, device=device), requires_grad=False)
        self.register_parameter("bias", empty_bias if bias else None)

    @classmethod
    def from_quantized(
        cls,
        spec: LinearSpec,
        weight: QuantizedTensor,
        bias: Tensor | None,
        signs: Tensor | None = None,
        channel_scale: Tensor | None = None,
        static_scale: Tensor | None = None,
    ) -> HQLinear:
        """A layer that holds `weight`; the optional tensors must be given where `spec` asks for them.

        Raises:
            ValueError: a tensor is missing, not asked for, or of another shape or dtype than the class says.
        """
        layer = cls(spec, bias=bias is not None, device=weight.codes.device)
        buffers = {
            "qweight": pack_codes(weight.codes, spec.weight.formats[0]),
            "weight_scale": weight.scale,
            "format_index": weight.format_index,
            "rotation_signs": None if signs is None else pack_signs(signs),
            "channel_scale": channel_scale,
            "static_scale": static_scale,
        }
        for name, value in buffers.items():
            found, needed = (
                None if tensor is None else (tuple(tensor.shape), tensor.dtype)
                for tensor in (value, getattr(layer, name))
            )
            if found != needed:
                raise ValueError(f"{spec.name}: found {found} for {name}, needed {needed}")
            setattr(layer, name, value)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The packed codes: enough for code that asks a linear layer for its device."""
        return self.qweight

    @property
    def signs(self) -> Tensor | None:
        """The random signs of the rotation, float32 (in_features,), or None."""
        return None if self.rotation_signs is None else unpack_signs(self.rotation_signs, self.in_features)

    @property
    def storage_bytes(self) -> int:
        """Bytes of everything but the bias: codes, scales, format indices and signs."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def quantize_input(self, x: Tensor) -> QuantizedActivation:
        """Rotate and quantize: (..., in_features) -> levels (tokens, in_features) and scales."""
        tokens = x.reshape(-1, self.in_features).to(torch.float32)
        rotated = rotate_online(tokens, self.spec.rotation, self.signs)
        if self.channel_scale is not None:
            rotated = rotated / self.channel_scale
        return quantize_activation(rotated, self.spec.activation, self.static_scale)

    def forward_quantized(self, activation: QuantizedActivation) -> Tensor:
        """The product and the bias: float32 (tokens, out_features)."""
        weight = PackedWeight(self.qweight, self.weight_scale, self.format_index, self.spec.weight.formats)
        return low_bit_linear(activation, weight, self.bias, current_backend())

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in the dtype of `input`.

        A token that holds a NaN or an infinity gives NaN outputs.
        """
        output = self.forward_quantized(self.quantize_input(input))
        return output.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HQLinear:
        """Moving works as for any module, but `.to(dtype)` leaves the float32 scales as they are."""
        exact = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def shares_input_with(self, other: HQLinear) -> bool:
        """Whether both layers turn the same input into the same levels, so that it can be quantized once."""

        def equal(a: Tensor | None, b: Tensor | None) -> bool:
            return a is b or (a is not None and b is not None and torch.equal(a, b))

        return (
            self.spec.rotation == other.spec.rotation
            and self.spec.activation == other.spec.activation
            and equal(self.rotation_signs, other.rotation_signs)
            and equal(self.channel_scale, other.channel_scale)
            and equal(self.static_scale, other.static_scale)
        )

    def dequantized_weight(self) -> Tensor:
        """The float32 weight (out_features, in_features) in the basis of the unrotated input."""
        codes = torch.empty((self.out_features, self.in_features), dtype=torch.uint8, device=self.qweight.device)
        codes[:] = unpack_codes(self.qweight, self.spec.weight.formats[0])
        weight = QuantizedTensor(codes, self.weight_scale, self.format_index, self.spec.weight).dequantize()
        if self.channel_scale is not None:
            weight = weight / self.channel_scale
        return unrotate(weight, self.spec.rotation, self.signs)

    def extra_repr(self) -> str:
        """Shape, formats and rotation on one line."""
        formats = "/".join(fmt.name for fmt in self.spec.weight.formats)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={formats} per {self.spec.weight.granularity}, activation={self.spec.activation.format} per "
            f"{self.spec.activation.granularity}, rotation={self.spec.rotation.describe()}"
        )
