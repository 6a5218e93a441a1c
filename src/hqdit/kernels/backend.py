"""What an implementation of the kernels has to do, and those that are composed of torch's operations.

The composed backends differ in the integer product alone; everything around it (rotation, rounding, scales) is the
same code, so that two of them give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hqdit.kernels.activation import QuantizedActivation, add_to_tokens
from hqdit.kernels.linear import NO_EPILOGUE, Epilogue, PackedWeight, apply_epilogue, low_bit_linear
from hqdit.kernels.preparation import Front, InputPreparation, prepare_input


class Backend(ABC):
    """An implementation of the kernels; its methods run on the device of the tensors that they get."""

    name: str

    @property
    def description(self) -> str:
        """The name, for records; with the instruction set where there are several."""
        return self.name

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run here, or None if it can."""

    @abstractmethod
    def quantize_input(
        self, x: Tensor, preparation: InputPreparation, front: Front = None, samples: int = 1
    ) -> QuantizedActivation:
        """Levels and scales of a layer's input; `preparation.prepare_input` is the definition.

        Args:
            x: floating point (tokens, in_features).
            preparation: the layer's wishes.
            front: a function that comes before.
            samples: how many samples the tokens are of, equally many each.
        """

    def linear(
        self,
        activation: QuantizedActivation,
        weights: Sequence[PackedWeight],
        epilogue: Epilogue = NO_EPILOGUE,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """One output for each weight that reads `activation`; `low_bit_linear`, `apply_epilogue` are the definition.

        Where means of samples were split off, their product is added to the output before the epilogue.

        Args:
            activation: levels (tokens, in_features).
            weights: of the same in_features and groups; with a gate or a residual, only one.
            epilogue: what follows the bias.
            dtype: of the outputs (tokens, out_features), floating point.
        """
        if activation.mean is None:
            return self.product(activation, weights, epilogue, dtype)
        of_means = self.product(activation.mean, [weight._replace(bias=None) for weight in weights])
        rest = activation._replace(mean=None)
        if epilogue.function is None and epilogue.gate is not None and epilogue.residual is not None:
            # Added to the residual, which is read anyway: r + g (y + m) = (r + g m) + g y.
            (of_mean,) = of_means
            residual = add_to_tokens(epilogue.residual.to(torch.float32), of_mean * epilogue.gate)
            (output,) = self.product(rest, weights, epilogue._replace(residual=residual))
            return [output.to(dtype)]
        outputs = self.product(rest, weights)
        return [
            apply_epilogue(add_to_tokens(output, of_mean), epilogue, dtype)
            for output, of_mean in zip(outputs, of_means, strict=True)
        ]

    @abstractmethod
    def product(
        self,
        activation: QuantizedActivation,
        weights: Sequence[PackedWeight],
        epilogue: Epilogue = NO_EPILOGUE,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """`linear` for an activation without means."""

    @abstractmethod
    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax(q k^T / sqrt(head_dim)) v, without a mask.

        Args:
            query: (batch, query tokens, heads, head_dim).
            key: (batch, key tokens, heads, head_dim).
            value: likewise.

        Returns:
            (batch, query tokens, heads, head_dim), contiguous.
        """


class ComposedBackend(Backend):
    """Separate passes of torch's operations around an exact integer product."""

    @abstractmethod
    def integer_product(self, activation: Tensor, weight: Tensor) -> Tensor:
        """A W^T, exactly.

        Args:
            activation: int8 (M, K), any strides.
            weight: int8 (N, K), any strides; K at least 2 and small enough for int32 sums.

        Returns:
            int32 (M, N).
        """

    def quantize_input(
        self, x: Tensor, preparation: InputPreparation, front: Front = None, samples: int = 1
    ) -> QuantizedActivation:
        return prepare_input(x, preparation, front, samples)

    def product(
        self,
        activation: QuantizedActivation,
        weights: Sequence[PackedWeight],
        epilogue: Epilogue = NO_EPILOGUE,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        return [
            apply_epilogue(low_bit_linear(activation, weight, self.integer_product), epilogue, dtype)
            for weight in weights
        ]

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        return mixed.transpose(1, 2).contiguous()


class ReferenceBackend(ComposedBackend):
    """The definition: a float64 product, exact because every sum stays far below 2^53."""

    name = "reference"

    def unavailable_reason(self) -> str | None:
        return None

    def integer_product(self, activation: Tensor, weight: Tensor) -> Tensor:
        return (activation.to(torch.float64) @ weight.to(torch.float64).T).to(torch.int32)


#: What cuBLAS asks of an int8 product: more than 16 rows, and K and N multiples of 8.
CUDA_MIN_ROWS, CUDA_MULTIPLE = 17, 8


class TorchBackend(ComposedBackend):
    """`torch._int_mm`: int8 with int32 sums, through oneDNN on CPUs and cuBLAS on CUDA devices."""

    name = "torch"

    def unavailable_reason(self) -> str | None:
        return None if hasattr(torch, "_int_mm") else f"torch {torch.__version__} has no torch._int_mm"

    def integer_product(self, activation: Tensor, weight: Tensor) -> Tensor:
        activation, weight = _row_major(activation), _row_major(weight)
        if activation.device.type == "cuda":
            return padded_int_mm(activation, weight, CUDA_MIN_ROWS, CUDA_MULTIPLE)
        return torch._int_mm(activation, weight.T)


def _row_major(matrix: Tensor) -> Tensor:
    """`matrix` itself if each row lies in one piece after the one before, else a copy that does.

    torch 2.13's `_int_mm` gives wrong numbers on CPUs for expanded operands and for the transpose of a single column,
    which `is_contiguous` calls contiguous.
    """
    is_regular = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if is_regular else matrix.clone(memory_format=torch.contiguous_format)


def padded_int_mm(activation: Tensor, weight: Tensor, min_rows: int, multiple: int) -> Tensor:
    """`torch._int_mm` on operands padded with zeros, which add nothing to an exact sum.

    Args:
        activation: int8 (M, K).
        weight: int8 (N, K).
        min_rows: smallest M that the device accepts.
        multiple: what K and N must be multiples of.

    Returns:
        int32 (M, N).
    """
    (rows, width), columns = activation.shape, weight.shape[0]
    pad_width, pad_columns = -width % multiple, -columns % multiple
    padded_activation = torch.nn.functional.pad(activation, (0, pad_width, 0, max(0, min_rows - rows)))
    padded_weight = torch.nn.functional.pad(weight, (0, pad_width, 0, pad_columns))
    return torch._int_mm(padded_activation, padded_weight.T)[:rows, :columns]
