"""How good the estimates of memory and disk are: `python benchmarks/estimate_accuracy.py --json FILE`.

Each command runs in a process of its own, which notes its memory when the estimate is made, and from then on, some
hundred times a second, its own and its children's: anonymous pages, and all resident pages. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: DiT-B/2 (arXiv 2212.09748, table 1) on 16 x 16 pixels, so that it needs no autoencoder.
DIT_B_2 = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 12,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 12,
    "sample_size": 16,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
MODELS = ("digits", "shapes", "DiT-B/2")
#: Commands for a model at `{model}`, in this order; `{work}` is a folder.
LINES = {
    "quantize without data": "quantize {model} --out {work}/free --no-gptq",
    "quantize": "quantize {model} --out {work}/q --calibration-samples {samples} --steps 10",
    "quantize from 16 bits": "quantize {work}/half --out {work}/from-half --no-gptq",
    "sample quantized": "sample {work}/q --out {work}/images --num {num} --steps 2",
    "sample float": "sample {model} --out {work}/float-images --num {num} --steps 2",
    "evaluate": "evaluate {work}/q --against {model} --num {num} --steps 2 --json {work}/e.json",
}


def status() -> dict[str, int]:
    """RssAnon and VmRSS in bytes, of this process and its children together."""
    totals = {"RssAnon": 0, "VmRSS": 0}
    children = Path("/proc/self/task").glob("*/children")
    for process in ["self", *(number for path in children for number in path.read_text().split())]:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            if name in totals:
                totals[name] += int(rest.split()[0]) * 1024
    return totals


def measure_here(words: list[str], work: Path) -> dict[str, int]:
    """Run a command line in this process and say what was estimated and what it took."""
    from hqdit.cli.main import run
    from hqdit.pipeline import resources

    found: dict[str, int] = {}
    is_over = threading.Event()

    def watch() -> None:
        at_first = sum(path.lstat().st_size for path in work.rglob("*"))
        while not is_over.wait(0.01):
            now = status()
            found["peak_anonymous_bytes"] = max(found.get("peak_anonymous_bytes", 0), now["RssAnon"])
            found["peak_resident_bytes"] = max(found.get("peak_resident_bytes", 0), now["VmRSS"])
            try:
                disk = sum(path.lstat().st_size for path in work.rglob("*")) - at_first
            except OSError:  # a name that has just gone
                continue
            found["peak_disk_bytes"] = max(found.get("peak_disk_bytes", 0), disk)

    watcher = threading.Thread(target=watch)

    def note(estimate: Any, *_: object) -> None:
        before = status()
        found["estimated_memory_bytes"] = estimate.memory_bytes
        found["estimated_mapped_bytes"] = estimate.mapped_bytes
        found["estimated_disk_bytes"] = estimate.disk_bytes
        found["anonymous_bytes_before"], found["resident_bytes_before"] = before["RssAnon"], before["VmRSS"]
        watcher.start()

    resources.require_resources = note
    code = run([*words, "--quiet"])
    is_over.set()
    watcher.join()
    if code:
        raise SystemExit(code)
    return found


def with_ratios(found: dict[str, int]) -> dict[str, float]:
    """The measurements, and what was estimated over what was measured."""
    own = found["peak_anonymous_bytes"] - found["anonymous_bytes_before"]
    whole = found["resident_bytes_before"] + found["estimated_memory_bytes"] + found["estimated_mapped_bytes"]
    return {
        **found,
        "memory_ratio": round(found["estimated_memory_bytes"] / max(own, 1), 2),
        "resident_ratio": round(whole / found["peak_resident_bytes"], 2),
        "disk_ratio": round(found["estimated_disk_bytes"] / max(found["peak_disk_bytes"], 1), 2),
    }


def measure(line: str, work: Path) -> dict[str, float]:
    """`measure_here` in a new process."""
    command = [sys.executable, __file__, "--work", str(work), "--here", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{line}: {done.stderr}")
    return with_ratios(json.loads(done.stdout.splitlines()[-1]))


def write_models(work: Path) -> Path:
    """DiT-B/2 with random weights: a model folder, and the same as a checkpoint of the original."""
    import torch

    from hqdit.models.source import ModelFolder, build_skeleton
    from hqdit.pipeline.checkpoint import save

    torch.manual_seed(0)
    save(build_skeleton(ModelFolder(work, work, DIT_B_2)), work / "model")
    sys.path.insert(0, str(ROOT / "tests"))
    from original_dit import original_state, save_original

    save_original(work / "dit.pt", original_state(width=768, blocks=12, size=16, classes=1000))
    return work / "model"


def write_half(source: str, target: Path) -> None:
    """A copy of a model in bfloat16."""
    import torch

    from hqdit.models.source import find_model, load_float_transformer
    from hqdit.pipeline.checkpoint import save

    model = load_float_transformer(find_model(source)).to(torch.bfloat16)
    del model.source_dtypes
    save(model, target)


def main() -> None:
    """Measure every command on every model, or, as a child, one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--commands", nargs="*", help="of LINES; those whose input an earlier one makes need that one")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--here", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure_here(given.here, given.work)))
        return
    from hqdit.pipeline.environment import describe_environment

    begun = time.monotonic()
    entries: dict[str, dict[str, dict[str, float]]] = {}
    for name in given.models:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            model = str(write_models(work)) if name == "DiT-B/2" else name
            write_half(model, work / "half")
            samples, num = (64, 8) if name == "DiT-B/2" else (128, 64)
            lines = LINES | ({"convert": "convert {work}/dit.pt --out {work}/converted"} if name == "DiT-B/2" else {})
            entries[name] = {}
            for what, line in lines.items():
                if given.commands and what not in given.commands:
                    continue
                entries[name][what] = measure(line.format(model=model, work=work, samples=samples, num=num), work)
                print(name, what, {k: v for k, v in entries[name][what].items() if "ratio" in k}, flush=True)
    record = {
        "models": entries,
        "seconds": round(time.monotonic() - begun),
        "environment": describe_environment(),
    }
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
