"""Families whose blocks keep latents and text apart and let them attend together; some join them in later blocks."""

from __future__ import annotations

from hqdit.models.families.family import Family, Stage, context_qkv, fused_mlp, mlp, qkv, self_attention

_IMAGE_OUT: Stage = {"attn.to_out.0": "attention-out"}
_CONTEXT_OUT: Stage = {"attn.to_add_out": "attention-out"}
_MODULATIONS: tuple[Stage, ...] = ({"norm1.linear": "modulation"}, {"norm1_context.linear": "modulation"})
_MLPS = (*mlp("ff"), *mlp("ff_context"))

_FLUX_ATTENTION: tuple[Stage, ...] = (*_MODULATIONS, qkv("attn"), context_qkv("attn"), _IMAGE_OUT, _CONTEXT_OUT)
_FLUX_DOUBLE: tuple[Stage, ...] = (*_FLUX_ATTENTION, *_MLPS)
#: Attention and MLP side by side: one layer takes the outputs of both.
_FLUX_SINGLE: tuple[Stage, ...] = (
    {"norm.linear": "modulation"},
    {"proj_mlp": "fc1", **qkv("attn")},
    {"proj_out": "fused-out"},
)
_HUNYUAN_REFINER: tuple[Stage, ...] = (*self_attention("attn"), {"norm_out.linear": "modulation"}, *mlp("ff"))


def _gated_mlp(at: str) -> tuple[Stage, ...]:
    return {f"{at}.linear_1": "gate", f"{at}.linear_2": "fc1"}, {f"{at}.out_projection": "fc2"}


JOINT_ATTENTION = (
    Family(
        "SD3",
        ("SD3Transformer2DModel",),
        {
            "transformer_blocks": (
                *_MODULATIONS,
                qkv("attn"),
                context_qkv("attn"),
                _CONTEXT_OUT,
                _IMAGE_OUT,
                *self_attention("attn2"),  # the first blocks of 3.5 medium attend a second time, to the image alone
                *_MLPS,
            )
        },
    ),
    Family(
        "Flux",
        (
            "FluxTransformer2DModel",
            "BriaFiboTransformer2DModel",
            "BriaTransformer2DModel",
            "ChromaTransformer2DModel",
            "LongCatImageTransformer2DModel",
        ),
        {"transformer_blocks": _FLUX_DOUBLE, "single_transformer_blocks": _FLUX_SINGLE},
    ),
    Family(
        "Ovis-Image",
        ("OvisImageTransformer2DModel",),
        {
            "transformer_blocks": (*_FLUX_ATTENTION, *fused_mlp("ff"), *fused_mlp("ff_context")),
            "single_transformer_blocks": (
                {"norm.linear": "modulation"},
                {"proj_mlp": "fused-in", **qkv("attn")},
                {"proj_out": "fused-out"},
            ),
        },
    ),
    Family(
        "HunyuanVideo",
        (
            "HunyuanVideoTransformer3DModel",
            "HunyuanVideoFramepackTransformer3DModel",
            "HunyuanImageTransformer2DModel",
        ),
        {
            "context_embedder.token_refiner.refiner_blocks": _HUNYUAN_REFINER,
            "transformer_blocks": _FLUX_DOUBLE,
            "single_transformer_blocks": (
                {"norm.linear": "modulation"},
                {"proj_mlp": "fc1"},  # reads what the next stage reads, before it is taken apart and joined again
                qkv("attn"),
                {"proj_out": "fused-out"},
            ),
        },
    ),
    Family(
        "Mochi",
        ("MochiTransformer3DModel",),
        {
            "transformer_blocks": (
                {"norm1.linear": "modulation"},
                {"norm1_context.linear": "modulation", "norm1_context.linear_1": "modulation"},
                qkv("attn1"),
                context_qkv("attn1"),
                {"attn1.to_out.0": "attention-out"},
                {"attn1.to_add_out": "attention-out"},
                *fused_mlp("ff"),
                *fused_mlp("ff_context"),
            )
        },
    ),
    Family(
        "AuraFlow",
        ("AuraFlowTransformer2DModel",),
        {
            "joint_transformer_blocks": (*_FLUX_ATTENTION, *_gated_mlp("ff"), *_gated_mlp("ff_context")),
            "single_transformer_blocks": (
                {"norm1.linear": "modulation"},
                *self_attention("attn"),
                *_gated_mlp("ff"),
            ),
        },
    ),
    Family(
        "Flux2",
        ("Flux2Transformer2DModel",),
        {
            "transformer_blocks": (
                qkv("attn"),
                context_qkv("attn"),
                _CONTEXT_OUT,
                _IMAGE_OUT,
                {"ff.linear_in": "fused-in"},
                {"ff.linear_out": "fc2"},
                {"ff_context.linear_in": "fused-in"},
                {"ff_context.linear_out": "fc2"},
            ),
            "single_transformer_blocks": (
                {"attn.to_qkv_mlp_proj": "fused-in"},
                {"attn.to_out": "fused-out"},
            ),
        },
    ),
    Family(
        "QwenImage",
        ("QwenImageTransformer2DModel",),
        {
            "transformer_blocks": (
                {"img_mod.1": "modulation"},
                {"txt_mod.1": "modulation"},
                qkv("attn"),
                context_qkv("attn"),
                _IMAGE_OUT,
                _CONTEXT_OUT,
                *mlp("img_mlp"),
                *mlp("txt_mlp"),
            )
        },
    ),
)
