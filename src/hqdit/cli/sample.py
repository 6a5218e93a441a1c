"""`hqdit sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Out,
    Overwrite,
    Quiet,
    Seed,
    Steps,
    Threads,
    require_count,
    require_json,
    running,
    say,
    write_json,
)
from hqdit.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import nn

DEFAULT_CLASSES = 10


def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Float or quantized model.")],
    out: Out,
    classes: Annotated[
        str | None, typer.Option(help="Classes by number or name, taken in turn; default: the first ten.")
    ] = None,
    num: Annotated[int, typer.Option(help="Images in all.")] = 10,
    steps: Steps = 50,
    guidance: Guidance = 1.5,
    sampler: Annotated[
        str, typer.Option(help="scheduler (the model's own, deterministic), or ddpm-original (DiT's, with new noise).")
    ] = "scheduler",
    batch_size: BatchSize = 64,
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Also write all images to this .npz, as ADM's suite reads it.")
    ] = None,
    overwrite: Overwrite = False,
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
    """Sample images: one PNG each and one grid."""
    require_count("--num", num)
    require_count("--batch-size", batch_size)
    with running(quiet_mode=quiet, device=device, dtype=dtype, backend=backend, threads=threads, seed=seed) as options:
        from hqdit.evaluation.image_files import write_adm_npz
        from hqdit.integrations.pixel_pipeline import as_pil
        from hqdit.jobs.description import model_digest
        from hqdit.jobs.job import has_published, require_startable
        from hqdit.jobs.stores import JobImages
        from hqdit.models.adapter import class_conditional_adapter
        from hqdit.models.class_names import choose_classes, class_names
        from hqdit.models.precision import to_dtype
        from hqdit.models.source import find_model, load_scheduler, load_vae
        from hqdit.pipeline.checkpoint import load_folder
        from hqdit.pipeline.environment import describe_environment
        from hqdit.pipeline.estimate import sample_estimate
        from hqdit.pipeline.publish import publish_folder, require_free
        from hqdit.report.figures import image_grid
        from hqdit.sampling.sampler import SamplingConfig, generate_images, require_classes, require_guidance, to_uint8

        config = SamplingConfig(steps, guidance, sampler)
        folder = find_model(model)
        require_free(out, overwrite or (resume and has_published(out)), folder.root)
        require_startable(out, is_resumed=resume, is_discarding=overwrite)
        require_json(json_file, out, folder.root)
        _require_npz(npz, out, folder.root)
        given = None if classes is None else choose_classes(classes, class_names(folder))
        announce(
            sample_estimate(folder, options.dtype, num, batch_size, guidance, has_npz=npz is not None),
            out,
            device=options.device,
            is_ignored=ignore_estimate,
            is_quiet=quiet,
            fix="lower --batch-size or --num",
        )
        transformer = to_dtype(load_folder(folder), options.dtype, options.device)
        labels = given or list(
            range(min(DEFAULT_CLASSES, class_conditional_adapter(transformer).num_classes(transformer)))
        )
        require_classes(labels, transformer)
        require_guidance(transformer, guidance)
        vae = load_vae(folder, options.device)
        if vae is None:
            _require_pixels(folder.root, transformer)
        chosen = [labels[index % len(labels)] for index in range(num)]
        files = [f"{index:06d}_class{label}.png" for index, label in enumerate(chosen)]
        result = {
            "files": files,
            "grid": "grid.png",
            "classes": chosen,
            "steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "seed": seed,
            "device": str(options.device),
            "dtype": dtype,
            "backend": options.backend,
            "environment": describe_environment(),
        }
        description = {
            "model": model_digest(folder),
            "batch_size": batch_size,
            **{key: result[key] for key in ("classes", "steps", "guidance", "sampler", "seed", "dtype")},
        }
        with running_job(out, description, options, resume=resume, overwrite=overwrite) as job:
            if not has_published(out):
                scheduler = load_scheduler(folder)
                store = JobImages(job)
                images = to_uint8(
                    generate_images(
                        transformer, scheduler, vae, chosen, config, seed, batch_size=batch_size, store=store
                    )
                )
                with publish_folder(job.result, overwrite=True) as staged:
                    for name, image in zip(files, as_pil(images), strict=True):
                        image.save(staged / name)
                    (staged / "grid.png").write_bytes(image_grid(images.numpy(), columns=min(len(labels), num)))
                if npz is not None:
                    write_adm_npz(npz, images)
                write_json(json_file, result)
                job.publish(overwrite)
        if not quiet:
            say(f"{out}: {num} images and grid.png")


def _require_pixels(where: Path, transformer: nn.Module) -> None:
    """Raise `CheckpointError` for a model on latents, which no file format shows, without an autoencoder."""
    from hqdit.models.adapter import class_conditional_adapter

    channels = class_conditional_adapter(transformer).latent_shape(transformer)[0]
    if channels not in (1, 3):
        raise CheckpointError(
            f"{where}: found no autoencoder beside a model on {channels} channels, needed one to make images of them. "
            "Fix: put an AutoencoderKL folder as vae/ beside transformer/ and a model_index.json, as hqdit convert does"
        )


def _require_npz(path: Path | None, out: Path, source: Path) -> None:
    """Raise `UsageError` unless `path` can become a file outside of --out and of the model."""
    if path is None:
        return
    target = path.expanduser().resolve()
    parent = next(folder for folder in target.parents if folder.exists())
    places = {"--out": out.expanduser().resolve(), "the model": source.resolve()}
    if target.exists() and not target.is_file():
        found = "which is no regular file"
    elif not parent.is_dir():
        found = f"below the file {parent}"
    elif inside := [name for name, place in places.items() if place in (target, *target.parents)]:
        found = f"which is or lies inside {inside[0]}"
    else:
        return
    raise UsageError(f"--npz: found {path}, {found}, needed a file of its own. Fix: choose another --npz")
