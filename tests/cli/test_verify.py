"""`hqdit verify` as a user calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import Hqdit, Models

from hqdit.models.weights import WEIGHTS_NAME


def test_a_sound_folder(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    for folder in (models.quantized, models.quantized_pipeline):
        outcome = hqdit("verify", folder, "--json", tmp_path / "v.json")
        assert (outcome.code, outcome.err) == (0, "") and "all as written" in outcome.out
        found = json.loads((tmp_path / "v.json").read_text())
        assert (
            found["is_sound"] and found["files"] >= 2 and found["missing"] == found["extra"] == found["changed"] == []
        )


def test_a_changed_folder(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.quantized, tmp_path / "q"))
    content = bytearray((folder / WEIGHTS_NAME).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(content)
    (folder / "name \x1b[2J").touch()
    outcome = hqdit("verify", folder, "--json", tmp_path / "v.json")
    assert outcome.code == 7 and "0 missing, 1 extra, 1 changed" in outcome.first_line
    assert f"  changed  {WEIGHTS_NAME}" in outcome.err and "  extra    name \\x1b[2J" in outcome.err
    found = json.loads((tmp_path / "v.json").read_text())
    assert not found["is_sound"] and found["changed"] == [WEIGHTS_NAME]


def test_what_is_no_published_folder(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    assert hqdit("verify", models.transformer).code == 7  # never had a manifest
    assert hqdit("verify", tmp_path / "missing").code == 3
