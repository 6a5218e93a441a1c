"""`hqdit evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hqdit.cli.estimate import IgnoreEstimate, announce
from hqdit.cli.job import Resume, running_job
from hqdit.cli.options import (
    BackendName,
    BatchSize,
    Debug,
    Device,
    Dtype,
    Guidance,
    JsonFile,
    Quiet,
    Seed,
    Steps,
    Threads,
    decibels,
    require_count,
    require_json,
    running,
    say,
    write_json,
)
from hqdit.errors import UsageError

if TYPE_CHECKING:
    from hqdit.jobs.job import Job


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Quantized model.")],
    against: Annotated[str, typer.Option("--against", metavar="SRC", help="Its float original.")],
    num: Annotated[int, typer.Option(help="Images for the paired PSNR.")] = 32,
    steps: Steps = 50,
    guidance: Guidance = 1.5,
    batch_size: BatchSize = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard what a stopped run has finished.")] = False,
    resume: Resume = False,
    ignore_estimate: IgnoreEstimate = False,
    json_file: JsonFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: BackendName = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Compare a quantized model with its float original on the same noise."""
    require_count("--num", num)
    require_count("--batch-size", batch_size)
    if json_file is None and resume:
        raise UsageError(
            "--resume: found no --json, beside whose file finished work is kept, needed the one of the stopped run. "
            "Fix: add --json FILE"
        )
    with running(quiet_mode=quiet, device=device, dtype=dtype, backend=backend, threads=threads, seed=seed) as options:
        import torch

        from hqdit.evaluation.fidelity import (
            EvaluationInputs,
            evaluation_inputs,
            layer_fidelity,
            noise_fidelity,
            psnr_db,
            require_same_shape,
        )
        from hqdit.jobs.description import model_digest
        from hqdit.jobs.job import require_startable
        from hqdit.jobs.stores import JobImages, figures, tensors
        from hqdit.models.adapter import class_conditional_adapter
        from hqdit.models.precision import to_dtype
        from hqdit.models.source import find_model, load_float_transformer, load_scheduler, load_vae
        from hqdit.pipeline.checkpoint import load_folder
        from hqdit.pipeline.environment import describe_environment
        from hqdit.pipeline.estimate import evaluate_estimate
        from hqdit.sampling.noise import EVALUATION
        from hqdit.sampling.sampler import SamplingConfig, generate_images, require_guidance

        config = SamplingConfig(steps, guidance)
        folder, original = find_model(model), find_model(against)
        require_json(json_file, None, folder.root, original.root)
        if json_file is not None:
            require_startable(json_file, is_resumed=resume, is_discarding=overwrite)
        announce(
            evaluate_estimate(
                folder, original, options.dtype, num, batch_size, guidance, is_kept=json_file is not None
            ),
            json_file or Path.cwd(),
            device=options.device,
            is_ignored=ignore_estimate,
            is_quiet=quiet,
            fix="lower --batch-size or --num",
        )
        quantized = to_dtype(load_folder(folder), options.dtype, options.device)
        exact = load_float_transformer(original).to(options.device)  # float32: the yardstick is not rounded
        require_same_shape(exact, quantized)
        require_guidance(exact, guidance)
        scheduler, vae = load_scheduler(original), load_vae(original, options.device)
        classes = [index % class_conditional_adapter(exact).num_classes(exact) for index in range(num)]
        settings = {"images": num, "steps": steps, "guidance": guidance, "seed": seed}

        def inputs_as_tensors() -> dict[str, torch.Tensor]:
            found = evaluation_inputs(exact, scheduler, config, seed)
            return {
                "latents": torch.stack(found.latents),
                "timesteps": torch.tensor(found.timesteps),
                "classes": found.classes,
            }

        def measured(job: Job | None) -> dict[str, Any]:
            kept = tensors(job, "inputs", inputs_as_tensors)
            inputs = EvaluationInputs(
                tuple(kept["latents"].to(options.device)),
                tuple(kept["timesteps"].tolist()),
                kept["classes"].to(options.device),
            )
            noise = figures(job, "noise", lambda: noise_fidelity(exact, quantized, inputs, guidance).to_json())
            layers = figures(job, "layers", lambda: layer_fidelity(exact, quantized, inputs))
            images = [
                generate_images(
                    which, scheduler, vae, classes, config, seed, EVALUATION, batch_size, f"{what} samples",
                    None if job is None else JobImages(job, what),
                )
                for which, what in ((exact, "float"), (quantized, "quantized"))
            ]  # fmt: skip
            return {
                "eps_sqnr_db": {name: noise[name] for name in ("conditional", "unconditional", "guided")},
                "eps_sqnr_db_by_timestep": noise["by_timestep"],
                "sample_psnr_db": psnr_db(*images),
                "layer_sqnr_db": layers,
                "timesteps": len(inputs.timesteps),
                "pairs": len(inputs.classes),
                **settings,
                "device": str(options.device),
                "dtype": dtype,
                "backend": options.backend,
                "environment": describe_environment(),
            }

        if json_file is None:
            result = measured(None)
        else:
            description = {
                "model": model_digest(folder),
                "against": model_digest(original),
                "dtype": dtype,
                "batch_size": batch_size,
                **settings,
            }
            with running_job(json_file, description, options, resume=resume, overwrite=overwrite) as job:
                result = measured(job)
                write_json(json_file, result)
        if quiet:
            return
        noise, layers = result["eps_sqnr_db"], result["layer_sqnr_db"]
        say(
            f"noise prediction SQNR: conditional {decibels(noise['conditional'])}, unconditional "
            f"{decibels(noise['unconditional'])}, guided ({guidance:g}) {decibels(noise['guided'])}"
        )
        say(f"sample PSNR over {num} images: {decibels(result['sample_psnr_db'])}")
        for name, value in sorted(layers.items(), key=lambda item: item[1])[:5]:
            say(f"weak layer: {name} {decibels(value)}")
