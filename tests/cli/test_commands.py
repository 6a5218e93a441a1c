"""Every command on models that are fine: what it prints, what it writes, and what it leaves alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Hqdit, Models, tree
from PIL import Image
from safetensors.torch import load_file
from tiny import RUNNABLE
from torch import nn

import hqdit.sampling.sampler as sampler
from hqdit.cli.doctor import PackageNotFoundError
from hqdit.kernels.selection import BACKENDS
from hqdit.models.source import find_model, load_float_transformer
from hqdit.models.weights import WEIGHTS_NAME
from hqdit.pipeline.checkpoint import load
from hqdit.pipeline.manifest import MANIFEST_NAME

LAYERS = 7 * tiny.BLOCKS
SHORT = ("--steps", 2, "--calibration-samples", 16)
COMMANDS = (
    "demo",
    "quantize",
    "dequantize",
    "sample",
    "evaluate",
    "score",
    "analyze",
    "inspect",
    "verify",
    "doctor",
    "convert",
    "inject-outliers",
    "bench",
    "reproduce",
    "report",
)


def read(path: Path) -> dict[str, Any]:
    """A JSON file without the numbers that JSON does not have."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def require_finite_numbers(values: Any) -> None:
    for value in values:
        assert isinstance(value, (int, float)) and math.isfinite(value)


def test_help_lists_every_command(hqdit: Hqdit) -> None:
    outcome = hqdit("--help")
    assert outcome.code == 0 and outcome.err == ""
    for command in COMMANDS:
        assert command in outcome.out
        help_text = hqdit(command, "--help")
        assert help_text.code == 0 and help_text.err == "" and "--debug" in help_text.out


# quantize


