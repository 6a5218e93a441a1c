"""`hqdit quantize`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hqdit.cli.calibration import CalibrationRequest
from hqdit.cli.estimate import IgnoreEstimate, announce
from hqdit.cli.job import Resume, running_job
from hqdit.cli.options import (
    BackendName,
    Debug,
    Device,
    JsonFile,
    Overwrite,
    Quiet,
    Seed,
    Threads,
    require_count,
    require_json,
    running,
    say,
    write_json,
)
from hqdit.errors import UsageError

if TYPE_CHECKING:
    from hqdit.pipeline.config import QuantizationConfig
    from hqdit.pipeline.plan import QuantizationPlan


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Bundled name, hub id, pipeline or transformer folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; it must not exist.")] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="hqdit (the paper), hqdit-plus (better at the same bits), hqdit-plus-token (likewise with the paper's "
            "scales), w4a8 (INT8 activations), or a baseline: minmax, minmax-int4, smoothquant, fpq, gptq, quarot, "
            "svdquant, hqdit-no-rotation, hqdit-fixed-format, hqdit-no-gptq, hqdit-channel."
        ),
    ] = "hqdit",
    bits: Annotated[str, typer.Option(help="W8A8, W4A8, W4A6 or W4A4: weights, activations.")] = "W4A4",
    weights: Annotated[str | None, typer.Option(help="fp4, e2m1, e1m2, e3m0, int4, ... or table:n,...,n.")] = None,
    activations: Annotated[
        str | None, typer.Option(help="same (the layer's format), or a format's name or table; fp4 to search it.")
    ] = None,
    weight_granularity: Annotated[str | None, typer.Option(help="tensor, channel or group.")] = None,
    activation_granularity: Annotated[
        str | None, typer.Option(help="token, group, tensor, channel or channel-token.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Channels per group, a multiple of 4.")] = None,
    group_fit: Annotated[
        str | None, typer.Option(help="exact, or at-most: the largest group up to --group-size that divides the width.")
    ] = None,
    sensitive_group_size: Annotated[
        int | None, typer.Option(help="Channels per group where much of the model's error comes from.")
    ] = None,
    activation_scale_rule: Annotated[
        str | None, typer.Option(help="absmax, clipped or rms, for dynamic scales.")
    ] = None,
    scale_format: Annotated[str | None, typer.Option(help="float32 or e4m3, for scales of groups.")] = None,
    format_granularity: Annotated[str | None, typer.Option(help="layer or channel.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Quantile of the format statistic, in (0, 1).")] = None,
    rotation: Annotated[str | None, typer.Option(help="full, none or block:B.")] = None,
    fold_value_rotation: Annotated[
        bool | None, typer.Option("--fold-value-rotation/--no-fold-value-rotation", help="Fold it into W_v.")
    ] = None,
    scale_rule: Annotated[str | None, typer.Option(help="absmax, mse or mse-refit, for weights.")] = None,
    gptq: Annotated[bool | None, typer.Option("--gptq/--no-gptq", help="GPTQ or round-to-nearest.")] = None,
    act_order: Annotated[bool | None, typer.Option("--act-order/--no-act-order", help="Column order of GPTQ.")] = None,
    smoothing: Annotated[float | None, typer.Option(help="SmoothQuant's alpha, 0 to 1.")] = None,
    smoothing_statistic: Annotated[str | None, typer.Option(help="absmax or rms: what smoothing balances.")] = None,
    centring: Annotated[
        str | None, typer.Option(help="none, static or sample: what is subtracted from the inputs.")
    ] = None,
    emphasis: Annotated[
        int | None, typer.Option(help="Most directions in which an input is stretched; 0 for none.")
    ] = None,
    average_bits: Annotated[
        float | None, typer.Option(help="Spend bits on 8-bit inputs up to this mean over the layers.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Give inputs 8 bits until the predicted relative error is at most this.")
    ] = None,
    bias_correction: Annotated[
        bool | None,
        typer.Option("--bias-correction/--no-bias-correction", help="Let the bias take over the mean error."),
    ] = None,
    low_rank: Annotated[int | None, typer.Option(help="Rank of SVDQuant's 16-bit branch; 0 for none.")] = None,
    format_search: Annotated[
        bool | None, typer.Option("--format-search/--no-format-search", help="LLM-FP4's search of formats and scales.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Name pattern of layers to quantize; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Name pattern of layers to leave; repeatable.")] = None,
    keep_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 for the rest.")] = None,
    modulation: Annotated[
        bool | None, typer.Option("--modulation/--no-modulation", help="Quantize adaLN layers, too.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="safetensors: latents, timesteps, classes; or recorded calls.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file to calibrate with, a prompt a line.")] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="Tuples from the sampler (512), or calls with prompts (128).", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps of the calibration: 50, or the pipeline's.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Its guidance scale: 1.5, or the pipeline's.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; change nothing.")] = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    ignore_estimate: IgnoreEstimate = False,
    json_file: JsonFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    device: Device = "cpu",
    backend: BackendName = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Quantize a trained diffusion transformer to FP4 weights and activations, or as a baseline does."""
    if calibration_samples is not None:
        require_count("--calibration-samples", calibration_samples)
    if out is None and not dry_run:
        raise UsageError("--out: found nothing, needed the folder to write. Fix: add --out DST, or --dry-run")
    with running(quiet_mode=quiet, device=device, backend=backend, threads=threads, seed=seed) as options:
        from hqdit.analysis.inspection import inspect_checkpoint
        from hqdit.calibration.recording import read_calibration
        from hqdit.calibration.samples import DEFAULT_SAMPLES
        from hqdit.cli.inspect import print_sizes
        from hqdit.jobs.description import model_digest
        from hqdit.jobs.job import has_published, require_startable
        from hqdit.jobs.stores import JobBlocks
        from hqdit.jobs.stores import calibration as kept_calibration
        from hqdit.models.adapter import ClassConditionalAdapter, adapter_for
        from hqdit.models.source import find_model, load_float_transformer, load_scheduler
        from hqdit.pipeline.checkpoint import beside_transformer, save
        from hqdit.pipeline.config import QuantizationConfig
        from hqdit.pipeline.estimate import quantize_estimate
        from hqdit.pipeline.manifest import sha256_of
        from hqdit.pipeline.plan import plan_quantization
        from hqdit.pipeline.publish import require_copyable, require_free
        from hqdit.pipeline.quantize import quantize as quantize_model

        changes: dict[str, Any] = {
            "weights": weights,
            "activations": activations,
            "weight_granularity": weight_granularity,
            "activation_granularity": activation_granularity,
            "group_size": group_size,
            "format_granularity": format_granularity,
            "alpha": alpha,
            "rotation": rotation,
            "fold_value_rotation": fold_value_rotation,
            "scale_rule": scale_rule,
            "gptq": gptq,
            "act_order": act_order,
            "group_fit": group_fit,
            "sensitive_group_size": sensitive_group_size,
            "activation_scale_rule": activation_scale_rule,
            "scale_format": scale_format,
            "smoothing": smoothing,
            "smoothing_statistic": smoothing_statistic,
            "centring": centring,
            "emphasis": emphasis,
            "average_bits": average_bits,
            "max_error": max_error,
            "bias_correction": bias_correction,
            "low_rank": low_rank,
            "format_search": format_search,
            "modulation": modulation,
            "include": tuple(include) if include else None,
            "exclude": tuple(exclude) if exclude else None,
            "keep_dtype": keep_dtype,
            "seed": seed,
        }
        config = QuantizationConfig.preset(preset, bits).replace(**{k: v for k, v in changes.items() if v is not None})
        request = CalibrationRequest(prompts, calibration_samples, steps, guidance, seed)
        folder = find_model(source)
        sources = [folder.root, *(path for path in (calibration, prompts) if path is not None)]
        if out is not None:
            require_free(out, overwrite or (resume and has_published(out)), *sources)
            require_startable(out, is_resumed=resume, is_discarding=overwrite)
        require_json(json_file, out, *sources)
        for path in beside_transformer(folder):  # now, not when everything else is finished
            require_copyable(path)
        given = read_calibration(calibration) if calibration is not None else None
        is_drawn = given is None and config.needs_calibration
        estimate = None
        if not folder.is_quantized:  # which loading refuses
            samples = len(given) if given is not None else calibration_samples or DEFAULT_SAMPLES
            estimate = quantize_estimate(folder, config, samples if config.needs_calibration else 0)
            announce(
                estimate,
                out or Path.cwd(),
                device=options.device,
                is_ignored=ignore_estimate or dry_run,
                is_quiet=quiet,
                fix="take fewer --calibration-samples or --no-gptq" if config.needs_calibration else "",
            )
        model = load_float_transformer(folder).to(options.device)
        if isinstance(adapter_for(model), ClassConditionalAdapter):
            load_scheduler(folder)  # a broken one is found now, not when somebody samples
        if prompts is not None and not is_drawn:
            raise UsageError(
                f"--prompts: found {prompts} where no calibration data is drawn, needed a request that draws some. "
                "Fix: leave out --prompts, or --calibration and --no-gptq"
            )
        if (folder.root / "transformer_2").is_dir() and not quiet:
            say(f"{folder.root}: transformer_2 stays as it is; hqdit.quantize(pipeline) takes both")
        if is_drawn:
            request.require_fits(model, folder)
        plan = plan_quantization(model, config)
        if dry_run or out is None:
            _print_plan(plan)
            write_json(json_file, {**_plan_record(plan, config), "estimate": estimate and asdict(estimate)})
            return
        description = {
            "model": model_digest(folder),
            "calibration": request.description if is_drawn else calibration and sha256_of(calibration),
            **{f"config.{key}": value for key, value in config.to_json().items()},
        }
        with running_job(out, description, options, resume=resume, overwrite=overwrite) as job:
            if not (is_published := has_published(out)):
                if not job.has_result:
                    if is_drawn:
                        given = kept_calibration(job, lambda: request.draw(model, folder))
                    save(quantize_model(model, config, given, JobBlocks(job)), job.result, folder)
            result = inspect_checkpoint(out if is_published else job.result)
            write_json(json_file, result)
            if not is_published:
                job.publish(overwrite)
        if not quiet:
            print_sizes(out, result)


def _plan_record(plan: QuantizationPlan, config: QuantizationConfig) -> dict[str, Any]:
    return {
        "config": config.to_json(),
        "layers": {
            layer.site.name: {
                "role": layer.site.role,
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "rotation": layer.rotation.describe(),
                "format_policy": layer.format_policy,
                "smoothing": layer.smoothing,
            }
            for layer in plan.layers
        },
        "skipped": plan.skipped,
    }


def _print_plan(plan: QuantizationPlan) -> None:
    rows = [("layer", "width", "rotation", "smoothing", "format policy, or why it is skipped")]
    rows += [
        (layer.site.name, str(layer.in_features), layer.rotation.describe(), layer.smoothing, layer.format_policy)
        for layer in plan.layers
    ]
    rows += [(name, "-", "-", "-", f"skipped: {reason}") for name, reason in plan.skipped.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)]
        say("  ".join((*cells, row[4])))
    say(f"{len(plan.layers)} layers to quantize, {len(plan.skipped)} linear layers kept; nothing was changed")
