"""GPTQ on the levels of any number format.

Columns are rounded one after another; each one's rounding error is spread over the columns that are still to come,
so that the layer's output moves least. Scales are fixed from the original weight beforehand (static groups), so the
layout is that of round-to-nearest.

Source: GPTQ (arXiv 2210.17323), algorithm 1; HQ-DiT (arXiv 2405.19751), section 3.3 for floating point grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqdit.errors import NumericsError
from hqdit.numerics.rounding import nearest_levels
from hqdit.quantizers.quantized_tensor import QuantizedTensor, round_to_nearest, rows_by_format, spread_scale
from hqdit.quantizers.spec import WeightSpec

BLOCK_COLUMNS = 128
#: Damping as fractions of the mean diagonal: tried in this order until the Hessian can be factored.
DAMPING_LADDER = (0.01, 0.1, 1.0)
#: A channel whose Hessian diagonal is below this fraction of the mean carries no signal.
DEAD_FRACTION = 1e-12


@dataclass(frozen=True)
class GPTQRecord:
    """What happened to one layer, for the checkpoint and `hqdit inspect`.

    Attributes:
        damp_fraction: rung of `DAMPING_LADDER` that was used (GPTQ's percdamp).
        dead_channels: input channels without signal; their weights are rounded to nearest, not zeroed, because a
            channel that is silent in the calibration data may speak at other time steps.
        rows_kept_nearest: output channels where round-to-nearest had the smaller error and was kept.
        error: tr((W - Q) H (W - Q)^T) of the result.
        error_nearest: the same for round-to-nearest; never smaller than `error`.
    """

    damp_fraction: float
    dead_channels: int
    rows_kept_nearest: int
    error: float
    error_nearest: float


def hessian_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """(w - q) H (w - q)^T of every row, float64 (out_features,)."""
    difference = weight.to(torch.float64) - quantized.to(torch.float64)
    return ((difference @ hessian) * difference).sum(dim=1)


def _inverse_factor(hessian: Tensor, dead: Tensor, name: str) -> tuple[Tensor, float]:
    """Upper Cholesky factor U of the damped inverse, H^-1 = U^T U, and the damping that it took."""
    live_mean = hessian.diagonal()[~dead].mean()
    for fraction in DAMPING_LADDER:
        damped = hessian.clone()
        damped[dead, :] = 0
        damped[:, dead] = 0
        damped.diagonal()[dead] = live_mean
        damped.diagonal().add_(fraction * live_mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0 and bool(torch.isfinite(lower).all()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and bool(torch.isfinite(upper).all()):
                return upper, fraction
    raise NumericsError(
        f"layer {name}: the Hessian of width {hessian.shape[0]} cannot be factored even with {DAMPING_LADDER[-1]:.0%} "
        "of its mean diagonal added, needed a positive definite matrix. Fix: use more --calibration-samples, or "
        "--no-gptq"
    )


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    spec: WeightSpec,
    format_index: Tensor | None = None,
    act_order: bool = False,
    name: str = "(unnamed)",
    block_columns: int = BLOCK_COLUMNS,
) -> tuple[QuantizedTensor, GPTQRecord]:
    """Codes whose Hessian-weighted error is at most that of round-to-nearest, row by row.

    Args:
        weight: floating point (out_features, in_features), rotated.
        hessian: float64 (in_features, in_features) from the rotated, quantized inputs.
        scale: float32 from `weight_scales`, fixed for the whole procedure.
        spec: formats and granularity.
        format_index: as in `QuantizedTensor`.
        act_order: visit columns in descending order of the Hessian's diagonal; the layout does not change.
        name: layer name for messages.
        block_columns: columns between two updates of the whole remainder; changes speed, not the result's meaning.

    Raises:
        NumericsError: NaN in weight or Hessian, or a Hessian that no rung of the damping ladder makes factorable.
    """
    nearest = round_to_nearest(weight, scale, spec, format_index)
    if not bool(torch.isfinite(hessian).all()):
        raise NumericsError(
            f"layer {name}: found NaN or infinity in the Hessian, needed finite calibration inputs. "
            "Fix: check the calibration data and the float model"
        )
    nearest_numbers = nearest.dequantize()
    error_nearest = hessian_error(weight, nearest_numbers, hessian)
    diagonal = hessian.diagonal()
    if bool((diagonal < -DEAD_FRACTION * diagonal.abs().mean()).any()):
        raise NumericsError(
            f"layer {name}: found {int((diagonal < 0).sum())} negative numbers on the Hessian's diagonal (smallest "
            f"{float(diagonal.min()):.3g}), needed sums of squares. Fix: accumulate it with HessianAccumulator"
        )
    dead = diagonal <= DEAD_FRACTION * diagonal.mean()
    if bool(dead.all()):  # nothing ever reached this layer, so there is nothing to minimise
        error = float(error_nearest.sum())
        return nearest, GPTQRecord(0.0, int(dead.sum()), weight.shape[0], error, error)

    columns = weight.shape[1]
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(columns)
    order = order.to(weight.device)
    ordered_hessian = hessian[order][:, order]
    factor, damp_fraction = _inverse_factor(ordered_hessian, dead[order], name)
    work = weight.to(torch.float64)[:, order].clone()
    column_scale = spread_scale(scale, columns).expand(weight.shape[0], columns)[:, order].to(torch.float64)
    rounded = torch.empty_like(work)
    by_format = rows_by_format(format_index, spec, weight.shape[0], weight.device)

    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        errors = torch.empty((weight.shape[0], stop - start), dtype=torch.float64, device=weight.device)
        for j in range(start, stop):
            for rows, fmt in by_format:
                scaled = (work[rows, j] / column_scale[rows, j]).to(torch.float32)
                rounded[rows, j] = nearest_levels(scaled, fmt).to(torch.float64) * column_scale[rows, j]
            errors[:, j - start] = (work[:, j] - rounded[:, j]) / factor[j, j]
            work[:, j + 1 : stop] -= errors[:, j - start, None] * factor[j, j + 1 : stop]
        work[:, stop:] -= errors @ factor[start:stop, stop:]

    inverse_order = torch.argsort(order)
    found = round_to_nearest(rounded[:, inverse_order].to(torch.float32), scale, spec, format_index)
    error_found = hessian_error(weight, found.dequantize(), hessian)
    keep_nearest = ~(error_found <= error_nearest)
    codes = torch.where(keep_nearest.unsqueeze(1), nearest.codes, found.codes)
    record = GPTQRecord(
        damp_fraction,
        int(dead.sum()),
        int(keep_nearest.sum()),
        float(torch.where(keep_nearest, error_nearest, error_found).sum()),
        float(error_nearest.sum()),
    )
    return QuantizedTensor(codes, scale, format_index, spec), record
