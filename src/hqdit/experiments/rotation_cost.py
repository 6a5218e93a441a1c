"""What rotations cost: operations by the plan of the transform, and time on the current backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hqdit.benchmark.products import interleaved
from hqdit.benchmark.workload import DIT_XL_2
from hqdit.errors import UsageError
from hqdit.evaluation.bootstrap import bootstrap_interval
from hqdit.formats.catalog import E2M1
from hqdit.kernels.activation import QuantizedActivation
from hqdit.layers.linear import HQLinear
from hqdit.quantizers.spec import ActivationSpec, LinearSpec, WeightSpec
from hqdit.records.run_record import Interval
from hqdit.transforms.rotation import RotationSpec, pack_signs, plan_rotation, random_signs

Float64Array = npt.NDArray[np.float64]

#: Orders of block rotations that are looked at, where they divide a model's widths.
BLOCKS = (16, 32, 36, 64, 72, 128)


@dataclass(frozen=True)
class BlockGeometry:
    """The widths of a DiT block that rotations and products follow from.

    Attributes:
        name: for tables.
        width: of the hidden states.
        hidden: inside the MLP.
    """

    name: str
    width: int
    hidden: int

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Layers that run on every token: name -> (in_features, out_features). q, k and v share one input."""
        return {
            "qkv": (self.width, 3 * self.width),
            "attention out": (self.width, self.width),
            "fc1": (self.width, self.hidden),
            "fc2": (self.hidden, self.width),
        }


XL = BlockGeometry(
    "DiT-XL/2",
    DIT_XL_2["num_attention_heads"] * DIT_XL_2["attention_head_dim"],
    4 * DIT_XL_2["num_attention_heads"] * DIT_XL_2["attention_head_dim"],
)
GEOMETRIES = (XL, BlockGeometry("digits", 144, 576), BlockGeometry("shapes", 128, 512))


def rotation_operations(rotation: RotationSpec) -> int:
    """Additions, sign flips and multiplications that the online rotation of one token takes, by its plan.

    A transform of order 2^k m needs k stages of one addition per element; each element of the Paley factor's output is
    a signed sum of m numbers, m - 1 additions. Signs and the normalisation take one operation per element each. That is
    an upper bound: kernels share partial sums of the Paley factor, and fuse the normalisation with the scale.

    Args:
        rotation: as planned for a layer; a folded one only mixes across heads online, and has its signs folded.
    """
    if rotation.is_identity:
        return 0
    order = rotation.heads if rotation.is_folded else rotation.block
    factors = RotationSpec("full", order, order).factors("operations")
    stages = factors.sylvester.bit_length() - 1
    signs = 0 if rotation.is_folded else 1
    return rotation.width * (stages + factors.paley - 1 + signs + 1)


def block_operations(geometry: BlockGeometry, rotation: str) -> tuple[int, int]:
    """(operations of the rotations, operations of the products) of one token in one block; 2 per multiply-add."""
    rotations = products = 0
    for name, (width, out_features) in geometry.layers.items():
        rotations += rotation_operations(plan_rotation(rotation, width, name))
        products += 2 * width * out_features
    return rotations, products


def rotations_for(geometry: BlockGeometry) -> list[str]:
    """None, every block of `BLOCKS` that divides both widths, and full; a block as wide as the input is full."""
    fits = [size for size in BLOCKS if geometry.width % size == 0 and geometry.hidden % size == 0]
    return ["none", *(f"block:{size}" for size in fits), "full"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one geometry, all repeats.

    Attributes:
        geometry: whose block.
        tokens: in every call.
        quantize: rotation -> layer -> seconds of rotation and rounding.
        product: layer -> seconds of the product that it feeds.
    """

    geometry: BlockGeometry
    tokens: int
    quantize: Mapping[str, Mapping[str, Sequence[float]]]
    product: Mapping[str, Sequence[float]]

    def quantize_seconds(self, rotation: str) -> float:
        """Of one block: the median over repeats."""
        return float(np.median(_of_block(self.quantize[rotation])))

    @property
    def product_seconds(self) -> float:
        """Of one block: the median over repeats."""
        return float(np.median(_of_block(self.product)))

    def extra_seconds(self, rotation: str) -> float:
        """What the rotation adds to a block: the difference of the medians."""
        return self.quantize_seconds(rotation) - self.quantize_seconds("none")

    def overhead(self, rotation: str) -> Interval:
        """Extra time over rounding and product without a rotation, as a fraction, with its interval over repeats."""
        return bootstrap_interval(
            self._rows(rotation), lambda rows: _extra(rows) / float(np.median(rows[:, 1:].sum(1)))
        )

    def _rows(self, rotation: str) -> Float64Array:
        """(repeats, 3): a block's rotation and rounding, its rounding alone, its products; taken one after another."""
        parts = (self.quantize[rotation], self.quantize["none"], self.product)
        return np.stack([_of_block(part) for part in parts], axis=1)


def _of_block(layers: Mapping[str, Sequence[float]]) -> Float64Array:
    """Seconds of all layers together in each repeat."""
    together: Float64Array = np.sum([np.asarray(seconds, dtype=np.float64) for seconds in layers.values()], axis=0)
    return together


def _extra(rows: Float64Array) -> float:
    return float(np.median(rows[:, 0]) - np.median(rows[:, 1]))


def random_layer(name: str, width: int, out_features: int, rotation: str) -> HQLinear:
    """An E2M1 layer with random codes, for timing."""
    planned = plan_rotation(rotation, width, name)
    spec = LinearSpec(name, width, out_features, WeightSpec((E2M1,)), ActivationSpec(E2M1), planned)
    layer = HQLinear(spec).eval()
    generator = torch.Generator().manual_seed(0)
    layer.qweight = torch.randint(256, layer.qweight.shape, dtype=torch.uint8, generator=generator)
    layer.weight_scale = torch.full_like(layer.weight_scale, 0.01)
    if not planned.is_identity:
        layer.rotation_signs = pack_signs(random_signs(width, 0, name))
    return layer


@torch.inference_mode()
def measure(geometry: BlockGeometry, rotations: Sequence[str], tokens: int, repeats: int) -> Timing:
    """Time rotation and rounding, and the products, on the current backend, all in turns.

    Raises:
        UsageError: without "none" among the rotations there is nothing to compare with.
    """
    if "none" not in rotations:
        raise UsageError(
            f"hadamard-cost: found the rotations {', '.join(rotations)}, needed none among them. Fix: add none"
        )
    generator = torch.Generator().manual_seed(1)
    runs: dict[str, Callable[[], object]] = {}
    for name, (width, out_features) in geometry.layers.items():
        x = torch.randn(tokens, width, generator=generator)
        for rotation in rotations:
            layer = random_layer(name, width, out_features, rotation)
            runs[f"{rotation}/{name}"] = partial(layer.quantize_input, x)
            if rotation == "none":
                runs[f"product/{name}"] = partial(_product, layer, layer.quantize_input(x))
    seconds = interleaved(runs, repeats)
    return Timing(
        geometry,
        tokens,
        {rotation: {name: seconds[f"{rotation}/{name}"] for name in geometry.layers} for rotation in rotations},
        {name: seconds[f"product/{name}"] for name in geometry.layers},
    )


def _product(layer: HQLinear, activation: QuantizedActivation) -> Tensor:
    return layer.forward_quantized(activation)
