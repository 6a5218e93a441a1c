"""What groups cost and gain: `python benchmarks/group_sizes.py --json FILE`.

Time is that of one forward pass of DiT-XL/2 (256 x 256 pixels, batch 2, random weights, some of its blocks), all
presets and group sizes in turns. Accuracy is the SQNR of the noise prediction of the bundled models with the same
settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from hqdit.benchmark.products import interleaved
from hqdit.benchmark.workload import model_inputs, write_float_model
from hqdit.calibration.samples import CalibrationSet
from hqdit.experiments.cache import ResultCache
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.subjects import Subject
from hqdit.kernels.selection import current_backend
from hqdit.models.source import find_model, load_float_transformer
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.environment import describe_environment
from hqdit.pipeline.publish import publish_text
from hqdit.pipeline.quantize import quantize

PAPER, TOKEN, PLUS = (QuantizationConfig.preset(name) for name in ("hqdit", "hqdit-plus-token", "hqdit-plus"))
#: Row -> request. Groups have at most so many channels: the largest multiple of 4 that divides the width.
ROWS = {
    "hqdit": PAPER,
    "hqdit-plus-token (no groups)": TOKEN,
    **{f"hqdit-plus, groups of {size}": PLUS.replace(group_size=size) for size in (128, 64, 32)},
    f"hqdit-plus (groups of {PLUS.group_size})": PLUS,
}
CALIBRATION_SAMPLES = 16
BATCH = 2


def quantized_blocks(folder: Path, blocks: int) -> dict[str, Any]:
    """The rows' models, on random data: a trained model may have means, directions and fine groups elsewhere."""
    write_float_model(folder / "float", blocks)
    generator = torch.Generator().manual_seed(2)
    side = 32
    calibration = CalibrationSet(
        torch.randn(CALIBRATION_SAMPLES, 4, side, side, generator=generator),
        torch.randint(0, 1000, (CALIBRATION_SAMPLES,), generator=generator),
        torch.randint(0, 1000, (CALIBRATION_SAMPLES,), generator=generator),
        "random numbers",
    )
    models = {}
    for row, config in ROWS.items():
        model = load_float_transformer(find_model(folder / "float"))
        # GPTQ and the search of scales change codes, not what is computed.
        models[row] = quantize(model, config.replace(gptq=False, act_order=False, scale_rule="absmax"), calibration)
    return models


def forward_seconds(models: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of one forward pass of each model, taken in turns."""
    fields = model_inputs(BATCH, 32)

    def run(model: Any) -> Any:
        return lambda: model(fields["latents"], timestep=fields["timesteps"], class_labels=fields["class_labels"])

    with torch.inference_mode():
        return interleaved({row: run(model) for row, model in models.items()}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=8, help="of DiT-XL/2's 28")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: dict[str, dict[str, Any]] = {row: {"config": config.to_json()} for row, config in ROWS.items()}
    with tempfile.TemporaryDirectory() as work:
        models = quantized_blocks(Path(work), args.blocks)
        seconds = forward_seconds(models, args.repeats)
        for row, model in models.items():
            specs = [layer.spec.activation for layer in quantized_layers(model).values()]
            rows[row] |= {
                "seconds": seconds[row],
                "time_vs_hqdit": statistics.median(seconds[row]) / statistics.median(seconds["hqdit"]),
                "inputs": {
                    "emphasised": sum(spec.emphasis > 0 for spec in specs),
                    "means of samples": sum(spec.centring == "sample" for spec in specs),
                    "group sizes": sorted({spec.group_size or 0 for spec in specs}),
                },
            }
        lab = Laboratory(ResultCache(Path(work)), Path(work))
        for source in ("digits", "shapes"):
            for row, config in ROWS.items():
                score = cast(dict[str, Any], lab.score(Subject(source), config))
                rows[row][source] = {
                    key: score[key] for key in ("eps_sqnr_db", "bits_per_weight", "bits_per_activation")
                }
    record = {
        "blocks": args.blocks,
        "threads": args.threads,
        "repeats": args.repeats,
        "rows": rows,
        "backend": current_backend().description,
        "environment": describe_environment(),
    }
    publish_text(args.json, json.dumps(record, indent=1))
    for row, found in rows.items():
        sqnr = " ".join(
            f"{source} {found[source]['eps_sqnr_db']['guided 1.5'][0]:.2f} dB" for source in ("digits", "shapes")
        )
        print(f"{row:32} {found['time_vs_hqdit']:.2f} of hqdit's time; {sqnr}")


if __name__ == "__main__":
    main()
