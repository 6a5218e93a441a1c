"""Post-training quantization of diffusion transformers to 4-bit floating point weights and activations.

An implementation of HQ-DiT (arXiv 2405.19751). Importing this package imports neither torch nor diffusers; the
public names below are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hqdit.calibration.recording import RecordedCalls
    from hqdit.calibration.samples import CalibrationSet
    from hqdit.errors import HQDiTError
    from hqdit.integrations.load_pipeline import load_pipeline
    from hqdit.integrations.pixel_pipeline import PixelDiTPipeline
    from hqdit.layers.linear import HQLinear
    from hqdit.pipeline.checkpoint import load, save
    from hqdit.pipeline.config import QuantizationConfig
    from hqdit.pipeline.quantize import quantize

_HOME_OF = {
    "CalibrationSet": "hqdit.calibration.samples",
    "HQDiTError": "hqdit.errors",
    "HQLinear": "hqdit.layers.linear",
    "PixelDiTPipeline": "hqdit.integrations.pixel_pipeline",
    "QuantizationConfig": "hqdit.pipeline.config",
    "load": "hqdit.pipeline.checkpoint",
    "load_pipeline": "hqdit.integrations.load_pipeline",
    "RecordedCalls": "hqdit.calibration.recording",
    "quantize": "hqdit.pipeline.quantize",
    "save": "hqdit.pipeline.checkpoint",
}

__all__ = [
    "CalibrationSet",
    "HQDiTError",
    "HQLinear",
    "PixelDiTPipeline",
    "QuantizationConfig",
    "RecordedCalls",
    "__version__",
    "load",
    "load_pipeline",
    "quantize",
    "save",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hqdit' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
