"""Inception-v3 with random weights: names, shapes, poolings, the resize, and loading; the real weights are not here."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import require_complete
from torch import Tensor
from torch.nn import functional

from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.evaluation import inception
from hqdit.evaluation.image_metrics import metric_name
from hqdit.evaluation.inception import PUBLIC_NAME, PUBLIC_SHA256, InceptionExtractor
from hqdit.evaluation.inception_network import (
    InceptionNetwork,
    average_pool,
    max_pool,
    reducing_max_pool,
    resize_bilinear_tf1,
)

#: Convolutions as (name, in, out, height, width), by hand from the paper's figures 5 to 7 and its table 1.
STEM = """
Conv2d_1a_3x3 3 32 3 3
Conv2d_2a_3x3 32 32 3 3
Conv2d_2b_3x3 32 64 3 3
Conv2d_3b_1x1 64 80 1 1
Conv2d_4a_3x3 80 192 3 3
"""
BLOCK_A = """
branch1x1 {i} 64 1 1
branch5x5_1 {i} 48 1 1
branch5x5_2 48 64 5 5
branch3x3dbl_1 {i} 64 1 1
branch3x3dbl_2 64 96 3 3
branch3x3dbl_3 96 96 3 3
branch_pool {i} {c} 1 1
"""
BLOCK_B = """
branch3x3 288 384 3 3
branch3x3dbl_1 288 64 1 1
branch3x3dbl_2 64 96 3 3
branch3x3dbl_3 96 96 3 3
"""
BLOCK_C = """
branch1x1 768 192 1 1
branch7x7_1 768 {c} 1 1
branch7x7_2 {c} {c} 1 7
branch7x7_3 {c} 192 7 1
branch7x7dbl_1 768 {c} 1 1
branch7x7dbl_2 {c} {c} 7 1
branch7x7dbl_3 {c} {c} 1 7
branch7x7dbl_4 {c} {c} 7 1
branch7x7dbl_5 {c} 192 1 7
branch_pool 768 192 1 1
"""
BLOCK_D = """
branch3x3_1 768 192 1 1
branch3x3_2 192 320 3 3
branch7x7x3_1 768 192 1 1
branch7x7x3_2 192 192 1 7
branch7x7x3_3 192 192 7 1
branch7x7x3_4 192 192 3 3
"""
BLOCK_E = """
branch1x1 {i} 320 1 1
branch3x3_1 {i} 384 1 1
branch3x3_2a 384 384 1 3
branch3x3_2b 384 384 3 1
branch3x3dbl_1 {i} 448 1 1
branch3x3dbl_2 448 384 3 3
branch3x3dbl_3a 384 384 1 3
branch3x3dbl_3b 384 384 3 1
branch_pool {i} 192 1 1
"""
BLOCKS = {
    "Mixed_5b": BLOCK_A.format(i=192, c=32),
    "Mixed_5c": BLOCK_A.format(i=256, c=64),
    "Mixed_5d": BLOCK_A.format(i=288, c=64),
    "Mixed_6a": BLOCK_B,
    "Mixed_6b": BLOCK_C.format(c=128),
    "Mixed_6c": BLOCK_C.format(c=160),
    "Mixed_6d": BLOCK_C.format(c=160),
    "Mixed_6e": BLOCK_C.format(c=192),
    "Mixed_7a": BLOCK_D,
    "Mixed_7b": BLOCK_E.format(i=1280),
    "Mixed_7c": BLOCK_E.format(i=2048),
}


def expected_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for prefix, table in (("", STEM), *((f"{name}.", table) for name, table in BLOCKS.items())):
        for line in table.split("\n"):
            if line:
                name, *numbers = line.split()
                into, out, height, width = map(int, numbers)
                shapes[f"{prefix}{name}.conv.weight"] = (out, into, height, width)
                for part in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{prefix}{name}.bn.{part}"] = (out,)
    return shapes


@pytest.fixture(scope="module")
def network() -> InceptionNetwork:
    """Random weights whose activations neither vanish nor explode, and normalizations that are not the identity."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        built = InceptionNetwork().eval()
        for module in built.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, torch.nn.BatchNorm2d):
                for values, low, high in (
                    (module.weight, 0.8, 1.2),
                    (module.bias, -0.1, 0.1),
                    (module.running_mean, -0.1, 0.1),
                    (module.running_var, 0.8, 1.2),
                ):
                    assert values is not None
                    values.uniform_(low, high)
    return built.requires_grad_(False)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 3, 40, 24), generator=torch.Generator().manual_seed(1)).float()


def weights_file(network: InceptionNetwork, folder: Path, name: str = "weights.pth") -> tuple[Path, str]:
    path = folder / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


