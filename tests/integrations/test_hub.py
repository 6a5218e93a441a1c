"""What is uploaded to the hub: the files of `save_pretrained` and a card that says how to load them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from small_models import DIT
from tiny import calibration, file_hashes, require_complete, tiny_dit

import hqdit
from hqdit.errors import UsageError
from hqdit.integrations import hub
from hqdit.integrations.hub import CARD_NAME, model_card, write_hub_folder
from hqdit.models.weights import INDEX_NAME, WEIGHTS_NAME
from hqdit.pipeline import quantize as quantizing
from hqdit.pipeline.config import QuantizationConfig


def quantized() -> Any:
    return hqdit.quantize(tiny_dit(), QuantizationConfig(gptq=False))


class Hub:
    """Stands for the hub: remembers what it is given."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        Hub.created = (repo_id, private, exist_ok, self.token)
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, create_pr: bool) -> Any:
        Hub.uploaded = (repo_id, commit_message, create_pr)
        Hub.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return SimpleNamespace(pr_url="https://hub/pr" if create_pr else None, commit_url="https://hub/commit")


def test_push_to_hub_uploads_weights_config_and_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "HfApi", Hub)
    model = quantized()
    assert hqdit.push_to_hub(model, "tiny", private=True, token="secret") == "https://hub/commit"
    assert Hub.created == ("tiny", True, True, "secret")
    assert Hub.uploaded == ("me/tiny", "Upload DiTTransformer2DModel quantized by hqdit", False)
    assert set(Hub.files) == {CARD_NAME, "config.json", WEIGHTS_NAME}
    for name, content in Hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(DIT.output(DiTTransformer2DModel.from_pretrained(tmp_path)), DIT.output(model))
    assert hqdit.push_to_hub(model, "tiny", create_pr=True, commit_message="x") == "https://hub/pr"
    assert Hub.uploaded == ("me/tiny", "x", True)


def test_the_card_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized()
    write_hub_folder(model, tmp_path / "me" / "tiny", "me/tiny")
    card = (tmp_path / "me" / "tiny" / CARD_NAME).read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    assert code.startswith("import hqdit")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert torch.equal(DIT.output(scope["transformer"]), DIT.output(model))


def test_the_card_says_what_the_model_is() -> None:
    model = hqdit.quantize(tiny_dit(), None, calibration())
    card = model_card(model, "me/tiny")
    assert card.startswith("---\nlibrary_name: diffusers\n") and "\n# tiny\n" in card
    for part in ("| quantized layers | 14 |", "74.6 % of 250,072", "bits per weight", "- hqdit", '"gptq": true'):
        assert part in card, part
    assert calibration().origin in card
    assert "/tmp" not in card and "{" not in card.replace(card.partition("```json")[2], "")


def test_the_folder_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_hub_folder(quantized(), tmp_path / name, "me/tiny", max_shard_size="50KB")
    assert (tmp_path / "one" / INDEX_NAME).exists()
    assert file_hashes(tmp_path / "one") == file_hashes(tmp_path / "two")


def test_the_pipelines_own_result_is_written_too(tmp_path: Path) -> None:
    model: Any = quantizing.quantize(tiny_dit(), QuantizationConfig(gptq=False))
    write_hub_folder(model, tmp_path, "me/tiny")
    assert torch.equal(DIT.output(DiTTransformer2DModel.from_pretrained(tmp_path)), DIT.output(model))


def test_float_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_hub_folder(tiny_dit(), tmp_path / "x", "me/tiny")
    require_complete(caught.value, "model card", "float")
    assert not (tmp_path / "x").exists()
