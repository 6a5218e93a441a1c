"""Families whose blocks attend to latents and text as one sequence, some after blocks for each of them alone."""

from __future__ import annotations

from hqdit.models.families.family import Family, Stage, mlp, self_attention

_LUMINA2_BLOCK: tuple[Stage, ...] = (
    {"norm1.linear": "modulation"},
    *self_attention("attn"),
    {"feed_forward.linear_1": "gate", "feed_forward.linear_3": "fc1"},
    {"feed_forward.linear_2": "fc2"},
)
_Z_IMAGE_BLOCK: tuple[Stage, ...] = (
    {"adaLN_modulation.0": "modulation"},
    *self_attention("attention"),
    {"feed_forward.w1": "gate", "feed_forward.w3": "fc1"},
    {"feed_forward.w2": "fc2"},
)

ONE_STREAM = (
    Family(
        "Z-Image",
        ("ZImageTransformer2DModel",),
        {name: _Z_IMAGE_BLOCK for name in ("noise_refiner", "context_refiner", "siglip_refiner", "layers")},
    ),
    Family(
        "Lumina2",
        ("Lumina2Transformer2DModel",),
        {name: _LUMINA2_BLOCK for name in ("context_refiner", "noise_refiner", "layers")},
    ),
    Family(
        "CogVideoX",
        (
            "CogVideoXTransformer3DModel",
            "CogView3PlusTransformer2DModel",
            "CogView4Transformer2DModel",
            "ConsisIDTransformer3DModel",
        ),
        {
            "transformer_blocks": (
                {"norm1.linear": "modulation"},
                *self_attention("attn1"),
                {"norm2.linear": "modulation"},
                *mlp("ff"),
            )
        },
    ),
)
