"""A vision transformer, an MLP-mixer and a causal language model, small enough to be trained in a minute.

All have the same shape: embed, blocks, a last LayerNorm, a head. As in DiT, what is quantized is the linear layers of
the blocks. LayerNorm comes before each sublayer and has gains and shifts.

Source: Dosovitskiy et al. 2021, "An image is worth 16x16 words"; Tolstikhin et al. 2021, "MLP-Mixer"; Radford et al.
2019, "Language models are unsupervised multitask learners".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqdit.errors import UsageError
from hqdit.models.outliers import DEFAULT_SHARE
from hqdit.randomness import random_stream

#: Of positions at the start, for images: as large as what the patches' embedding gives, so that places can be told
#: apart from the first step on.
IMAGE_DEVIATION = 0.5
#: Of bytes and positions at the start, for text.
TEXT_DEVIATION = 0.05


@dataclass(frozen=True)
class Architecture:
    """Geometry of one network.

    Attributes:
        kind: one of `KINDS`.
        width: channels of the hidden states.
        hidden: channels inside the MLPs (over channels, for the mixer).
        blocks: how many.
        tokens: patches of an image, or the longest text in bytes.
        inputs: numbers in a patch, or byte values.
        outputs: classes, or byte values.
        heads: of attention; unused by the mixer.
        token_hidden: channels inside the mixer's MLP over tokens; unused by the others.
    """

    kind: str
    width: int
    hidden: int
    blocks: int
    tokens: int
    inputs: int
    outputs: int
    heads: int = 1
    token_hidden: int = 0


class TransformerBlock(nn.Module):
    """Attention and an MLP, both behind a LayerNorm; the layers in the order in which they run."""

    def __init__(self, shape: Architecture, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.is_causal = shape.heads, is_causal
        self.norm1 = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.attention_out = nn.Linear(shape.width, shape.width)
        self.norm2 = nn.LayerNorm(shape.width)
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.is_causal)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return x + y

    def normalized_inputs(self) -> list[tuple[nn.LayerNorm, nn.Linear]]:
        """Each LayerNorm whose channels are the input channels of one linear layer, with that layer."""
        return [(self.norm1, self.qkv), (self.norm2, self.fc1)]


class MixerBlock(nn.Module):
    """An MLP over tokens and one over channels, both behind a LayerNorm."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width)
        self.token_fc1 = nn.Linear(shape.tokens, shape.token_hidden)
        self.token_fc2 = nn.Linear(shape.token_hidden, shape.tokens)
        self.norm2 = nn.LayerNorm(shape.width)
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same shape."""
        across = self.norm1(x).transpose(1, 2)  # (batch, width, tokens)
        x = x + self.token_fc2(nn.functional.gelu(self.token_fc1(across))).transpose(1, 2)
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return x + y

    def normalized_inputs(self) -> list[tuple[nn.LayerNorm, nn.Linear]]:
        """Only the MLP over channels: for the one over tokens, the channels of the LayerNorm are rows."""
        return [(self.norm2, self.fc1)]


class SmallNetwork(nn.Module):
    """One of `KINDS`.

    Attributes:
        shape: its geometry.
        blocks: the parts whose linear layers are quantized.
    """

    def __init__(self, shape: Architecture) -> None:
        """Random weights from torch's global generator.

        Raises:
            UsageError: an unknown kind.
        """
        super().__init__()
        if shape.kind not in KINDS:
            raise UsageError(
                f"small network: found the kind {shape.kind!r}, needed one of {', '.join(KINDS)}. Fix: pick one of them"
            )
        self.shape = shape
        reads_text = shape.kind == LANGUAGE_MODEL
        deviation = TEXT_DEVIATION if reads_text else IMAGE_DEVIATION
        self.embedding = nn.Embedding(shape.inputs, shape.width) if reads_text else nn.Linear(shape.inputs, shape.width)
        self.position = nn.Parameter(deviation * torch.randn(shape.tokens, shape.width))
        self.blocks = nn.ModuleList(
            MixerBlock(shape) if shape.kind == MIXER else TransformerBlock(shape, reads_text)
            for _ in range(shape.blocks)
        )
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.outputs)
        if reads_text:
            nn.init.normal_(self.embedding.weight, std=deviation)

    def embed(self, inputs: Tensor) -> Tensor:
        """The first block's input.

        Args:
            inputs: float32 (batch, tokens, inputs) patches, or int64 (batch, at most `tokens`) bytes.

        Returns:
            float32 (batch, tokens, width).
        """
        hidden: Tensor = self.embedding(inputs)
        return hidden + self.position[: hidden.shape[1]]

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits: (batch, outputs) of an image, (batch, tokens, outputs) of a text (for the byte that comes next)."""
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden)
        logits: Tensor = self.head(hidden if self.shape.kind == LANGUAGE_MODEL else hidden.mean(dim=1))
        return logits


VISION_TRANSFORMER, MIXER, LANGUAGE_MODEL = "vision transformer", "MLP-mixer", "language model"
KINDS = (VISION_TRANSFORMER, MIXER, LANGUAGE_MODEL)


@torch.no_grad()
def scale_normalized_channels(
    network: SmallNetwork, factor: float, share: float = DEFAULT_SHARE, seed: int = 0
) -> SmallNetwork:
    """`network`, changed in place: compensated activation outliers, as `models.outliers.inject_outliers` makes for DiT.

    In front of every linear layer that reads a LayerNorm's channels, a seeded share of the gains and shifts is
    multiplied by `factor` and the columns that read them are divided by it, so that the function stays the same.

    Args:
        network: in float.
        factor: c, positive; 1.0 changes nothing.
        share: of the channels; at least one is taken.
        seed: which channels.
    """
    for index, block in enumerate(network.blocks):
        assert isinstance(block, (TransformerBlock, MixerBlock))
        for place, (norm, reader) in enumerate(block.normalized_inputs()):
            width = reader.in_features
            order = random_stream(seed, f"outliers/{index}/{place}").permutation(width)
            chosen = torch.from_numpy(order[: max(1, round(share * width))].copy())
            norm.weight[chosen] *= factor
            norm.bias[chosen] *= factor
            reader.weight[:, chosen] /= factor
    return network
