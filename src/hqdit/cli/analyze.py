"""`hqdit analyze`."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hqdit.cli.options import (
    BackendName,
    BatchSize,
    Debug,
    Device,
    Guidance,
    Out,
    Overwrite,
    Quiet,
    RunOptions,
    Seed,
    Steps,
    Threads,
    require_count,
    running,
    say,
)
from hqdit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from hqdit.models.source import ModelFolder
    from hqdit.pipeline.config import QuantizationConfig
    from hqdit.records.run_record import ImageGrid, RunRecord
    from hqdit.sampling.sampler import SamplingConfig

#: Pairs of samples that are drawn, in rows of this many, each pixel enlarged to at most this many.
GRID_IMAGES, GRID_COLUMNS, LARGEST_SCALE, GRID_PIXELS = 30, 10, 4, 64


def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Float or quantized model.")],
    out: Out,
    against: Annotated[
        str | None, typer.Option("--against", metavar="SRC", help="Float original of a quantized MODEL.")
    ] = None,
    preset: Annotated[str, typer.Option(help="What a float MODEL is planned with.")] = "hqdit",
    rotation: Annotated[
        str | None, typer.Option(help="full, block:B or none; default: the preset's.", show_default=False)
    ] = None,
    num: Annotated[int, typer.Option(help="Images for the paired PSNR.")] = 32,
    steps: Steps = 50,
    guidance: Guidance = 1.5,
    batch_size: BatchSize = 64,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    quiet: Quiet = False,
    device: Device = "cpu",
    backend: BackendName = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Explain a model: activations and formats of a float one, errors and formats of a quantized one."""
    require_count("--num", num)
    require_count("--batch-size", batch_size)
    start = time.perf_counter()
    with running(quiet_mode=quiet, device=device, backend=backend, threads=threads, seed=seed) as options:
        from hqdit.models.source import find_model
        from hqdit.pipeline.config import QuantizationConfig
        from hqdit.pipeline.environment import describe_environment
        from hqdit.pipeline.publish import publish_folder, require_free
        from hqdit.records.run_record import RECORD_NAME
        from hqdit.report.page import render_report
        from hqdit.sampling.sampler import SamplingConfig

        sampling = SamplingConfig(steps, guidance)
        config = QuantizationConfig.preset(preset).replace(seed=seed)
        config = config if rotation is None else config.replace(rotation=rotation)
        folder = find_model(model)
        original = _original(folder, model, against)
        require_free(out, overwrite, *(source.root for source in (folder, original) if source is not None))
        settings = {"model": model, "steps": steps, "guidance": guidance, "seed": seed, "device": str(options.device)}
        with publish_folder(out, overwrite) as staged:
            if original is None:
                record = _analyze_float(folder, model, config, sampling, options)
                settings |= {"preset": preset, "rotation": config.rotation}
            else:
                record = _analyze_quantized(folder, model, original, num, batch_size, sampling, seed, options, staged)
                settings |= {"against": against, "images": num}
            record = dataclasses.replace(
                record,
                config=settings,
                environment={**describe_environment(), "backend": options.backend},
                seconds=time.perf_counter() - start,
            )
            (staged / RECORD_NAME).write_text(record.to_text(), encoding="utf-8")
            page = render_report([(staged, record)], f"hqdit analyze {model}")
            (staged / "report.html").write_text(page, encoding="utf-8")
        if not quiet:
            for answer in record.answers:
                say(answer)
            say(f"{out / 'report.html'}: the analysis; its record is beside it")


def _original(folder: ModelFolder, model: str, against: str | None) -> ModelFolder | None:
    from hqdit.models.source import find_model

    if folder.is_quantized and against is None:
        raise UsageError(
            f"--against: found none for {model}, which is quantized, needed its float original. Fix: --against SRC"
        )
    if against is not None and not folder.is_quantized:
        raise UsageError(
            f"--against: found {against} for {model}, which is a float model, needed a quantized one. "
            "Fix: leave --against out, or swap the two"
        )
    return None if against is None else find_model(against)


