"""What every test shares: how hypothesis searches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline and no complaint about slow data: a busy machine is not a failure. A failing example prints its blob.
settings.register_profile("hqdit", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hqdit")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny matrices gain nothing from threads; beside another busy process their barriers cost a factor of 40.
    torch.set_num_threads(1)
