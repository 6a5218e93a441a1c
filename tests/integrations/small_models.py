"""Tiny random models of several of diffusers' classes, and arguments of their forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from packaging.version import Version
from tiny import tiny_dit

#: What `from_pretrained` of this diffusers calls the load dtype.
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"


@dataclass(frozen=True)
class SmallModel:
    """One class of diffusers.

    Attributes:
        name: of the class.
        config: of a tiny model.
        shapes: argument of the forward pass -> shape, for float arguments.
        timestep: (shape, dtype) of the time step.
        layers: how many layers are quantized.
    """

    name: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    layers: int

    @property
    def model_class(self) -> Any:
        return getattr(diffusers, self.name)

    def build(self, seed: int = 0) -> Any:
        """A float32 model in evaluation mode."""
        if self.name == "DiTTransformer2DModel":
            return tiny_dit(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model_class(**self.config)
        return model.eval()

    def save(self, folder: Path, **changes: Any) -> Path:
        self.build().save_pretrained(folder, **changes)
        return folder

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(1)
        found = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in self.shapes.items()}
        samples = found["hidden_states"].shape[0]
        is_flux = self.name.startswith("Flux")
        found["timestep"] = torch.full((samples,), 0.5 if is_flux else 500).to(dtype if is_flux else torch.long)
        if self.name == "DiTTransformer2DModel":
            found["class_labels"] = torch.arange(samples)
        return found

    def output(self, model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with torch.no_grad():
            found = model(**self.inputs(dtype), return_dict=False)[0]
        assert isinstance(found, torch.Tensor)
        return found


DIT = SmallModel("DiTTransformer2DModel", {}, {"hidden_states": (2, 1, 8, 8)}, 14)
SD3 = SmallModel(
    "SD3Transformer2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 7, 48), "pooled_projections": (2, 24)},
    29,
)
FLUX = SmallModel(
    "FluxTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 24,
        "axes_dims_rope": [8, 12, 12],
        "guidance_embeds": False,
    },
    {
        "hidden_states": (2, 9, 4),
        "encoder_hidden_states": (2, 5, 48),
        "pooled_projections": (2, 24),
        "img_ids": (9, 3),
        "txt_ids": (5, 3),
    },
    26,
)
WAN = SmallModel(
    "WanTransformer3DModel",
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 16,
    },
    {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 5, 16)},
    20,
)
SMALL_MODELS = (DIT, SD3, FLUX, WAN)
