"""`hqdit demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hqdit.cli.options import (
    BackendName,
    Debug,
    Device,
    Guidance,
    JsonFile,
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

if TYPE_CHECKING:
    from hqdit.evaluation.demo import MethodResult
    from hqdit.records.run_record import ImageGrid
    from hqdit.report.tables import DemoRow

#: Samples per model and method that are drawn in the report.
GRID_IMAGES, GRID_COLUMNS = 60, 10
OUTLIER_FACTOR = 10.0


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("demo"),
    num: Annotated[int, typer.Option(help="Images per model and method.")] = 256,
    steps: Steps = 50,
    guidance: Guidance = 1.5,
    calibration_samples: Annotated[int, typer.Option(help="Tuples from the model's own sampler.")] = 512,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    device: Device = "cpu",
    backend: BackendName = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Quantize the bundled digits model, plain and with outliers, and write a report of what it cost."""
    require_count("--num", num, at_least=2)  # the covariance of one image is none
    require_count("--calibration-samples", calibration_samples)
    start = time.perf_counter()
    with running(quiet_mode=quiet, device=device, backend=backend, threads=threads, seed=seed) as options:
        from hqdit.evaluation.demo import compare_presets
        from hqdit.evaluation.surrogate import SurrogateClassifier
        from hqdit.models.outliers import DEFAULT_SHARE, inject_outliers
        from hqdit.models.source import find_model, load_float_transformer, load_scheduler
        from hqdit.pipeline.config import PRESETS
        from hqdit.pipeline.environment import describe_environment
        from hqdit.pipeline.publish import publish_folder, require_free
        from hqdit.report.demo import demo_record
        from hqdit.report.figures import titled_grids
        from hqdit.report.page import render_report
        from hqdit.report.tables import render_text_table
        from hqdit.sampling.sampler import SamplingConfig

        sampling = SamplingConfig(steps, guidance)
        require_free(out, overwrite)
        require_json(json_file, out)
        folder = find_model("digits")
        scheduler = load_scheduler(folder)
        plain, with_outliers = (load_float_transformer(folder).to(options.device) for _ in range(2))
        inject_outliers(with_outliers, OUTLIER_FACTOR, DEFAULT_SHARE, seed)
        models = {"digits": plain, f"digits, outliers c = {OUTLIER_FACTOR:g}": with_outliers}
        presets = {name: PRESETS[name].replace(seed=seed) for name in ("minmax", "hqdit")}
        environment = describe_environment()
        extractor = SurrogateClassifier.load().name
        with publish_folder(out, overwrite) as staged:
            results = {
                label: compare_presets(
                    model,
                    folder,
                    scheduler,
                    presets,
                    staged / "models" / f"model{number}",
                    label=label,
                    images=num,
                    sampling=sampling,
                    calibration_samples=calibration_samples,
                    seed=seed,
                )
                for number, (label, model) in enumerate(models.items())
            }
            rows = [_row(label, result) for label, methods in results.items() for result in methods]
            plain_results = {label: [r.to_json() for r in methods] for label, methods in results.items()}
            settings = {
                "model": "digits: DiT, 6 blocks of width 144, 16 tokens, trained on scikit-learn's handwritten digits",
                "samples": f"{num} a row, {steps} steps, guidance {guidance:g}, seed {seed}",
                "calibration": f"{calibration_samples} tuples from the model's own sampler",
                "outliers": f"{DEFAULT_SHARE:.0%} of the modulated channels times {OUTLIER_FACTOR:g}, function kept",
            }
            images = _write_grids(results, staged)
            page = demo_record(
                rows,
                plain_results,
                images,
                extractor,
                settings,
                {**environment, "backend": options.backend},
                time.perf_counter() - start,
            )
            (staged / "samples.png").write_bytes(
                titled_grids([(image.title, (staged / image.file).read_bytes()) for image in images])
            )
            report = render_report([(staged, page)], "hqdit demo")
            (staged / "report.html").write_text(report, encoding="utf-8")
            record = {
                "rows": [row.to_json() for row in rows],
                "results": plain_results,
                "extractor": extractor,
                "steps": steps,
                "guidance": guidance,
                "images": num,
                "calibration_samples": calibration_samples,
                "seed": seed,
                "environment": environment,
            }
            write_json(staged / "record.json", record)
            write_json(json_file, record)
        if not quiet:
            say(render_text_table(rows, extractor))
            say(f"{out / 'report.html'}: the report with images; checkpoints are beside it")


def _row(label: str, result: MethodResult) -> DemoRow:
    from hqdit.analysis.inspection import size_facts, weight_bytes
    from hqdit.models.source import find_model
    from hqdit.pipeline.checkpoint import load_folder
    from hqdit.report.tables import DemoRow

    folder = find_model(result.path)
    is_float = result.eps_sqnr_db is None
    return DemoRow(
        model=label,
        method=result.method if is_float else f"{result.method} W4A4",
        bits_per_weight=32.0 if is_float else size_facts(load_folder(folder), folder)["bits_per_weight"],
        file_bytes=weight_bytes(folder),
        layer_sqnr_db=result.mean_layer_sqnr_db,
        eps_sqnr_db=result.eps_sqnr_db["guided"] if result.eps_sqnr_db else None,
        class_accuracy=result.class_accuracy,
        frechet=result.frechet,
        seconds=result.seconds,
    )


def _write_grids(results: dict[str, list[MethodResult]], folder: Path) -> list[ImageGrid]:
    """Write the first samples of every model and method to `folder`/images."""
    from hqdit.records.run_record import ImageGrid
    from hqdit.report.figures import image_grid
    from hqdit.sampling.sampler import to_uint8

    (folder / "images").mkdir()
    grids = []
    for number, (label, methods) in enumerate(results.items()):
        for result in methods:
            shown = result.images[:GRID_IMAGES]
            grid = ImageGrid(
                f"{label}: {result.method}",
                f"images/model{number}_{result.method}.png",
                f"the first {len(shown)} samples, classes 0 to 9 from left to right",
            )
            (folder / grid.file).write_bytes(image_grid(to_uint8(shown).numpy(), columns=GRID_COLUMNS))
            grids.append(grid)
    return grids
