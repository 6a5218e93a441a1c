"""What was asked for and what happened: it goes with the model and into its config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hqdit.pipeline.config import QuantizationConfig


@dataclass
class QuantizationRecord:
    """What was asked for and what happened, kept on the model and written to its config.json.

    Attributes:
        config: the request.
        calibration: origin, samples and fingerprint of the calibration data; empty without calibration.
        rotation_error: relative change of the output by rotation alone, measured before quantizing.
        layers: name -> facts about that layer (statistic, method, damping, counts).
        parameters: number of parameters of the float model.
        dtypes: storage dtype of every unquantized tensor.
        shared: tensor name -> name of the equal tensor that is stored for it, in the file that the model was loaded
            from; None if it was not loaded from one.
    """

    config: QuantizationConfig
    calibration: dict[str, Any] = field(default_factory=dict)
    rotation_error: float | None = None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: int = 0
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    shared: dict[str, str] | None = field(default=None, compare=False)  # of a file, not of what happened
