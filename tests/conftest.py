"""What every test shares: how hypothesis searches."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads this when it is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline and no complaint about slow data: a busy machine is not a failure. A failing example prints its blob.
settings.register_profile("hqdit", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hqdit")


def pytest_configure(config: pytest.Config) -> None:
    """Know the marks of diffusers' tests, where tests/integrations/test_diffusers_mixin.py runs them."""
    checkout = os.environ.get("HQDIT_DIFFUSERS_TESTS")
    if checkout:
        text = (Path(checkout) / "tests" / "testing_utils.py").read_text(encoding="utf-8")
        for mark in sorted(set(re.findall(r"pytest\.mark\.([a-z_]+)", text))):
            config.addinivalue_line("markers", f"{mark}: of diffusers' tests")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny matrices gain nothing from threads; beside another busy process their barriers cost a factor of 40.
    torch.set_num_threads(1)
