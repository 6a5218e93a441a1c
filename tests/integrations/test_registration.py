"""diffusers knows hqdit whichever is imported first, unless it is told not to."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hqdit.integrations.diffusers_config import HQDiTConfig
from hqdit.integrations.diffusers_quantizer import HQDiTQuantizer
from hqdit.integrations.registration import METHOD, SWITCH, add_to_tables

TABLES = "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as q, AUTO_QUANTIZATION_CONFIG_MAPPING as c\n"
SHOW = f"print(q.get('{METHOD}'), c.get('{METHOD}'))"
BOTH = f"{HQDiTQuantizer} {HQDiTConfig}"


def printed(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "order",
    [
        "import hqdit\n" + TABLES,
        TABLES + "import hqdit\n",
        "import hqdit\nfrom diffusers import DiTTransformer2DModel\n" + TABLES,
        "from diffusers import DiTPipeline\nimport hqdit\n" + TABLES,
        "import hqdit\nhqdit.HQDiTConfig\n" + TABLES,
        "import hqdit.integrations.diffusers_quantizer\n" + TABLES,
    ],
    ids=["hqdit first", "tables first", "model class", "pipeline class", "config", "quantizer"],
)
def test_in_either_order(order: str) -> None:
    assert printed(order + SHOW) == BOTH


def test_the_module_of_the_tables_keeps_its_loader() -> None:
    code = "import hqdit\nimport diffusers.quantizers.auto as tables, inspect\n"
    show = "print(type(tables.__loader__).__name__, tables.__spec__.loader is tables.__loader__)\n"
    assert printed(code + show + "inspect.getsource(tables)") == "SourceFileLoader True"


def test_the_switch() -> None:
    assert printed("import hqdit\n" + TABLES + SHOW, **{SWITCH: "0"}) == "None None"


@pytest.mark.parametrize("present", ["AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"])
def test_an_entry_that_exists_is_not_overwritten(present: str) -> None:
    tables = SimpleNamespace(AUTO_QUANTIZER_MAPPING={}, AUTO_QUANTIZATION_CONFIG_MAPPING={})
    getattr(tables, present)[METHOD] = "diffusers' own"
    add_to_tables(tables)
    found = {**tables.AUTO_QUANTIZER_MAPPING, **tables.AUTO_QUANTIZATION_CONFIG_MAPPING}
    assert found == {METHOD: "diffusers' own"}
