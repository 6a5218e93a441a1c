"""HQLinear: a linear layer with both operands quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hqdit.errors import UsageError
from hqdit.formats.packed_layout import packed_row_bytes
from hqdit.kernels.activation import MEAN_SPEC, QuantizedActivation
from hqdit.kernels.linear import PackedWeight, packed_level_tables
from hqdit.kernels.preparation import Front, InputPreparation, input_tables
from hqdit.kernels.selection import current_backend
from hqdit.layers.straight_through import StraightThrough
from hqdit.numerics.codes import pack_codes, unpack_codes
from hqdit.quantizers.emphasis import EMPHASIS_DTYPE, emphasise
from hqdit.quantizers.low_rank import BRANCH_DTYPE
from hqdit.quantizers.quantized_tensor import QuantizedTensor
from hqdit.quantizers.short_scales import SHORT_DTYPE, UNIT_DTYPE, merge_scales, split_scales
from hqdit.quantizers.spec import SHIFT_DTYPE, LinearSpec
from hqdit.transforms.rotation import SIGNS_PER_BYTE, pack_signs, rotate_folded, unpack_signs, unrotate

if TYPE_CHECKING:
    from hqdit.layers.shared_input import SharedInput


class HQLinear(nn.Linear):
    """y = x W^T + b with x rotated and quantized on the fly and W held in packed codes.

    The weight was rotated once, offline, so rotating x leaves the product unchanged up to rounding:
    (x R)(W R)^T = x W^T because R R^T = I. Source: HQ-DiT (arXiv 2405.19751), section 3.

    With a low-rank branch the codes stand for what the branch leaves of W, and y = Q(x) Q(R)^T + (x D^T) U^T + b with
    D and U in 16 bits. The branch reads the input as the layer gets it, before it is smoothed, rotated or rounded.
    Source: SVDQuant (arXiv 2411.05007), section 4.

    It is a subclass of `nn.Linear` so that libraries which look for linear layers (peft, for one) find it; its
    `weight` is the packed tensor and cannot be assigned.

    Buffers, which are the checkpoint (docs/checkpoint.md):
        qweight: uint8 (out_features, in_features / 2) packed codes; (out_features, in_features) above 4 bits.
        weight_scale: float32 (1, 1), (out_features, 1) or (out_features, groups); float8_e4m3fn (out_features, groups)
            where scales are kept in 8 bits.
        weight_scale_unit: bfloat16 (out_features, 1), only where they are: a scale is its E4M3 number times this.
        format_index: uint8 (out_features,), only where every output channel chose its format.
        rotation_signs: uint8 (ceil(in_features / 8),), only where the input is rotated.
        channel_scale: float32 (in_features,), only for static per-channel activation scales.
        static_scale: float32 (1,), only for a static scale per tensor.
        input_scale: float32 (in_features,), only where the input is smoothed: the factors, applied before the rotation
            by this layer or, where its specification says "folded", by the layers before it.
        input_shift: bfloat16 (in_features,), only for a centred input: what is subtracted from the input as the layer
            gets it; the bias holds the product of the weight with it.
        emphasis: bfloat16 (rank, in_features), B of `quantizers.emphasis`, only where directions are emphasised.
        low_rank_down: bfloat16 (rank, in_features), D, only with a low-rank branch.
        low_rank_up: bfloat16 (out_features, rank), U, likewise.
    Parameter:
        bias: (out_features,), if the layer had one.
    """

    qweight: Tensor
    weight_scale: Tensor
    weight_scale_unit: Tensor | None
    format_index: Tensor | None
    rotation_signs: Tensor | None
    channel_scale: Tensor | None
    static_scale: Tensor | None
    input_scale: Tensor | None
    input_shift: Tensor | None
    emphasis: Tensor | None
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None

    def __init__(self, spec: LinearSpec, bias: bool = True, device: torch.device | str | None = None) -> None:
        """Empty buffers of the shapes that `spec` asks for; `from_quantized` or a state dict fills them."""
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a float weight
        self.spec = spec
        #: Set by `layers.shared_input.share_input` where other layers read the same input.
        self.shared_input: SharedInput | None = None
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self._input_tables = input_tables(spec.activation, spec.rotation)
        self._mean_tables = input_tables(MEAN_SPEC, spec.rotation) if spec.activation.centring == "sample" else None
        self._level_tables = packed_level_tables(spec.weight.formats)

        def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, wanted: bool = True) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if wanted else None)

        row_bytes = packed_row_bytes(spec.in_features, spec.weight.formats[0])
        add("qweight", (spec.out_features, row_bytes), torch.uint8)
        is_short = spec.weight.has_short_scales
        scale_shape = spec.weight.scale_shape(spec.out_features, spec.in_features)
        add("weight_scale", scale_shape, SHORT_DTYPE if is_short else torch.float32)
        add("weight_scale_unit", (spec.out_features, 1), UNIT_DTYPE, wanted=is_short)
        add("format_index", (spec.out_features,), torch.uint8, wanted=len(spec.weight.formats) > 1)
        sign_bytes = -(-spec.in_features // SIGNS_PER_BYTE)
        add("rotation_signs", (sign_bytes,), torch.uint8, wanted=not spec.rotation.is_identity)
        add("channel_scale", (spec.in_features,), torch.float32, wanted=spec.activation.has_channel_scale)
        add("static_scale", (1,), torch.float32, wanted=spec.activation.has_static_scale)
        add("input_scale", (spec.in_features,), torch.float32, wanted=spec.activation.smoothing != "none")
        add("input_shift", (spec.in_features,), SHIFT_DTYPE, wanted=spec.activation.centring != "none")
        directions = spec.activation.emphasis
        add("emphasis", (directions, spec.in_features), EMPHASIS_DTYPE, wanted=directions > 0)
        rank = spec.weight.low_rank
        add("low_rank_down", (rank, spec.in_features), BRANCH_DTYPE, wanted=rank > 0)
        add("low_rank_up", (spec.out_features, rank), BRANCH_DTYPE, wanted=rank > 0)
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
        input_scale: Tensor | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
        input_shift: Tensor | None = None,
        emphasis: Tensor | None = None,
    ) -> HQLinear:
        """A layer that holds `weight`; the optional tensors must be given where `spec` asks for them.

        `branch` is the pair (low_rank_down, low_rank_up).

        Raises:
            ValueError: a tensor is missing, not asked for, or of another shape or dtype than the class says; or the
                spec keeps scales in 8 bits and those of `weight` are none (`quantizers.quantized_tensor`).
        """
        layer = cls(spec, bias=bias is not None, device=weight.codes.device)
        scale, unit = split_scales(weight.scale) if spec.weight.has_short_scales else (weight.scale, None)
        if unit is not None and not torch.equal(merge_scales(scale, unit), weight.scale):
            raise ValueError(f"{spec.name}: found scales beyond 8 bits, needed what storable_scales gives")
        buffers = {
            "qweight": pack_codes(weight.codes, spec.weight.formats[0]),
            "weight_scale": scale,
            "weight_scale_unit": unit,
            "format_index": weight.format_index,
            "rotation_signs": None if signs is None else pack_signs(signs),
            "channel_scale": channel_scale,
            "static_scale": static_scale,
            "input_scale": input_scale,
            "input_shift": input_shift,
            "emphasis": emphasis,
            "low_rank_down": None if branch is None else branch[0],
            "low_rank_up": None if branch is None else branch[1],
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
        """Bytes of everything but the bias: codes, scales, format indices, signs and the low-rank branch."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def preparation(self) -> InputPreparation:
        """What the layer does to its input."""
        return InputPreparation(
            self.spec.activation,
            self.spec.rotation,
            self._input_tables,
            self.rotation_signs,
            self.channel_scale,
            self.static_scale,
            input_shift=None if self.input_shift is None else self.input_shift.to(torch.float32),
            input_scale=self.input_scale if self.spec.activation.smoothing == "applied" else None,
            emphasis=self.emphasis,
            mean_tables=self._mean_tables,
        )

    @property
    def is_fusible(self) -> bool:
        """Whether the quantized input is all that the layer needs, so that a fused operation may stand for it."""
        return self.low_rank_down is None

    @property
    def effective_scale(self) -> Tensor:
        """The weight's scales as they are multiplied with, float32, shape of `weight_scale`: number = level * this."""
        if self.weight_scale_unit is None:
            return self.weight_scale
        return merge_scales(self.weight_scale, self.weight_scale_unit)

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight and the bias as the kernels take them."""
        formats, tables = self.spec.weight.formats, self._level_tables
        return PackedWeight(self.qweight, self.effective_scale, self.format_index, formats, tables, self.bias)

    def quantize_input(self, x: Tensor, front: Front = None) -> QuantizedActivation:
        """Front, rotation and rounding: (..., in_features) -> levels (tokens, in_features) and scales.

        The first axis counts samples, whose means a layer may split off; tokens alone, (tokens, in_features), are one.
        """
        samples = x.shape[0] if x.dim() > 2 else 1
        return current_backend().quantize_input(x.reshape(-1, self.in_features), self.preparation, front, samples)

    def forward_quantized(self, activation: QuantizedActivation, dtype: torch.dtype = torch.float32) -> Tensor:
        """The product and the bias, without a low-rank branch: (tokens, out_features) in `dtype`."""
        return current_backend().linear(activation, [self.packed_weight], dtype=dtype)[0]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in the dtype of `input`.

        A token that holds a NaN or an infinity gives NaN outputs, and so do, where the means of samples are split off,
        all tokens of its sample. Where a gradient is asked for it is the
        straight-through one (`layers.straight_through.StraightThrough`).
        """
        if torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            output: Tensor = StraightThrough.apply(input, self.bias, self)  # type: ignore[no-untyped-call]
            return output
        return self.forward_without_gradient(input)

    def forward_without_gradient(self, input: Tensor) -> Tensor:
        """`forward` for a caller that needs no gradient or sees to it."""
        shared = self.shared_input
        activation = self.quantize_input(input) if shared is None else shared.quantized(self, input)
        if self.low_rank_down is None or self.low_rank_up is None:
            output = self.forward_quantized(activation, input.dtype)
        else:
            down, up = self.low_rank_down.to(torch.float32), self.low_rank_up.to(torch.float32)
            branch = (input.reshape(-1, self.in_features).to(torch.float32) @ down.T) @ up.T
            output = (self.forward_quantized(activation) + branch).to(input.dtype)
        return output.reshape(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HQLinear:
        """Moving works as for any module, but `.to(dtype)` leaves the scales and the branch as they are.

        Raises:
            UsageError: a dtype of 8 bits, which would spoil the bias.
        """
        dtype = fn(self.weight_scale.new_empty(0, dtype=torch.float32)).dtype
        if dtype.itemsize < 2:
            raise UsageError(
                f"{self.spec.name}: found a cast of a quantized layer to {dtype}, needed at least 16 bits for its "
                "bias. Fix: leave out layerwise casting; the weights take 4 bits already"
            )
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
            and equal(self.input_scale, other.input_scale)
            and equal(self.input_shift, other.input_shift)
            and equal(self.emphasis, other.emphasis)
        )

    def delivered(self, x: Tensor) -> Tensor:
        """The float layer's input as the layers before this one deliver it: smoothed and rotated as far as is folded.

        Args:
            x: floating point (..., in_features), of the float model.
        """
        if self.spec.activation.smoothing == "folded" and self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        if self.spec.rotation.is_folded and self.signs is not None:
            x = rotate_folded(x, self.spec.rotation, self.signs)
        return x

    def delivered_weight(self) -> Tensor:
        """The float32 weight (out_features, in_features) that acts on the input as this layer gets it.

        It differs from `dequantized_weight` where layers before this one deliver another input than the float model's.
        """
        weight = self.dequantized_weight()
        # With x' = x diag(a) R, as in `delivered`, x W^T = x' (W diag(1 / a) R)^T.
        if self.spec.activation.smoothing == "folded" and self.input_scale is not None:
            weight = weight / self.input_scale
        if self.spec.rotation.is_folded and self.signs is not None:
            weight = rotate_folded(weight, self.spec.rotation, self.signs)
        return weight

    def delivered_bias(self) -> Tensor | None:
        """The bias that goes with `delivered_weight`, float32 (out_features,) where the input is centred."""
        if self.bias is None or self.input_shift is None:
            return self.bias
        # The branch reads the input with its mean: only what the codes stand for was given the rest.
        weight = self.delivered_weight()
        if self.low_rank_down is not None and self.low_rank_up is not None:
            weight = weight - self.low_rank_up.to(torch.float32) @ self.low_rank_down.to(torch.float32)
        return self.bias.to(torch.float32) - weight @ self.input_shift.to(torch.float32)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight (out_features, in_features) that stands for the float layer's, branch included.

        It belongs to the input before it was rotated or smoothed, by whichever layer.
        """
        codes = torch.empty((self.out_features, self.in_features), dtype=torch.uint8, device=self.qweight.device)
        codes[:] = unpack_codes(self.qweight, self.spec.weight.formats[0])
        weight = QuantizedTensor(codes, self.effective_scale, self.format_index, self.spec.weight).dequantize()
        if self.channel_scale is not None:
            weight = weight / self.channel_scale
        weight = unrotate(weight, self.spec.rotation, self.signs)
        if self.emphasis is not None:  # x T W'^T = x (W' T)^T, because T is symmetric
            weight = emphasise(weight, self.emphasis)
        if self.low_rank_down is None or self.low_rank_up is None:
            return weight if self.input_scale is None else weight * self.input_scale
        branch = self.low_rank_up.to(torch.float32) @ self.low_rank_down.to(torch.float32)
        if self.input_scale is None:
            return weight + branch
        # The branch reads the delivered input: smoothed already where that is folded, plain where it is not.
        is_folded = self.spec.activation.smoothing == "folded"
        return (weight + branch) * self.input_scale if is_folded else weight * self.input_scale + branch

    def extra_repr(self) -> str:
        """Shape, formats and rotation on one line."""
        formats = "/".join(fmt.name for fmt in self.spec.weight.formats)
        rank = f" + rank {self.spec.weight.low_rank}" if self.spec.weight.low_rank else ""
        weight_scales, scales = (
            f" with {side.scale_format} scales" if side.has_short_scales else ""
            for side in (self.spec.weight, self.spec.activation)
        )
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={formats} per {self.spec.weight.granularity}{weight_scales}{rank}, "
            f"activation={self.spec.activation.format} per {self.spec.activation.granularity}{scales}, "
            f"rotation={self.spec.rotation.describe()}"
        )
