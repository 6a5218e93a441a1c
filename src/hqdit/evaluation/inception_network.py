"""Inception-v3 as the graph of 2015-12-05 that FID is defined by, with the layer names of its public conversion.

It differs from the classifier of torchvision in what the padding of the pooling branches does, in the maximum of the
last block, and in its 1,008 logits.

Source: Szegedy et al. 2015 (arXiv 1512.00567) for the architecture; the nodes of `classify_image_graph_def.pb`, which
guided-diffusion's evaluation suite loads, for the rest: `ResizeBilinear` without half-pixel centres, (x - 128) / 128,
batch normalization with epsilon 0.001, `pool_3`, `mixed_6/conv`, `softmax/logits/MatMul`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE = 299  # pixels along an edge of the network's input
CLASSES = 1008
POOLED_WIDTH = 2048
#: Of the 192 channels of mixed_6/conv, 17x17 pixels each; 2,023 numbers, about as many as the pooled features.
SPATIAL_CHANNELS = 7

_SPATIAL_BLOCK = "Mixed_6d"  # mixed_6 in the graph, which counts the blocks from Mixed_5b = mixed


@dataclass(frozen=True)
class Unit:
    """A convolution without bias, batch normalization and ReLU. Stride 1 keeps the size, stride 2 pads nothing."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1


@dataclass(frozen=True)
class Branch:
    """One path through a block: pooling if any, units in a row, and at the end units side by side if any."""

    units: tuple[Unit, ...] = ()
    fork: tuple[Unit, ...] = ()
    pool: str = ""


class ConvolutionUnit(nn.Module):
    """The layers of a `Unit`: `conv` and `bn`."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) to (n, channels, h', w')."""
        return functional.relu(self.bn(self.conv(x)))


def average_pool(x: Tensor) -> Tensor:
    """Mean over 3x3 pixels, stride 1; at the border over the pixels that exist, not over zeros."""
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """Maximum over 3x3 pixels, stride 1; pixels beyond the border do not count."""
    return functional.max_pool2d(x, 3, stride=1, padding=1)


def reducing_max_pool(x: Tensor) -> Tensor:
    """Maximum over 3x3 pixels, stride 2, inside the image only."""
    return functional.max_pool2d(x, 3, stride=2)


_POOLS = {"average": average_pool, "max": max_pool, "reducing max": reducing_max_pool}


