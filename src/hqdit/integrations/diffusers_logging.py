"""Keep diffusers' own messages and bars out of hqdit's command line."""

from __future__ import annotations

from diffusers.utils import logging


def silence_diffusers() -> None:
    """Errors only, and no progress bars; for a process that hqdit owns."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