@pytest.mark.parametrize("preset", ["minmax", "hqdit"])
def test_quantizing_a_transformer_folder_gives_a_transformer_folder(
    hqdit: Hqdit, models: Models, tmp_path: Path, preset: str
) -> None:
    before = tree(models.transformer)
    outcome = hqdit(
        "quantize", models.transformer, "--out", tmp_path / "q", "--preset", preset, *SHORT, "--json", tmp_path / "q.js"
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{LAYERS} quantized layers" in outcome.out
    assert sorted(tree(tmp_path)) == ["q", "q.js", "q/config.json", f"q/{WEIGHTS_NAME}", f"q/{MANIFEST_NAME}"]
    assert tree(models.transformer) == before
    assert len(read(tmp_path / "q.js")["layers"]) == LAYERS
    assert isinstance(load(tmp_path / "q"), nn.Module)


def test_flags_override_the_preset_and_its_bits(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    shown = {}
    for name, flags in {
        "preset": (),
        "bits": ("--bits", "W4A8"),
        "flags": ("--bits", "W4A8", "--activations", "int6", "--smoothing", "0.75", "--low-rank", "3"),
    }.items():
        outcome = hqdit(
            "quantize", models.transformer, "--dry-run", "--preset", "svdquant", *flags, "--json", tmp_path / name
        )
        assert (outcome.code, outcome.err) == (0, "")
        assert (outcome.out.count("folded"), outcome.out.count("applied")) == (5 * tiny.BLOCKS, 2 * tiny.BLOCKS)
        config = read(tmp_path / name)["config"]
        shown[name] = tuple(config[key] for key in ("weights", "activations", "smoothing", "low_rank"))
    assert shown == {
        "preset": ("int4", "same", 0.5, 32),
        "bits": ("int4", "int8", 0.5, 32),
        "flags": ("int4", "int6", 0.75, 3),
    }


def test_a_baseline_is_inspected_with_its_parts(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    flags = ("--preset", "svdquant", "--low-rank", 3, *SHORT)
    assert hqdit("quantize", models.transformer, "--out", tmp_path / "q", *flags).code == 0
    outcome = hqdit("inspect", tmp_path / "q", "--json", tmp_path / "q.js")
    assert outcome.code == 0
    facts = read(tmp_path / "q.js")["layers"]
    assert {entry["low_rank"] for entry in facts.values()} == {3}
    assert {name for name, entry in facts.items() if entry["smoothing"] == "applied"} == {
        name for name in facts if name.endswith(("norm1.linear", "ff.net.2"))
    }
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines()}
    header, row = rows["layer"], rows["transformer_blocks.0.attn1.to_q"]
    assert ("folded", "3") == (row[-5], row[-4]) and header[-5:-3] == ["smoothing", "rank"]


def test_quantizing_a_pipeline_copies_everything_else(models: Models) -> None:
    source, found = tree(models.pipeline), tree(models.quantized_pipeline)
    assert source.keys() | {MANIFEST_NAME} == found.keys()
    changed = {name for name in source if source[name] != found[name]}
    assert changed == {"transformer/config.json", f"transformer/{WEIGHTS_NAME}"}
    assert "assets/deep/blob.bin" in found


def test_quantizing_twice_gives_the_same_bytes(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert hqdit("quantize", models.pipeline, "--out", tmp_path / name, *SHORT, "--seed", 3).code == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_dry_run_lists_every_linear_layer_and_changes_nothing(
    hqdit: Hqdit, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(models.transformer.parent)
    outcome = hqdit("quantize", models.transformer, "--dry-run", "--exclude", "*.ff.net.2", "--out", "q")
    assert outcome.code == 0 and tree(tmp_path) == {} and tree(models.transformer.parent) == before

    assert outcome.out.splitlines()[0].startswith("estimate: about ")
    rows = {line.split()[0]: line for line in outcome.out.splitlines()[2:-1]}
    linear = {name for name, module in tiny.tiny_dit().named_modules() if isinstance(module, nn.Linear)}
    assert rows.keys() == linear
    assert "full 2*36" in rows["transformer_blocks.0.attn1.to_q"] and " 72 " in rows["transformer_blocks.0.attn1.to_q"]
    assert "fp4" in rows["transformer_blocks.0.attn1.to_q"]
    reasons = {name: line.split("skipped: ")[1] for name, line in rows.items() if "skipped: " in line}
    assert reasons["transformer_blocks.1.ff.net.2"] == "excluded by name"
    assert "embedder" in reasons["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"]
    assert all("outside the repeated blocks" in reasons[name] for name in ("proj_out_1", "proj_out_2"))
    assert outcome.out.splitlines()[-1].startswith(f"{len(linear - reasons.keys())} layers to quantize")

    assert hqdit("quantize", "digits", "--dry-run", "--json", "plan.json", "--rotation", "block:36").code == 0
    plan = read(tmp_path / "plan.json")
    assert len(plan["layers"]) == 7 * 6 and plan["config"]["rotation"] == "block:36"
    assert all(facts["rotation"].startswith("block:36 ") for facts in plan["layers"].values())
    model = load_float_transformer(find_model("digits"))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert plan["layers"].keys() | plan["skipped"].keys() == linear


def test_calibration_from_a_file(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    tiny.calibration().save(tmp_path / "tuples.safetensors")
    outcome = hqdit(
        "quantize", models.transformer, "--out", tmp_path / "q", "--calibration", tmp_path / "tuples.safetensors",
        "--json", tmp_path / "q.json",
    )  # fmt: skip
    assert outcome.code == 0
    assert read(tmp_path / "q.json")["calibration"]["origin"] == "tuples.safetensors"
    assert read(tmp_path / "q.json")["calibration"]["samples"] == len(tiny.calibration())


@pytest.mark.parametrize(
    "options",
    [
        "--weights int4 --activations int8 --rotation none",
        "--weights table:-12,-9,-7,-5,-4,-3,-2,-1,0,1,2,3,5,7,9,12 --rotation block:12",
        "--weight-granularity group --activation-granularity group --group-size 36 --alpha 0.5 --scale-rule mse",
        "--activation-granularity channel-token --fold-value-rotation --act-order --format-granularity channel",
        "--no-gptq --keep-dtype bfloat16 --include *.to_q --include *.ff.* --guidance 1.0",
    ],
)
def test_options_reach_the_checkpoint(hqdit: Hqdit, models: Models, tmp_path: Path, options: str) -> None:
    arguments = options.split()
    result = tmp_path / "result.json"
    outcome = hqdit("quantize", models.transformer, "--out", tmp_path / "q", *SHORT, *arguments, "--json", result)
    assert (outcome.code, outcome.err) == (0, "")
    config = read(result)["config"]
    for flag, value in zip(arguments, arguments[1:], strict=False):
        key = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and not value.startswith("--") and key in config and key != "include":
            assert str(config[key]) == value
    assert config["gptq"] is ("--no-gptq" not in arguments)
    assert config["act_order"] is ("--act-order" in arguments)
    assert config["fold_value_rotation"] is ("--fold-value-rotation" in arguments)
    if "--include" in arguments:
        assert config["include"] == ["*.to_q", "*.ff.*"]
        assert len(read(result)["layers"]) == 3 * tiny.BLOCKS
        assert load_file(tmp_path / "q" / WEIGHTS_NAME)["proj_out_1.weight"].dtype == torch.bfloat16


def test_overwrite_replaces_the_whole_folder(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "q"
    assert hqdit("quantize", models.transformer, "--out", out, "--preset", "minmax").code == 0
    (out / "left over").touch()
    assert hqdit("quantize", models.transformer, "--out", out, "--preset", "minmax", "--overwrite").code == 0
    assert sorted(tree(tmp_path)) == [
        "deep",
        "deep/q",
        "deep/q/config.json",
        f"deep/q/{WEIGHTS_NAME}",
        f"deep/q/{MANIFEST_NAME}",
    ]


def test_quiet_prints_nothing(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    for command in (
        ("quantize", models.transformer, "--out", tmp_path / "q", "--preset", "minmax"),
        ("sample", models.transformer, "--out", tmp_path / "s", "--num", 1, "--steps", 1),
        ("evaluate", models.quantized, "--against", models.transformer, "--num", 1, "--steps", 1),
        ("inspect", models.quantized),
        ("inject-outliers", models.transformer, "--out", tmp_path / "o"),
        ("dequantize", models.quantized, "--out", tmp_path / "d"),
    ):
        outcome = hqdit(*command, "--quiet")
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


# sample


@pytest.mark.parametrize("kind", ["transformer", "pipeline", "quantized", "quantized_pipeline"])
def test_sample_writes_images_and_a_grid(hqdit: Hqdit, models: Models, tmp_path: Path, kind: str) -> None:
    outcome = hqdit(
        "sample", getattr(models, kind), "--out", tmp_path / "s", "--classes", "3,0, 1", "--num", 5, "--steps", 2,
        "--guidance", 1.0, "--json", tmp_path / "s.json",
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    record = read(tmp_path / "s.json")
    assert record["classes"] == [3, 0, 1, 3, 0] and record["steps"] == 2 and record["guidance"] == 1.0
    assert record["files"] == [f"{i:06d}_class{label}.png" for i, label in enumerate(record["classes"])]
    assert sorted(tree(tmp_path / "s")) == sorted([*record["files"], "grid.png", MANIFEST_NAME])
    for name in record["files"]:
        with Image.open(tmp_path / "s" / name) as image:
            image.load()
            assert image.format == "PNG" and image.size == (8, 8) and image.mode == "L"
    with Image.open(tmp_path / "s" / "grid.png") as grid:
        grid.load()
        assert grid.width > 3 * 8 and grid.height > 2 * 8


def test_classes_default_to_those_of_the_model(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    assert (
        hqdit("sample", models.transformer, "--out", tmp_path / "s", "--steps", 1, "--num", tiny.CLASSES + 1).code == 0
    )
    assert (tmp_path / "s" / f"{tiny.CLASSES:06d}_class0.png").is_file()


def test_the_noise_of_a_sample_depends_on_seed_and_index_only(
    hqdit: Hqdit, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    draw = sampler.starting_noise

    def spy(*arguments: Any) -> torch.Tensor:
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(sampler, "starting_noise", spy)

    def sampled(name: str, *options: object) -> tuple[torch.Tensor, list[Any]]:
        drawn.clear()
        assert hqdit("sample", models.transformer, "--out", tmp_path / name, "--steps", 2, *options).code == 0
        images = [Image.open(path) for path in sorted((tmp_path / name).glob("0*.png"))]
        return torch.cat(drawn), [torch.tensor(list(image.get_flattened_data())) for image in images]

    noise, images = sampled("all", "--num", 7)
    for batch_size in (1, 3, 7):
        same_noise, same_images = sampled(f"by{batch_size}", "--num", 7, "--batch-size", batch_size)
        assert torch.equal(same_noise, noise)
        # A matrix product may round differently in another batch, by less than the step of a pixel.
        assert all(int((a - b).abs().max()) <= 1 for a, b in zip(images, same_images, strict=True))
    assert torch.equal(sampled("fewer", "--num", 4)[0], noise[:4])
    assert torch.equal(sampled("classes", "--num", 7, "--classes", "4", "--guidance", 0)[0], noise)
    assert not torch.equal(sampled("seed", "--num", 7, "--seed", 1)[0], noise)


def test_sample_in_another_dtype_and_on_every_backend(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    for dtype in ("float16", "bfloat16"):
        assert (
            hqdit(
                "sample", models.quantized, "--out", tmp_path / dtype, "--num", 2, "--steps", 2, "--dtype", dtype
            ).code
            == 0
        )
    found = {}
    for backend in RUNNABLE:
        assert (
            hqdit(
                "sample", models.quantized, "--out", tmp_path / backend, "--num", 2, "--steps", 2, "--backend", backend
            ).code
            == 0
        )
        found[backend] = tree(tmp_path / backend)
    assert found["reference"] == found["torch"]


# evaluate


def test_evaluate_writes_the_promised_numbers(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    outcome = hqdit(
        "evaluate",
        models.quantized_pipeline,
        "--against",
        models.pipeline,
        "--steps",
        3,
        "--num",
        2,
        "--json",
        tmp_path / "e.json",
    )
    assert (outcome.code, outcome.err) == (0, "")
    record = read(tmp_path / "e.json")
    assert record["eps_sqnr_db"].keys() == {"conditional", "unconditional", "guided"}
    assert len(record["layer_sqnr_db"]) == LAYERS
    require_finite_numbers(
        [*record["eps_sqnr_db"].values(), record["sample_psnr_db"], *record["layer_sqnr_db"].values()]
    )
    assert record["pairs"] >= 32 and record["images"] == 2 and record["steps"] == 3
    assert record["timesteps"] == len(record["eps_sqnr_db_by_timestep"])
    assert f"{record['eps_sqnr_db']['guided']:.2f} dB" in outcome.out
    assert f"{record['sample_psnr_db']:.2f} dB" in outcome.out
    weakest = min(record["layer_sqnr_db"], key=lambda name: record["layer_sqnr_db"][name])
    assert f"weak layer: {weakest}" in outcome.out


def test_a_float_model_against_itself_is_exact(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    outcome = hqdit(
        "evaluate",
        models.transformer,
        "--against",
        models.transformer,
        "--steps",
        2,
        "--num",
        2,
        "--json",
        tmp_path / "e.json",
    )
    assert (outcome.code, outcome.err) == (0, "") and outcome.out.count("exact") == 4
    record = read(tmp_path / "e.json")
    assert record["eps_sqnr_db"] == {"conditional": None, "unconditional": None, "guided": None}
    assert record["sample_psnr_db"] is None and record["layer_sqnr_db"] == {}


def test_guidance_1_is_the_conditional_prediction(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    common = ("evaluate", models.quantized, "--against", models.transformer, "--steps", 2, "--num", 1)
    assert hqdit(*common, "--guidance", 1, "--json", tmp_path / "e.json").code == 0
    found = read(tmp_path / "e.json")["eps_sqnr_db"]
    assert found["guided"] == pytest.approx(found["conditional"], rel=1e-6)


# inspect


def test_inspect_adds_up(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    outcome = hqdit("inspect", models.quantized, "--json", tmp_path / "i.json")
    assert (outcome.code, outcome.err) == (0, "")
    record = read(tmp_path / "i.json")
    file_bytes = (models.quantized / WEIGHTS_NAME).stat().st_size
    parameters = sum(parameter.numel() for parameter in tiny.tiny_dit().parameters())
    shapes = [
        tuple(module.weight.shape) for name, module in tiny.tiny_dit().named_modules() if name in record["layers"]
    ]
    bits = sum(4 * rows * columns + 32 * rows for rows, columns in shapes)  # codes, and a float32 scale per channel
    assert record["file_bytes"] == file_bytes
    assert record["file_ratio"] == pytest.approx(4 * parameters / file_bytes)
    assert record["bits_per_parameter"] == pytest.approx(8 * file_bytes / parameters)
    assert record["bits_per_weight"] == pytest.approx(bits / sum(rows * columns for rows, columns in shapes))
    assert len(record["layers"]) == len(shapes) == LAYERS
    for facts in record["layers"].values():
        assert facts["formats"] == ["e2m1"] and facts["method"] == "nearest" and facts["rotation"] == "none"
        require_finite_numbers([facts["bits_per_weight"], facts["statistic"]])
    for name in record["layers"]:
        assert f"\n{name} " in outcome.out
    assert f"{file_bytes:,} bytes" in outcome.out
    assert hqdit("inspect", models.quantized_pipeline).out.splitlines()[:-2] == outcome.out.splitlines()[:-2]


def test_inspect_shows_what_the_paper_s_method_decided(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    assert hqdit("quantize", models.transformer, "--out", tmp_path / "q", *SHORT).code == 0
    outcome = hqdit("inspect", tmp_path / "q", "--json", tmp_path / "i.json")
    for facts in read(tmp_path / "i.json")["layers"].values():
        assert (
            facts["method"] == "gptq" and facts["damp_fraction"] > 0 and facts["formats"][0] in ("e3m0", "e2m1", "e1m2")
        )
        assert facts["rotation"].startswith("full ") and facts["activation_granularity"] == "token"
    assert "full 8*36(paley2)" in outcome.out and "gptq" in outcome.out


# dequantize, inject-outliers, doctor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["quantized", "quantized_pipeline"])
def test_dequantize_writes_a_float_model(hqdit: Hqdit, models: Models, tmp_path: Path, kind: str, dtype: str) -> None:
    source = getattr(models, kind)
    outcome = hqdit("dequantize", source, "--out", tmp_path / "d", "--dtype", dtype, "--json", tmp_path / "d.json")
    assert (outcome.code, outcome.err) == (0, "") and f"{LAYERS} layers" in outcome.out
    assert read(tmp_path / "d.json") == {"source": str(source), "layers": LAYERS, "dtype": dtype}
    inner = tmp_path / "d" / "transformer" if kind == "quantized_pipeline" else tmp_path / "d"
    model = tiny.DiTTransformer2DModel.from_pretrained(inner)
    assert "quantization_config" not in model.config and not hasattr(model, "hf_quantizer")
    weight = load(source).get_submodule("transformer_blocks.0.ff.net.2").dequantized_weight()
    assert torch.equal(model.transformer_blocks[0].ff.net[2].weight, weight.to(getattr(torch, dtype)).float())
    assert set(tree(source)) - {"transformer/config.json"} <= set(tree(tmp_path / "d"))


def test_inject_outliers_keeps_the_function(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    outcome = hqdit("inject-outliers", models.pipeline, "--out", tmp_path / "o", "--factor", 30, "--share", 0.1)
    assert (outcome.code, outcome.err) == (0, "")
    assert "stress variant" in outcome.out and "10%" in outcome.out and "times 30" in outcome.out
    source, found = tree(models.pipeline), tree(tmp_path / "o")
    assert {name for name in source if source[name] != found.get(name)} <= {
        "transformer/config.json",
        f"transformer/{WEIGHTS_NAME}",
    }
    exact = tiny.predicted(load(models.pipeline))
    assert float((tiny.predicted(load(tmp_path / "o")) - exact).norm() / exact.norm()) < 1e-5
    assert source[f"transformer/{WEIGHTS_NAME}"] != found[f"transformer/{WEIGHTS_NAME}"]


def test_doctor_names_libraries_and_backends(hqdit: Hqdit, tmp_path: Path) -> None:
    outcome = hqdit("doctor", "--json", tmp_path / "d.json")
    assert (outcome.code, outcome.err) == (0, "")
    record = read(tmp_path / "d.json")
    assert set(record["backends"]) == {"native", "triton", "torch", "reference"}
    assert {record["backends"][name] for name in RUNNABLE} == {"available"}
    assert ("native" in record) == ("native" in RUNNABLE)
    assert record["libraries"]["torch"] == torch.__version__ and torch.__version__ in outcome.out
    for name in (*record["libraries"], *record["backends"]):
        assert name in outcome.out


def test_doctor_says_why_a_backend_is_missing(
    hqdit: Hqdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Models
) -> None:
    monkeypatch.setattr(BACKENDS["torch"], "unavailable_reason", lambda *_: "torch._int_mm is gone", raising=True)
    outcome = hqdit("doctor", "--json", tmp_path / "d.json")
    assert outcome.code == 0 and "torch._int_mm is gone" in outcome.out
    command = ("sample", models.quantized, "--out", tmp_path / "s", "--num", 1, "--steps", 1, "--backend", "torch")
    outcome = hqdit(*command)
    assert outcome.code == 6 and "torch._int_mm is gone" in outcome.first_line and "Fix:" in outcome.first_line


def test_doctor_says_what_is_missing(hqdit: Hqdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "diffusers":
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr("hqdit.cli.doctor.version", version)
    outcome = hqdit("doctor", "--json", tmp_path / "d.json")
    assert outcome.code == 6 and outcome.first_line.startswith("hqdit: error: diffusers: ")
    assert "pip install diffusers" in outcome.out
    assert read(tmp_path / "d.json")["broken"] == ["diffusers"]


# the bundled model


def test_a_short_journey_on_the_bundled_model(hqdit: Hqdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        ("sample", "digits", "--num", 4, "--steps", 2, "--out", "images"),
        ("quantize", "digits", "--preset", "minmax", "--out", "q"),
        ("inspect", "q", "--json", "i.json"),
        ("evaluate", "q", "--against", "digits", "--steps", 3, "--num", 2, "--json", "e.json"),
        ("inject-outliers", "digits", "--out", "stress", "--factor", 10),
        ("sample", "q", "--num", 2, "--steps", 2, "--out", "q images"),
    ):
        outcome = hqdit(*command)
        assert (outcome.code, outcome.err) == (0, ""), command
    assert len(list(Path("images").glob("0*_class*.png"))) == 4
    assert 4 < read(Path("i.json"))["bits_per_weight"] <= 4.3
    require_finite_numbers(read(Path("e.json"))["eps_sqnr_db"].values())
    assert find_model("q").is_pipeline and not find_model("stress").is_quantized


def test_the_smallest_demo(hqdit: Hqdit, tmp_path: Path) -> None:
    outcome = hqdit("demo", "--out", tmp_path / "d", "--num", 8, *SHORT, "--json", tmp_path / "d.json", "--threads", 1)
    assert outcome.code == 0
    report = (tmp_path / "d" / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/png;base64,") == 6  # two models, three methods
    assert "Content-Security-Policy" in report and "<script" not in report
    rows = read(tmp_path / "d.json")["rows"]
    assert [(row["model"], row["method"]) for row in rows] == [
        (model, method)
        for model in ("digits", "digits, outliers c = 10")
        for method in ("float32", "minmax W4A4", "hqdit W4A4")
    ]
    for row in rows:
        assert row["method"] in outcome.out and row["model"] in outcome.out
        require_finite_numbers([row["bits_per_weight"], row["file_bytes"], row["class_accuracy"], row["frechet"]])
        if row["method"] != "float32":
            require_finite_numbers([row["layer_sqnr_db"], row["eps_sqnr_db"]])
            assert row["bits_per_weight"] <= 4.3
    again = hqdit("demo", "--out", tmp_path / "d", "--num", 8)
    assert again.code == 2 and "--overwrite" in again.first_line