class MixedBlock(nn.Module):
    """Branches side by side; their outputs are concatenated in order."""

    def __init__(self, in_channels: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            width = in_channels
            for unit in branch.units:
                self._add(unit, width)
                width = unit.channels
            for unit in branch.fork:
                self._add(unit, width)
            self.channels += sum(unit.channels for unit in branch.fork) if branch.fork else width

    def _add(self, unit: Unit, in_channels: int) -> None:
        height, width = unit.kernel
        padding = ((height - 1) // 2, (width - 1) // 2) if unit.stride == 1 else (0, 0)
        self.add_module(unit.name, ConvolutionUnit(in_channels, unit.channels, unit.kernel, unit.stride, padding))

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) to (n, `channels`, h', w')."""
        outputs = []
        for branch in self.branches:
            y = _POOLS[branch.pool](x) if branch.pool else x
            for unit in branch.units:
                y = self.get_submodule(unit.name)(y)
            outputs += [self.get_submodule(unit.name)(y) for unit in branch.fork] if branch.fork else [y]
        return torch.cat(outputs, dim=1)


def _block_a(pool_channels: int) -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch1x1", 64, (1, 1)),)),
        Branch((Unit("branch5x5_1", 48, (1, 1)), Unit("branch5x5_2", 64, (5, 5)))),
        Branch(
            (
                Unit("branch3x3dbl_1", 64, (1, 1)),
                Unit("branch3x3dbl_2", 96, (3, 3)),
                Unit("branch3x3dbl_3", 96, (3, 3)),
            )
        ),
        Branch((Unit("branch_pool", pool_channels, (1, 1)),), pool="average"),
    )


def _block_b() -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch3x3", 384, (3, 3), 2),)),
        Branch(
            (
                Unit("branch3x3dbl_1", 64, (1, 1)),
                Unit("branch3x3dbl_2", 96, (3, 3)),
                Unit("branch3x3dbl_3", 96, (3, 3), 2),
            )
        ),
        Branch(pool="reducing max"),
    )


def _block_c(narrow: int) -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch1x1", 192, (1, 1)),)),
        Branch(
            (
                Unit("branch7x7_1", narrow, (1, 1)),
                Unit("branch7x7_2", narrow, (1, 7)),
                Unit("branch7x7_3", 192, (7, 1)),
            )
        ),
        Branch(
            (
                Unit("branch7x7dbl_1", narrow, (1, 1)),
                Unit("branch7x7dbl_2", narrow, (7, 1)),
                Unit("branch7x7dbl_3", narrow, (1, 7)),
                Unit("branch7x7dbl_4", narrow, (7, 1)),
                Unit("branch7x7dbl_5", 192, (1, 7)),
            )
        ),
        Branch((Unit("branch_pool", 192, (1, 1)),), pool="average"),
    )


def _block_d() -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch3x3_1", 192, (1, 1)), Unit("branch3x3_2", 320, (3, 3), 2))),
        Branch(
            (
                Unit("branch7x7x3_1", 192, (1, 1)),
                Unit("branch7x7x3_2", 192, (1, 7)),
                Unit("branch7x7x3_3", 192, (7, 1)),
                Unit("branch7x7x3_4", 192, (3, 3), 2),
            )
        ),
        Branch(pool="reducing max"),
    )


def _block_e(pool: str) -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch1x1", 320, (1, 1)),)),
        Branch(
            (Unit("branch3x3_1", 384, (1, 1)),),
            (Unit("branch3x3_2a", 384, (1, 3)), Unit("branch3x3_2b", 384, (3, 1))),
        ),
        Branch(
            (Unit("branch3x3dbl_1", 448, (1, 1)), Unit("branch3x3dbl_2", 384, (3, 3))),
            (Unit("branch3x3dbl_3a", 384, (1, 3)), Unit("branch3x3dbl_3b", 384, (3, 1))),
        ),
        Branch((Unit("branch_pool", 192, (1, 1)),), pool=pool),
    )


_BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),
}


class InceptionOutputs(NamedTuple):
    """What the evaluation suite reads from the graph.

    Attributes:
        pooled: (n, 2048), `pool_3`.
        spatial: (n, 17 * 17 * 7), the first channels of `mixed_6/conv` in the order NHWC.
        logits: (n, 1008), without the bias, as the Inception Score takes them.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class InceptionNetwork(nn.Module):
    """The network, 23,850,960 parameters; `fc.bias` is in the weights' file and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvolutionUnit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvolutionUnit(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = ConvolutionUnit(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = ConvolutionUnit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvolutionUnit(80, 192, (3, 3))
        width = 192
        for name, branches in _BLOCKS.items():
            block = MixedBlock(width, branches)
            self.add_module(name, block)
            width = block.channels
        self.fc = nn.Linear(POOLED_WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> InceptionOutputs:
        """Outputs for images (n, 3, height, width) with values from 0 to 255, of any size."""
        x = (resize_bilinear_tf1(pixels, SIDE, SIDE) - 128) / 128  # (n, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (n, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(reducing_max_pool(x)))  # (n, 192, 71, 71)
        x = reducing_max_pool(x)  # (n, 192, 35, 35)
        spatial = x
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
            if name == _SPATIAL_BLOCK:  # its first branch is mixed_6/conv
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pooled = x.mean(dim=(2, 3))  # (n, 2048) from 8x8
        return InceptionOutputs(pooled, spatial, functional.linear(pooled, self.fc.weight))


def resize_bilinear_tf1(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation as TensorFlow 1 does it with align_corners=False: no half-pixel centres.

    Output pixel i takes its value at i * in_size / out_size of the input, in float32, with the last pixel repeated.

    Args:
        images: float32 (n, channels, any, any).
        height: of the output.
        width: of the output.

    Returns:
        float32 (n, channels, height, width).
    """
    top, bottom, down = _interpolation(images.shape[2], height, images.device)
    left, right, across = _interpolation(images.shape[3], width, images.device)
    upper, lower = images[:, :, top], images[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down[:, None]


def _interpolation(in_size: int, out_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every output position the two input positions and the share of the second, float32."""
    scale = torch.tensor(in_size, dtype=torch.float32) / torch.tensor(out_size, dtype=torch.float32)
    position = torch.arange(out_size, dtype=torch.float32) * scale
    first = position.floor()
    lower = first.to(torch.int64)
    upper = (lower + 1).clamp(max=in_size - 1)
    return lower.to(device), upper.to(device), (position - first).to(device)