# Structure


def test_names_and_shapes_are_those_of_the_public_conversion(network: InceptionNetwork) -> None:
    found = {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert found == expected_shapes()
    assert len(found) == 94 * 5 + 2


def test_parameters_are_counted(network: InceptionNetwork) -> None:
    trained = {n: s for n, s in expected_shapes().items() if "running" not in n}
    # torchvision's 1,000-class network without the auxiliary head has 23,834,568; eight more classes of 2,049 each.
    assert sum(math.prod(shape) for shape in trained.values()) == 23_834_568 + 8 * 2049 == 23_850_960
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960


def plain_forward(weights: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    """Every branch written out, from the weights alone, in float64."""

    def unit(x: Tensor, name: str, stride: int = 1, same: bool = True) -> Tensor:
        kernel = weights[f"{name}.conv.weight"].double()
        padding = ((kernel.shape[2] - 1) // 2, (kernel.shape[3] - 1) // 2) if same else (0, 0)
        x = functional.conv2d(x, kernel, stride=stride, padding=padding)
        mean, variance, scale, shift = (
            weights[f"{name}.bn.{part}"].double()[:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (variance + 0.001).sqrt() * scale + shift).clamp(min=0)

    def chain(x: Tensor, prefix: str, *names: str) -> Tensor:
        for name in names:
            x = unit(x, f"{prefix}.{name}")
        return x

    def average(x: Tensor) -> Tensor:
        ones = torch.ones_like(x[:1, :1])
        window = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        flat = x.reshape(-1, 1, *x.shape[2:])
        summed = functional.conv2d(flat, window, padding=1) / functional.conv2d(ones, window, padding=1)
        return summed.reshape(x.shape)

    def halved(x: Tensor) -> Tensor:
        return functional.max_pool2d(x, 3, 2)

    x = (resize_bilinear_tf1(pixels, 299, 299).double() - 128) * 0.0078125
    x = unit(x, "Conv2d_1a_3x3", 2, same=False)
    x = unit(unit(x, "Conv2d_2a_3x3", same=False), "Conv2d_2b_3x3")
    x = unit(unit(halved(x), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", same=False)
    x = halved(x)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        parts = [
            chain(x, name, "branch1x1"),
            chain(x, name, "branch5x5_1", "branch5x5_2"),
            chain(x, name, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            chain(average(x), name, "branch_pool"),
        ]
        x = torch.cat(parts, 1)
    reduced = chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2")
    parts = [unit(x, "Mixed_6a.branch3x3", 2, same=False), unit(reduced, "Mixed_6a.branch3x3dbl_3", 2, same=False)]
    x = torch.cat([*parts, halved(x)], 1)
    spatial = x
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        if name == "Mixed_6d":
            spatial = chain(x, name, "branch1x1")
        parts = [
            chain(x, name, "branch1x1"),
            chain(x, name, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
            chain(x, name, *(f"branch7x7dbl_{k}" for k in range(1, 6))),
            chain(average(x), name, "branch_pool"),
        ]
        x = torch.cat(parts, 1)
    reduced = chain(x, "Mixed_7a", "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    first = unit(chain(x, "Mixed_7a", "branch3x3_1"), "Mixed_7a.branch3x3_2", 2, same=False)
    x = torch.cat([first, unit(reduced, "Mixed_7a.branch7x7x3_4", 2, same=False), halved(x)], 1)
    for name, pool in (("Mixed_7b", average), ("Mixed_7c", lambda x: functional.max_pool2d(x, 3, 1, 1))):
        middle = chain(x, name, "branch3x3_1")
        double = chain(x, name, "branch3x3dbl_1", "branch3x3dbl_2")
        parts = [
            chain(x, name, "branch1x1"),
            *(chain(middle, name, f"branch3x3_2{side}") for side in "ab"),
            *(chain(double, name, f"branch3x3dbl_3{side}") for side in "ab"),
            chain(pool(x), name, "branch_pool"),
        ]
        x = torch.cat(parts, 1)
    pooled = x.mean(dim=(2, 3))
    return {"pooled": pooled, "spatial": spatial, "logits": pooled @ weights["fc.weight"].double().T}


def test_a_second_plain_implementation_agrees(network: InceptionNetwork, pixels: Tensor) -> None:
    expected = plain_forward(network.state_dict(), pixels)
    found = network(pixels)
    # float32 against float64 over 47 layers in a row.
    for name in ("pooled", "logits"):
        value = getattr(found, name).double()
        assert float((value - expected[name]).norm() / expected[name].norm()) <= 1e-5
        assert float(expected[name].std()) > 1e-3
    places = [(y, x, c) for y in range(17) for x in range(17) for c in range(7)]
    by_hand = [[float(expected["spatial"][n, c, y, x]) for y, x, c in places] for n in range(2)]
    assert found.spatial.shape == (2, 2023)
    np.testing.assert_allclose(found.spatial.numpy(), by_hand, rtol=1e-3, atol=1e-4 * float(expected["spatial"].max()))


def test_the_bias_is_not_used(network: InceptionNetwork, pixels: Tensor) -> None:
    before = network(pixels[:1]).logits
    bias = network.fc.bias.clone()
    network.fc.bias.fill_(1e3)
    assert torch.equal(network(pixels[:1]).logits, before)
    network.fc.bias.copy_(bias)


def naive_pool(x: np.ndarray, kind: str, stride: int, padding: int) -> np.ndarray:
    """Over the pixels that exist in each window of 3x3."""
    rows = range(-padding, x.shape[0] + padding - 2, stride)
    columns = range(-padding, x.shape[1] + padding - 2, stride)
    reduce = {"average": np.mean, "max": np.max}[kind]
    return np.array([[reduce(x[max(top, 0) : top + 3, max(left, 0) : left + 3]) for left in columns] for top in rows])


@pytest.mark.parametrize("size", [(3, 3), (5, 4), (8, 8), (17, 17)])
def test_pools_against_loops(size: tuple[int, int]) -> None:
    x = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 3  # all below zero
    pools = ((average_pool, "average", 1, 1), (max_pool, "max", 1, 1), (reducing_max_pool, "max", 2, 0))
    for pool, kind, stride, padding in pools:
        expected = naive_pool(x[0, 0].numpy(), kind, stride, padding)
        np.testing.assert_allclose(pool(x)[0, 0].numpy(), expected, rtol=1e-14)


# Resize


def resized_pixel(image: np.ndarray, row: int, column: int, height: int, width: int) -> np.float32:
    """One pixel in float32 scalars, as TensorFlow's legacy kernel forms it."""

    def along(position: int, in_size: int, out_size: int) -> tuple[int, int, np.float32]:
        place = np.float32(position) * (np.float32(in_size) / np.float32(out_size))
        low = int(np.floor(place))
        return low, min(low + 1, in_size - 1), place - np.float32(low)

    top, bottom, down = along(row, image.shape[0], height)
    left, right, across = along(column, image.shape[1], width)
    upper = image[top, left] + (image[top, right] - image[top, left]) * across
    lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * across
    return np.float32(upper + (lower - upper) * down)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_resize_is_bit_exact(in_height: int, in_width: int, height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (in_height, in_width)).astype(np.float32)
    found = resize_bilinear_tf1(torch.from_numpy(image)[None, None], height, width)[0, 0].numpy()
    assert found.shape == (height, width)
    for row, column in zip(rng.integers(0, height, 10), rng.integers(0, width, 10), strict=True):
        assert found[row, column] == resized_pixel(image, int(row), int(column), height, width)
    assert found[-1, -1] == resized_pixel(image, height - 1, width - 1, height, width)


def test_resize_by_hand() -> None:
    # Two pixels to four: positions 0, 1/2, 1, 3/2, where the last pixel is repeated. Half-pixel centres would give
    # 0, 1/4, 3/4, 1 of the way.
    image = torch.tensor([[[[0.0, 8.0]]]])
    assert resize_bilinear_tf1(image, 1, 4).flatten().tolist() == [0.0, 4.0, 8.0, 8.0]
    assert resize_bilinear_tf1(image, 1, 2).flatten().tolist() == [0.0, 8.0]


def test_an_image_of_the_networks_size_is_not_changed() -> None:
    image = torch.rand(1, 3, 299, 299) * 255
    assert torch.equal(resize_bilinear_tf1(image, 299, 299), image)


# Extractor


def test_extraction(network: InceptionNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "_BATCH", 2)
    extractor = InceptionExtractor("inception-v3-00000000", network)
    levels = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(3)).float()
    images = levels / 127.5 - 1
    found = extractor.extract(images)
    assert found.spatial is not None and found.probabilities is not None
    assert (found.pooled.shape, found.spatial.shape, found.probabilities.shape) == ((3, 2048), (3, 2023), (3, 1008))
    assert {found.pooled.dtype, found.spatial.dtype, found.probabilities.dtype} == {np.dtype(np.float64)}
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=0, atol=1e-12)
    # The same levels, three equal channels, other batches.
    outputs = network(levels.expand(-1, 3, -1, -1))
    for mine, direct in ((found.pooled, outputs.pooled), (found.spatial, outputs.spatial)):
        assert np.linalg.norm(mine - direct.double().numpy()) <= 1e-5 * np.linalg.norm(mine)
    expected = torch.softmax(outputs.logits.double(), dim=1).numpy()
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-3, atol=1e-6)
    # Between two levels of a file: rounded to the nearer one.
    nearby = extractor.extract((images + 0.3 / 127.5).clamp(-1, 1))
    assert np.linalg.norm(nearby.pooled - found.pooled) <= 1e-5 * np.linalg.norm(found.pooled)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 8, 8),
        torch.zeros(2, 2, 8, 8),
        torch.zeros(0, 3, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.full((2, 3, 8, 8), 1.5),
        torch.full((2, 3, 8, 8), math.nan),
    ],
)
def test_other_images_are_refused(network: InceptionNetwork, images: Tensor) -> None:
    with pytest.raises(UsageError, match="inception-v3-x: found"):
        InceptionExtractor("inception-v3-x", network).extract(images)


def test_non_finite_features_are_refused(network: InceptionNetwork) -> None:
    mean = network.get_buffer("Mixed_7c.branch1x1.bn.running_mean")
    before = mean.clone()
    mean[0] = -math.inf
    with pytest.raises(NumericsError, match="found NaN or infinite features"):
        InceptionExtractor("inception-v3-x", network).extract(torch.zeros(1, 3, 8, 8))
    mean.copy_(before)


# Weights


def test_the_public_digest_is_the_one_in_the_public_file_name() -> None:
    assert PUBLIC_SHA256.startswith("6726825d") and len(PUBLIC_SHA256) == 64


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_loading_gives_the_stored_weights(network: InceptionNetwork, tmp_path: Path, name: str) -> None:
    path, digest = weights_file(network, tmp_path, name)
    extractor = InceptionExtractor.load(path, digest.upper())
    assert extractor.name == f"inception-v3-{digest[:8]}"
    assert not extractor.network.training
    assert not any(parameter.requires_grad for parameter in extractor.network.parameters())
    stored = network.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in extractor.network.state_dict().items())


def test_only_the_public_weights_give_plain_names(
    network: InceptionNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = weights_file(network, tmp_path)
    other = InceptionExtractor.load(path, digest)
    assert metric_name("Fréchet distance", other) == f"FID (inception-v3-{digest[:8]})"
    monkeypatch.setattr(inception, "PUBLIC_SHA256", digest)
    public = InceptionExtractor.load(path)
    assert public.name == PUBLIC_NAME
    metrics = ("Fréchet distance", "spatial Fréchet distance", "classifier score", "recall")
    names = [metric_name(metric, public) for metric in metrics]
    assert names == ["FID", "sFID", "Inception Score", "recall"]


def test_other_weights_need_their_own_digest(network: InceptionNetwork, tmp_path: Path) -> None:
    path, digest = weights_file(network, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        InceptionExtractor.load(path)
    require_complete(caught.value, digest, PUBLIC_SHA256, "--sha256")
    with pytest.raises(CheckpointError, match="as given"):
        InceptionExtractor.load(path, "0" * 64)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        InceptionExtractor.load(path, digest[:8])


def test_other_state_dicts_are_refused(tmp_path: Path) -> None:
    # Zeros that are stored once for each tensor keep the files small.
    state = {name: torch.zeros(1).expand(shape) for name, shape in expected_shapes().items()}
    without = {name: value for name, value in state.items() if name != "Mixed_7c.branch1x1.conv.weight"}
    broken = {
        "first: Mixed_7c.branch1x1.conv.weight": without,
        "first: AuxLogits.fc.weight": {**state, "AuxLogits.fc.weight": torch.zeros(1)},
        "first: fc.bias": {**state, "fc.bias": torch.zeros(1000)},
        "first: fc.weight": {**state, "fc.weight": torch.full((1,), math.nan).expand(1008, 2048)},
        "found list": [1, 2],
    }
    for match, content in broken.items():
        path = tmp_path / "other.pth"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=match):
            InceptionExtractor.load(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_state_dict_without_batch_counts_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in expected_shapes().items()}, path)
    extractor = InceptionExtractor.load(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert not any(value.is_meta for value in extractor.network.state_dict().values())


class Evil:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("run",))


def test_files_that_are_no_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    torch.save({"x": Evil()}, buffer)
    contents = {"a.pth": b"not a file of torch", "b.pth": b"", "c.safetensors": b"short", "d.pth": buffer.getvalue()}
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            InceptionExtractor.load(path, hashlib.sha256(content).hexdigest())
        require_complete(caught.value, name)
    assert "run" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no file that can be read"):
        InceptionExtractor.load(tmp_path / "missing.pth")
