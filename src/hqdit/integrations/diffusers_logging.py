"""Keep the messages and bars of diffusers and transformers out of hqdit's command line."""

from __future__ import annotations

from diffusers.utils import logging


def silence_diffusers() -> None:
    """Errors only, and no progress bars; for a process that hqdit owns."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def silence_transformers() -> None:
    """The same for transformers, which is slow to import: call it where a pipeline with text encoders is loaded.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()  # type: ignore[no-untyped-call]
    of_transformers.disable_progress_bar()  # type: ignore[no-untyped-call]