def _analyze_float(
    folder: ModelFolder, name: str, config: QuantizationConfig, sampling: SamplingConfig, options: RunOptions
) -> RunRecord:
    from hqdit.analysis.model_record import float_model_record
    from hqdit.evaluation.fidelity import evaluation_inputs
    from hqdit.models.source import load_float_transformer, load_scheduler
    from hqdit.pipeline.plan import plan_quantization
    from hqdit.sampling.sampler import require_guidance

    exact = load_float_transformer(folder).to(options.device)
    require_guidance(exact, sampling.guidance)
    plan_quantization(exact, config)  # before the sampling, which takes long
    inputs = evaluation_inputs(exact, load_scheduler(folder), sampling, config.seed)
    return float_model_record(name, exact, inputs, config)


def _analyze_quantized(
    folder: ModelFolder,
    name: str,
    original: ModelFolder,
    num: int,
    batch_size: int,
    sampling: SamplingConfig,
    seed: int,
    options: RunOptions,
    staged: Path,
) -> RunRecord:
    from torch import nn

    from hqdit.analysis.errors import block_errors
    from hqdit.analysis.fidelity_record import Fidelity, quantized_model_record
    from hqdit.analysis.inspection import size_facts
    from hqdit.evaluation.bootstrap import bootstrap_mean
    from hqdit.evaluation.fidelity import (
        evaluation_inputs,
        layer_fidelity,
        noise_fidelity,
        psnr_of_images,
        require_same_shape,
    )
    from hqdit.models.adapter import class_conditional_adapter
    from hqdit.models.source import load_float_transformer, load_scheduler, load_vae
    from hqdit.pipeline.checkpoint import load_folder
    from hqdit.sampling.noise import EVALUATION
    from hqdit.sampling.sampler import generate_images, require_guidance

    quantized = nn.Module.to(load_folder(folder), device=options.device)
    exact = load_float_transformer(original).to(options.device)
    require_same_shape(exact, quantized)
    require_guidance(exact, sampling.guidance)
    scheduler, vae = load_scheduler(original), load_vae(original, options.device)
    inputs = evaluation_inputs(exact, scheduler, sampling, seed)
    noise = noise_fidelity(exact, quantized, inputs, sampling.guidance)
    classes = [index % class_conditional_adapter(exact).num_classes(exact) for index in range(num)]
    exact_images, images = (
        generate_images(which, scheduler, vae, classes, sampling, seed, EVALUATION, batch_size, what)
        for which, what in ((exact, "float samples"), (quantized, "quantized samples"))
    )
    ratios = [ratio for ratio in psnr_of_images(exact_images, images) if math.isfinite(ratio)]
    found = Fidelity(
        {branch: powers.db_interval for branch, powers in noise.branches.items()},
        noise.timesteps,
        {branch: powers.db_by_timestep for branch, powers in noise.branches.items()},
        layer_fidelity(exact, quantized, inputs),
        block_errors(exact, quantized, inputs),
        bootstrap_mean(ratios) if ratios else None,
        num,
    )
    return quantized_model_record(
        name, quantized, size_facts(quantized, folder), found, _grids(exact_images, images, staged)
    )


def _grids(exact: Tensor, quantized: Tensor, folder: Path) -> list[ImageGrid]:
    """Write float samples, quantized samples and their difference to `folder`."""
    from hqdit.records.run_record import ImageGrid
    from hqdit.report.figures import image_grid
    from hqdit.sampling.sampler import to_uint8

    exact, quantized = exact[:GRID_IMAGES], quantized[:GRID_IMAGES]
    difference = quantized - exact
    largest = float(difference.abs().max())
    meaning = f"grey: equal; black and white: {50 * largest:.1f} % of the range"
    scale = max(1, min(LARGEST_SCALE, GRID_PIXELS // exact.shape[-1]))
    grids = []
    for title, images, caption in (
        ("float", exact, f"the first {len(exact)} samples, classes in turn"),
        ("quantized", quantized, "from the same noise"),
        ("difference", difference / (largest or 1.0), meaning),
    ):
        grid = ImageGrid(title, f"{title}.png", caption)
        pixels = to_uint8(images).numpy()
        (folder / grid.file).write_bytes(image_grid(pixels, columns=GRID_COLUMNS, scale=scale))
        grids.append(grid)
    return grids
