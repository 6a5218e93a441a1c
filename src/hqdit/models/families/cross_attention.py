"""Families whose blocks attend to the latents and then to a text."""

from __future__ import annotations

from hqdit.models.families.family import Family, Stage, cross_attention, mlp, qkv, self_attention

_TEXT_CONDITIONED: tuple[Stage, ...] = (*self_attention("attn1"), *cross_attention("attn2"), *mlp("ff"))
_WAN_BLOCK: tuple[Stage, ...] = (*self_attention("attn1"), *cross_attention("attn2"), *mlp("ffn"))

CROSS_ATTENTION = (
    Family(
        "PixArt",
        ("PixArtTransformer2DModel", "AllegroTransformer3DModel", "LTXVideoTransformer3DModel"),
        {"transformer_blocks": _TEXT_CONDITIONED},
    ),
    Family(
        "Latte",
        ("LatteTransformer3DModel",),
        {
            "transformer_blocks": _TEXT_CONDITIONED,
            "temporal_transformer_blocks": (*self_attention("attn1"), *mlp("ff")),
        },
        alternates=True,
    ),
    Family(
        "Sana",
        ("SanaTransformer2DModel", "SanaVideoTransformer3DModel"),
        {
            "transformer_blocks": (
                *self_attention("attn1"),
                *cross_attention("attn2"),
                # The convolution between these two is depthwise, and its output is gated.
                {"ff.conv_inverted": "fused-in"},
                {"ff.conv_point": "fc2"},
            )
        },
    ),
    Family(
        "HunyuanDiT",
        ("HunyuanDiT2DModel",),
        {"blocks": ({"skip_linear": "other"}, {"norm1.linear": "modulation"}, *_TEXT_CONDITIONED)},
        has_long_skips=True,
    ),
    Family(
        "Wan",
        ("WanTransformer3DModel", "ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel"),
        {"blocks": _WAN_BLOCK},
    ),
    Family(
        "Wan VACE",
        ("WanVACETransformer3DModel",),
        {"vace_blocks": ({"proj_in": "other"}, *_WAN_BLOCK, {"proj_out": "other"}), "blocks": _WAN_BLOCK},
        has_long_skips=True,  # each of the first blocks gives a hint to one of the others
    ),
    Family(
        "Lumina-Next",
        ("LuminaNextDiT2DModel",),
        {
            "layers": (
                {"norm1.linear": "modulation"},
                {**qkv("attn1"), "attn2.to_q": "q"},
                {"attn2.to_k": "k", "attn2.to_v": "v"},
                {"attn2.to_out.0": "attention-out"},  # of both attentions, added up
                {"feed_forward.linear_1": "gate", "feed_forward.linear_3": "fc1"},
                {"feed_forward.linear_2": "fc2"},
            )
        },
    ),
)
