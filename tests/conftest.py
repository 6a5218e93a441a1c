"""What every test shares: how hypothesis searches."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadline and no complaint about slow data: a busy machine is not a failure. A failing example prints its blob.
settings.register_profile("hqdit", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hqdit")
