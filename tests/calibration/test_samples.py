"""Calibration sets: where their tuples come from, how they are stored, and which ones are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import CLASSES, WIDTH, calibration, ddim, inputs_of, latent_dit, require_complete, tiny_dit
from torch import Tensor, nn

from hqdit.calibration.samples import MIN_TRAJECTORIES, CalibrationSet
from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.sampling.noise import CALIBRATION, EVALUATION, SAMPLE, starting_noise
from hqdit.sampling.sampler import BATCH_SIZE, SamplingConfig, sample_latents

STEPS = 4


def fields(samples: int = 5) -> dict[str, Any]:
    return {**inputs_of(tiny_dit(), samples)}


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(NumericsError) as info:
        call()
    assert info.value.exit_code == 4
    require_complete(info.value, *parts)


# --- from the model's own sampler


@pytest.mark.parametrize("samples", [1, 2, 31, 128, 129, 300])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_exactly_as_many_as_asked_for(samples: int, guidance: float) -> None:
    found = CalibrationSet.from_sampler(tiny_dit(), ddim(), samples, SamplingConfig(STEPS, guidance))
    assert len(found) == samples
    assert found.latents.shape == (samples, 1, 8, 8) and found.latents.dtype == torch.float32
    assert found.timesteps.shape == found.classes.shape == (samples,)
    assert found.timesteps.dtype == found.classes.dtype == torch.int64
    found.require_fits(tiny_dit())


def test_seeded_and_reproducible() -> None:
    def draw(seed: int) -> CalibrationSet:
        return CalibrationSet.from_sampler(tiny_dit(), ddim(), 40, SamplingConfig(STEPS), seed)

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first.latents, again.latents)
    assert first.fingerprint == again.fingerprint
    assert first.origin == again.origin
    assert first.fingerprint != other.fingerprint
    for part in ("seed 1", f"{STEPS} steps", "guidance 1.5", "trajectories"):
        assert part in other.origin


def test_global_random_state_is_not_used() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = CalibrationSet.from_sampler(tiny_dit(), ddim(), 20, SamplingConfig(STEPS))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert CalibrationSet.from_sampler(tiny_dit(), ddim(), 20, SamplingConfig(STEPS)).fingerprint == first.fingerprint


def every_tuple(guidance: float = 1.5) -> CalibrationSet:
    """All tuples of the fewest trajectories."""
    branches = 1 if guidance == 1.0 else 2
    return CalibrationSet.from_sampler(
        tiny_dit(), ddim(), MIN_TRAJECTORIES * STEPS * branches, SamplingConfig(STEPS, guidance)
    )


def test_all_steps_and_both_branches() -> None:
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    found = every_tuple()
    counts = Counter(zip(found.timesteps.tolist(), (found.classes == CLASSES).tolist(), strict=True))
    assert counts == {(int(t), null): MIN_TRAJECTORIES for t in scheduler.timesteps for null in (False, True)}
    # 16 trajectories over 5 classes: every class three times and one four times.
    per_class = Counter(found.classes[found.classes < CLASSES].tolist())
    assert sorted(per_class.values()) == [3 * STEPS] * 4 + [4 * STEPS]


def test_a_choice_covers_steps_classes_and_branches() -> None:
    found = CalibrationSet.from_sampler(tiny_dit(), ddim(), 200, SamplingConfig(20))
    # 200 of 16 x 20 x 2 = 640 tuples: the seeded choice misses a given step (32 tuples) with probability
    # (1 - 200/640)^32 = 6e-6; nothing is left to chance on a second run.
    assert len(set(found.timesteps.tolist())) == 20
    assert set(found.classes.tolist()) == set(range(CLASSES + 1))
    # Half of the tuples are of the null class; 5 standard deviations of a choice without replacement are 29.
    assert abs(int((found.classes == CLASSES).sum()) - 100) <= 29


def test_chosen_without_replacement() -> None:
    found = every_tuple()
    keys = {
        (*latents.flatten().tolist(), int(t), int(c))
        for latents, t, c in zip(found.latents, found.timesteps, found.classes, strict=True)
    }
    assert len(keys) == len(found)


def test_guidance_of_one_has_no_null_class() -> None:
    assert set(every_tuple(guidance=1.0).classes.tolist()) == set(range(CLASSES))


def test_model_without_a_null_class() -> None:
    model = tiny_dit()
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table = nn.Embedding(CLASSES, WIDTH)
    found = CalibrationSet.from_sampler(model, ddim(), 30, SamplingConfig(STEPS, 1.0))
    assert set(found.classes.tolist()) <= set(range(CLASSES))
    with pytest.raises(UsageError):
        CalibrationSet.from_sampler(model, ddim(), 30, SamplingConfig(STEPS, 1.5))


def as_rows(latents: Tensor, timesteps: list[int], classes: list[int]) -> Counter[tuple[float, ...]]:
    return Counter((*x.flatten().tolist(), t, c) for x, t, c in zip(latents, timesteps, classes, strict=True))


@pytest.mark.parametrize("build", [tiny_dit, latent_dit])
@pytest.mark.parametrize(("trajectories", "steps"), [(MIN_TRAJECTORIES, STEPS), (BATCH_SIZE + 9, 1)])
def test_tuples_are_those_of_the_sampler(build: Callable[[], Any], trajectories: int, steps: int) -> None:
    """Run again from the calibration noise, the sampler passes through exactly these inputs of the model."""
    model, scheduler = build(), ddim()
    found = CalibrationSet.from_sampler(model, scheduler, 2 * trajectories * steps, SamplingConfig(steps))
    noise = starting_noise(0, CALIBRATION, range(trajectories), tuple(found.latents.shape[1:]))
    scheduler.set_timesteps(steps)
    started = [
        (tuple(x.flatten().tolist()), c)
        for x, t, c in zip(found.latents, found.timesteps.tolist(), found.classes.tolist(), strict=True)
        if t == int(scheduler.timesteps[0]) and c != CLASSES
    ]
    class_of = dict(started)
    labels = [class_of[tuple(row.flatten().tolist())] for row in noise]
    passed: Counter[tuple[float, ...]] = Counter()

    def observe(_step: int, timestep: int, latents: Tensor) -> None:
        for classes in (labels, [CLASSES] * trajectories):
            passed.update(as_rows(latents, [timestep] * trajectories, classes))

    sample_latents(model, scheduler, noise, torch.tensor(labels), SamplingConfig(steps), observe)
    assert as_rows(found.latents, found.timesteps.tolist(), found.classes.tolist()) == passed


def test_noise_is_disjoint_from_sampling_and_evaluation() -> None:
    found = every_tuple()
    numbers = set(found.latents.flatten().tolist())
    trajectories = range(MIN_TRAJECTORIES)
    own = starting_noise(0, CALIBRATION, trajectories, (1, 8, 8))
    assert set(own.flatten().tolist()) <= numbers  # every trajectory starts from calibration noise
    for purpose in (SAMPLE, EVALUATION):
        other = starting_noise(0, purpose, trajectories, (1, 8, 8)).flatten().tolist()
        # Of 1024 random floats a handful may coincide by chance; a shared sample would be 64 at once.
        assert len(numbers & set(other)) <= 5


@pytest.mark.parametrize("samples", [0, -1])
def test_too_few_samples_asked_for(samples: int) -> None:
    with pytest.raises(UsageError) as info:
        CalibrationSet.from_sampler(tiny_dit(), ddim(), samples)
    assert info.value.exit_code == 2
    require_complete(info.value, "--calibration-samples", str(samples))


# --- files


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    calibration().save(path)
    found = CalibrationSet.from_file(path)
    for name in ("latents", "timesteps", "classes"):
        assert torch.equal(getattr(found, name), getattr(calibration(), name))
        assert getattr(found, name).dtype == getattr(calibration(), name).dtype
    assert found.fingerprint == calibration().fingerprint
    assert found.origin == "set.safetensors"


def test_fingerprint_covers_every_field() -> None:
    prints = {CalibrationSet(**fields()).fingerprint}
    for name in ("latents", "timesteps", "classes"):
        changed = fields()
        changed[name].view(-1)[-1] += 1
        prints.add(CalibrationSet(**changed).fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_file_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {
        "latents": fields()["latents"].to(dtype),
        "timesteps": fields()["timesteps"].int(),
        "classes": fields()["classes"].to(torch.uint8),
        "something else": torch.zeros(1),
    }
    save_file(stored, tmp_path / "x.safetensors")
    found = CalibrationSet.from_file(tmp_path / "x.safetensors")
    assert torch.equal(found.latents, stored["latents"].float())
    assert found.timesteps.dtype == found.classes.dtype == torch.int64
    assert torch.equal(found.timesteps, fields()["timesteps"]) and torch.equal(found.classes, fields()["classes"])


@pytest.mark.parametrize(
    "missing", [["latents"], ["timesteps"], ["classes"], ["classes", "timesteps", "latents"]], ids=str
)
def test_file_without_a_field(tmp_path: Path, missing: list[str]) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: value for name, value in fields().items() if name not in missing}, path)
    with pytest.raises(CheckpointError) as info:
        CalibrationSet.from_file(path)
    assert info.value.exit_code == 3
    require_complete(info.value, str(path), *missing)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    calibration().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    for broken in (path, tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(CheckpointError) as info:
            CalibrationSet.from_file(broken)
        require_complete(info.value, str(broken))


# --- bad sets, in memory and in a file


def with_bad(sample: int, value: float) -> Tensor:
    latents = fields()["latents"]
    latents[sample:, 0, 3, 4] = value
    return latents


BAD: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "empty": ({name: value[:0] for name, value in fields().items()}, ("no samples",)),
    "NaN": ({"latents": with_bad(2, float("nan"))}, ("latents", "3 samples", "sample 2")),
    "infinity": ({"latents": with_bad(4, -float("inf"))}, ("latents", "1 samples", "sample 4")),
    "fewer timesteps": ({"timesteps": torch.zeros(4, dtype=torch.int64)}, ("timesteps", "(4,)")),
    "more classes": ({"classes": torch.zeros(6, dtype=torch.int64)}, ("classes", "(6,)")),
    "flat latents": ({"latents": torch.zeros(5, 64)}, ("latents", "(5, 64)")),
    "scalar timestep": ({"timesteps": torch.tensor(3)}, ("timesteps", "()")),
    "scalar everything": ({name: value.flatten()[0] for name, value in fields().items()}, ("latents", "()")),
    "one-hot classes": ({"classes": torch.zeros(5, 6, dtype=torch.int64)}, ("classes", "(5, 6)")),
    "float timesteps": ({"timesteps": torch.linspace(0, 1, 5)}, ("timesteps", "torch.float32")),
    "float classes": ({"classes": torch.zeros(5)}, ("classes", "torch.float32")),
    "bytes as latents": ({"latents": torch.zeros(5, 1, 8, 8, dtype=torch.uint8)}, ("latents", "torch.uint8")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sets(case: str, tmp_path: Path) -> None:
    changes, parts = BAD[case]
    bad = {**fields(), **changes}
    refused(lambda: CalibrationSet(**bad), "calibration (given)", *parts)
    save_file(bad, tmp_path / "bad.safetensors")
    refused(lambda: CalibrationSet.from_file(tmp_path / "bad.safetensors"), "calibration (bad.safetensors)", *parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_latents_in_memory_are_float32(dtype: torch.dtype) -> None:
    refused(lambda: CalibrationSet(**{**fields(), "latents": fields()["latents"].to(dtype)}), "latents", str(dtype))


def test_too_large_for_float32(tmp_path: Path) -> None:
    latents = fields()["latents"].double()
    latents[3] = 1e300
    save_file({**fields(), "latents": latents}, tmp_path / "x.safetensors")
    refused(lambda: CalibrationSet.from_file(tmp_path / "x.safetensors"), "latents", "sample 3")


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("classes", -1, "0 to 5"),
        ("classes", 6, "0 to 5"),
        ("classes", 2**40, "0 to 5"),
        ("timesteps", -1, "0 to 999"),
        ("timesteps", 1000, "0 to 999"),
    ],
)
def test_values_that_the_model_does_not_know(name: str, value: int, needed: str) -> None:
    bad = fields()
    bad[name][3:] = value
    found = CalibrationSet(**bad)
    refused(lambda: found.require_fits(tiny_dit()), name, "sample 3", str(value), needed)


def test_null_class_needs_a_model_that_has_one() -> None:
    model = tiny_dit()
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table = nn.Embedding(CLASSES, WIDTH)
    null = fields()
    null["classes"][:] = CLASSES
    CalibrationSet(**null).require_fits(tiny_dit())
    refused(lambda: CalibrationSet(**null).require_fits(model), "classes", "sample 0", "0 to 4")


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 16, 16), (1, 8, 4)])
def test_latents_of_another_model(shape: tuple[int, ...]) -> None:
    found = CalibrationSet(**{**fields(), "latents": torch.zeros(5, *shape)})
    refused(lambda: found.require_fits(tiny_dit()), str(shape), "(1, 8, 8)")
