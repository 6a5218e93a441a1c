"""A DiT block whose layers are all quantized, as a few fused operations."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from hqdit.kernels.linear import Epilogue
from hqdit.kernels.preparation import LayerNormModulate, Pointwise
from hqdit.kernels.selection import current_backend
from hqdit.layers.linear import HQLinear

_GELU = {"none": "gelu-erf", "tanh": "gelu-tanh"}
_EMBEDDING = "hqdit_embedding"


class FusedDiTBlock(BasicTransformerBlock):  # type: ignore[misc]
    """diffusers' block with the same modules and names, and a forward that passes over memory less often.

    What runs between two products is one operation that reads the tokens once: LayerNorm, modulation, rotation and
    rounding before q, k, v and before the MLP; rotation and rounding before the attention's output projection; GELU,
    rotation and rounding before the MLP's second layer. q, k and v are one product over one quantized input. Gate and
    residual are part of the product that they follow. On a composed backend the same forward runs as separate passes.

    Modules of a block are made this class in place (`fuse`); it has no constructor of its own.
    """

    @staticmethod
    def can_fuse(block: nn.Module) -> bool:
        """Whether `block` is self-attention and MLP with adaLN-zero and nothing else, quantized throughout.

        Layers with a low-rank branch are not fused: fused operations see quantized inputs only.
        """
        candidate = cast(Any, block)
        return (
            isinstance(block, BasicTransformerBlock)
            and candidate.norm_type == "ada_norm_zero"
            and candidate.attn2 is None
            and candidate.pos_embed is None
            and candidate.norm3.weight is None
            and getattr(candidate.ff.net[0], "approximate", None) in _GELU
            and _is_fusible(candidate)
            and all(candidate.attn1.to_q.shares_input_with(layer) for layer in _qkv(candidate)[1:])
        )

    @staticmethod
    def fuse(block: nn.Module) -> None:
        """Give `block`, for which `can_fuse` holds, this class's forward; modules, names and state stay."""
        block.__class__ = FusedDiTBlock

    @staticmethod
    def unfuse(block: nn.Module) -> None:
        """Give a fused block diffusers' forward back; others stay."""
        if isinstance(block, FusedDiTBlock):
            block.__class__ = BasicTransformerBlock

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, tokens, width) -> the same shape; arguments as of diffusers' block.

        Arguments that only other kinds of block use, chunked feed-forward, modules that have been wrapped since the
        block was fused (by peft, for one), and inputs that want a gradient take diffusers' own forward.
        """
        embedding = _take_embedding(kwargs)
        conditions = {"timestep", "class_labels"}
        others = [value for name, value in kwargs.items() if name not in conditions and value is not None]
        wants_gradient = torch.is_grad_enabled() and hidden_states.requires_grad
        if wants_gradient or args or others or self._chunk_size is not None or not _is_fusible(self):
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        batch, tokens, width = hidden_states.shape
        dtype, backend = hidden_states.dtype, current_backend()
        attention, norm = cast(Any, self.attn1), cast(Any, self.norm1)
        fc1, fc2 = self.ff.net[0], self.ff.net[2]

        if embedding is None:
            embedding = norm.emb(kwargs["timestep"], kwargs["class_labels"], hidden_dtype=dtype)  # (batch, width)
        conditioning = norm.linear.quantize_input(embedding, Pointwise("silu"))
        modulation = norm.linear.forward_quantized(conditioning)  # (batch, 6 width), float32
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)

        residual = hidden_states.reshape(-1, width)  # (batch tokens, width)
        shared = attention.to_q.quantize_input(hidden_states, LayerNormModulate(scale_attn, shift_attn, norm.norm.eps))
        projected = backend.linear(shared, [layer.packed_weight for layer in _qkv(self)], dtype=dtype)
        query, key, value = (part.view(batch, tokens, attention.heads, -1) for part in projected)
        mixed = backend.attention(query, key, value).view(batch, tokens, -1)
        output = attention.to_out[0]
        (residual,) = backend.linear(
            output.quantize_input(mixed), [output.packed_weight], Epilogue(gate=gate_attn, residual=residual), dtype
        )

        by_sample = residual.view(batch, tokens, width)
        modulated = fc1.proj.quantize_input(by_sample, LayerNormModulate(scale_mlp, shift_mlp, self.norm3.eps))
        (inner,) = backend.linear(modulated, [fc1.proj.packed_weight], dtype=dtype)
        activated = fc2.quantize_input(inner.view(batch, tokens, -1), Pointwise(_GELU[fc1.approximate]))
        (residual,) = backend.linear(activated, [fc2.packed_weight], Epilogue(gate=gate_mlp, residual=residual), dtype)
        return residual.view(batch, tokens, width)


def share_embedders(model: nn.Module) -> None:
    """Hold equal embedders once, and compute them once in each forward pass, if every block of `model` is fused.

    Converted DiT checkpoints repeat the embedder of time step and class in every block, a tenth of the float model.
    Names and the state dict stay.
    """
    blocks = cast(Any, model).transformer_blocks
    if not all(isinstance(block, FusedDiTBlock) for block in blocks):
        return
    first, others = blocks[0].norm1, [block.norm1 for block in blocks[1:]]
    expected = first.emb.state_dict()
    for norm in others:
        state = norm.emb.state_dict()
        # Blocks on different devices keep their own.
        pairs = [(state[name], tensor) for name, tensor in expected.items()]
        if not all(one.device == other.device and torch.equal(one, other) for one, other in pairs):
            return
    for norm in others:
        norm.emb = first.emb
    if _pass_embedding not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_pass_embedding, with_kwargs=True)


def separate_embedders(model: nn.Module) -> None:
    """Undo `share_embedders`: each block has an embedder of its own again."""
    blocks = cast(Any, model).transformer_blocks
    for block in blocks[1:]:
        if block.norm1.emb is blocks[0].norm1.emb:
            block.norm1.emb = copy.deepcopy(block.norm1.emb)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _pass_embedding:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _pass_embedding(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute the shared embedding and hand it to the blocks, in the one argument that the model passes on as it is."""
    is_plain = kwargs.get("cross_attention_kwargs") is None and len(args) <= 3
    if model.training or cast(Any, model).gradient_checkpointing or not is_plain:
        return args, kwargs  # training drops labels in each block by itself
    named = dict(zip(("hidden_states", "timestep", "class_labels"), args, strict=False)) | kwargs
    embedder = cast(Any, model).transformer_blocks[0].norm1.emb
    embedding = embedder(named["timestep"], named["class_labels"], hidden_dtype=named["hidden_states"].dtype)
    return args, kwargs | {"cross_attention_kwargs": {_EMBEDDING: embedding}}


def _take_embedding(kwargs: dict[str, Any]) -> Tensor | None:
    """The embedding that `_pass_embedding` sent, removed from `kwargs`, which diffusers' own forward may get."""
    passed = kwargs.get("cross_attention_kwargs")
    if not passed or _EMBEDDING not in passed:
        return None
    rest = {name: value for name, value in passed.items() if name != _EMBEDDING}
    kwargs["cross_attention_kwargs"] = rest or None
    return cast(Tensor, passed[_EMBEDDING])


def _qkv(block: Any) -> list[HQLinear]:
    return [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]


def _is_fusible(block: Any) -> bool:
    """Whether every layer is quantized, and has no low-rank branch, which reads the input before it is quantized."""
    others = [block.norm1.linear, block.attn1.to_out[0], block.ff.net[0].proj, block.ff.net[2]]
    return all(isinstance(layer, HQLinear) and layer.is_fusible for layer in _qkv(block) + others)
