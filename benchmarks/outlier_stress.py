"""What activation outliers cost: noise-prediction SQNR of the bundled model with 5 % of its channels scaled by c.

The float function is the same for every c, so that only quantization sees the difference. Run `make stress`.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

from hqdit.calibration.samples import CalibrationSet
from hqdit.evaluation.fidelity import evaluation_inputs, noise_fidelity
from hqdit.models.outliers import DEFAULT_SHARE, inject_outliers
from hqdit.models.source import find_model, load_float_transformer, load_scheduler
from hqdit.pipeline.config import PRESETS
from hqdit.pipeline.environment import describe_environment
from hqdit.pipeline.publish import publish_text
from hqdit.pipeline.quantize import quantize
from hqdit.sampling.sampler import SamplingConfig

FACTORS = (1.0, 10.0, 30.0, 100.0)
METHODS = {
    "minmax": PRESETS["minmax"],
    "rotation": PRESETS["hqdit"].replace(weights="e2m1", gptq=False),
    "rotation + selection": PRESETS["hqdit"].replace(gptq=False),
    "rotation + GPTQ": PRESETS["hqdit"].replace(weights="e2m1"),
    "GPTQ, no rotation": PRESETS["hqdit"].replace(rotation="none"),
    "hqdit": PRESETS["hqdit"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="record to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = find_model("digits")
    original, scheduler, sampling = load_float_transformer(folder), load_scheduler(folder), SamplingConfig()
    rows = []
    for factor in FACTORS:
        exact = inject_outliers(copy.deepcopy(original), factor, seed=args.seed)
        calibration = CalibrationSet.from_sampler(exact, scheduler, sampling=sampling, seed=args.seed)
        inputs = evaluation_inputs(exact, scheduler, sampling, args.seed)
        for method, config in METHODS.items():
            quantized = quantize(copy.deepcopy(exact), config.replace(seed=args.seed), calibration)
            found = noise_fidelity(exact, quantized, inputs, sampling.guidance)
            scores = {name: round(getattr(found, name), 3) for name in ("conditional", "unconditional", "guided")}
            rows.append({"factor": factor, "method": method, "eps_sqnr_db": scores})
            print(f"c = {factor:<5g} {method:<22} {scores}", flush=True)
    record = {
        "share": DEFAULT_SHARE,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "pairs": len(inputs.classes),
        "timesteps": len(inputs.timesteps),
        "seed": args.seed,
        "rows": rows,
        "environment": describe_environment(),
    }
    publish_text(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
