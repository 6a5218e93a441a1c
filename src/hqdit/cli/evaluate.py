"""`hqdit evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

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


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Quantized model.")],
    against: Annotated[str, typer.Option("--against", metavar="SRC", help="Its float original.")],
    num: Annotated[int, typer.Option(help="Images for the paired PSNR.")] = 32,
    steps: Steps = 50,
    guidance: Guidance = 1.5,
    batch_size: BatchSize = 64,
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
    with running(quiet_mode=quiet, device=device, dtype=dtype, backend=backend, threads=threads, seed=seed) as options:
        from torch import nn

        from hqdit.evaluation.fidelity import (
            evaluation_inputs,
            layer_fidelity,
            noise_fidelity,
            psnr_db,
            require_same_shape,
        )
        from hqdit.models.adapter import class_conditional_adapter
        from hqdit.models.source import find_model, load_float_transformer, load_scheduler, load_vae
        from hqdit.pipeline.checkpoint import load_folder
        from hqdit.pipeline.environment import describe_environment
        from hqdit.sampling.noise import EVALUATION
        from hqdit.sampling.sampler import SamplingConfig, generate_images, require_guidance

        config = SamplingConfig(steps, guidance)
        folder, original = find_model(model), find_model(against)
        require_json(json_file, None, folder.root, original.root)
        quantized = nn.Module.to(load_folder(folder), device=options.device, dtype=options.dtype)
        exact = load_float_transformer(original).to(options.device)  # float32: the yardstick is not rounded
        require_same_shape(exact, quantized)
        require_guidance(exact, guidance)
        scheduler, vae = load_scheduler(original), load_vae(original, options.device)
        inputs = evaluation_inputs(exact, scheduler, config, seed)
        noise = noise_fidelity(exact, quantized, inputs, guidance)
        layers = layer_fidelity(exact, quantized, inputs)
        classes = [index % class_conditional_adapter(exact).num_classes(exact) for index in range(num)]
        images = [
            generate_images(which, scheduler, vae, classes, config, seed, EVALUATION, batch_size, what)
            for which, what in ((exact, "float samples"), (quantized, "quantized samples"))
        ]
        psnr = psnr_db(*images)
        result = {
            "eps_sqnr_db": {
                "conditional": noise.conditional,
                "unconditional": noise.unconditional,
                "guided": noise.guided,
            },
            "eps_sqnr_db_by_timestep": [list(pair) for pair in noise.by_timestep],
            "sample_psnr_db": psnr,
            "layer_sqnr_db": layers,
            "timesteps": len(inputs.timesteps),
            "pairs": len(inputs.classes),
            "images": num,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "device": str(options.device),
            "dtype": dtype,
            "backend": options.backend,
            "environment": describe_environment(),
        }
        write_json(json_file, result)
        if quiet:
            return
        say(
            f"noise prediction SQNR: conditional {decibels(noise.conditional)}, unconditional "
            f"{decibels(noise.unconditional)}, guided ({guidance:g}) {decibels(noise.guided)}"
        )
        say(f"sample PSNR over {num} images: {decibels(psnr)}")
        for name, value in sorted(layers.items(), key=lambda item: item[1])[:5]:
            say(f"weak layer: {name} {decibels(value)}")
