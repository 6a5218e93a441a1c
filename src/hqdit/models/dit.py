"""Adapter for diffusers' `DiTTransformer2DModel` (DiT, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from hqdit.models.adapter import ClassConditionalAdapter, LinearSite, register_adapter
from hqdit.models.calls import ModelCall
from hqdit.models.dit_block import FusedDiTBlock, share_embedders


class DiTAdapter(ClassConditionalAdapter):
    """DiT: adaLN-zero blocks of self-attention and an MLP, conditioned on time step and class."""

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, DiTTransformer2DModel)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(cast(Any, model).transformer_blocks)

    def sites(self, model: nn.Module) -> list[LinearSite]:
        sites = []
        head_dim = cast(Any, model).config.attention_head_dim
        for index in range(len(cast(Any, model).transformer_blocks)):
            at = f"transformer_blocks.{index}"
            value = f"{at}.attn1.to_v"
            sites += [
                LinearSite(f"{at}.norm1.linear", "modulation", index, 0, f"{at}.modulation"),
                LinearSite(f"{at}.attn1.to_q", "q", index, 1, f"{at}.qkv"),
                LinearSite(f"{at}.attn1.to_k", "k", index, 1, f"{at}.qkv"),
                LinearSite(value, "v", index, 1, f"{at}.qkv"),
                LinearSite(f"{at}.attn1.to_out.0", "attention-out", index, 2, f"{at}.out", head_dim, value),
                LinearSite(f"{at}.ff.net.0.proj", "fc1", index, 3, f"{at}.fc1"),
                LinearSite(f"{at}.ff.net.2", "fc2", index, 4, f"{at}.fc2"),
            ]
        return sites

    def call(self, model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor) -> ModelCall:
        # Latents stay float32 between steps; the model computes in its own dtype.
        return ModelCall((latents.to(cast(Any, model).dtype),), {"timestep": timesteps, "class_labels": classes})

    def modulation_input(self, model: nn.Module, block: int, timesteps: Tensor, classes: Tensor) -> Tensor:
        norm = cast(Any, model).transformer_blocks[block].norm1
        embedding = norm.emb(timesteps, classes, hidden_dtype=cast(Any, model).dtype)
        return cast(Tensor, norm.silu(embedding))

    def predict_noise(self, model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        output = self.call(model, latents, timesteps, classes)(model).sample
        return cast(Tensor, output[:, : latents.shape[1]].to(latents.dtype))

    def latent_shape(self, model: nn.Module) -> tuple[int, int, int]:
        config = cast(Any, model).config
        return config.in_channels, config.sample_size, config.sample_size

    def num_classes(self, model: nn.Module) -> int:
        return int(cast(Any, model).config.num_embeds_ada_norm)

    def null_class(self, model: nn.Module) -> int | None:
        table = cast(Any, model).transformer_blocks[0].norm1.emb.class_embedder.embedding_table
        classes = self.num_classes(model)
        return classes if table.num_embeddings > classes else None

    def train_timesteps(self, model: nn.Module) -> int:
        return 1000  # DiT (arXiv 2212.09748), section 4; the configuration does not hold it

    def fuse(self, model: nn.Module) -> None:
        super().fuse(model)
        for block in cast(Any, model).transformer_blocks:
            if FusedDiTBlock.can_fuse(block):
                FusedDiTBlock.fuse(block)
        share_embedders(model)

    def modulated_groups(self, model: nn.Module) -> list[str]:
        return [
            f"transformer_blocks.{index}.{group}"
            for index in range(len(cast(Any, model).transformer_blocks))
            for group in ("qkv", "fc1")
        ]

    @torch.no_grad()
    def scale_modulated_channels(self, model: nn.Module, factors: Mapping[str, Tensor]) -> None:
        # modulate(x) = LN(x) (1 + scale) + shift, with (shift, scale, gate) for attention, then for the MLP, as the
        # six parts of norm1.linear. c (LN(x) (1 + scale) + shift) needs scale' = c (1 + scale) - 1, shift' = c shift.
        first_part = {"qkv": 0, "fc1": 3}
        for index, block in enumerate(cast(Any, model).transformer_blocks):
            modulation = block.norm1.linear
            width = modulation.out_features // 6
            readers = {
                "qkv": (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v),
                "fc1": (block.ff.net[0].proj,),
            }
            for group, part in first_part.items():
                factor = factors.get(f"transformer_blocks.{index}.{group}")
                if factor is None:
                    continue
                factor = factor.to(modulation.weight.device)
                shift = slice(part * width, (part + 1) * width)
                scale = slice((part + 1) * width, (part + 2) * width)
                for rows in (shift, scale):
                    modulation.weight[rows] *= factor.unsqueeze(1)
                    modulation.bias[rows] *= factor
                modulation.bias[scale] += factor - 1
                for reader in readers[group]:
                    reader.weight /= factor


register_adapter(DiTAdapter())
