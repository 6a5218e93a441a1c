"""Whether Triton's kernels can run here, and on which tensors."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import torch
from torch import Tensor

from hqdit.errors import EnvironmentUnavailable

#: Set before Python starts, Triton runs kernels with NumPy, on tensors of any device: slow, for tests.
INTERPRETER_VARIABLE = "TRITON_INTERPRET"
#: Dtypes that the kernels read and write.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_interpreted() -> bool:
    """Whether kernels are interpreted instead of compiled."""
    return os.environ.get(INTERPRETER_VARIABLE, "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable_reason() -> str | None:
    """Why the kernels cannot run here, or None if they can; does not import Triton."""
    if find_spec("triton") is None:
        return "triton is not installed; it comes with CUDA builds of torch on Linux, or with pip install triton"
    if not torch.cuda.is_available() and not is_interpreted():
        return f"no CUDA device; {INTERPRETER_VARIABLE}=1 interprets its kernels on CPUs, slowly"
    return None


def require_device(operation: str, name: str, tensor: Tensor) -> torch.device:
    """The device of the argument called `name`, if kernels can run there.

    Raises:
        TypeError: no tensor.
        EnvironmentUnavailable: Triton is missing, or it is no CUDA device and nothing is interpreted.
    """
    if not isinstance(tensor, Tensor):  # torch lets None pass for a tensor
        raise TypeError(f"{operation} {name}: found {type(tensor).__name__}, needed a tensor")
    reason = unavailable_reason()
    if reason is None and tensor.device.type != "cuda" and not is_interpreted():
        reason = f"tensors on {tensor.device}"
    if reason:
        raise EnvironmentUnavailable(
            f"{operation}: found {reason}, needed Triton and tensors on a CUDA device. Fix: move the model to one, "
            f"choose another backend, or set {INTERPRETER_VARIABLE}=1 before Python starts to interpret the kernels"
        )
    return tensor.device


def device_name(device: torch.device) -> str:
    """What measured tiles of `device` are kept under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and not is_interpreted() else "interpreter"


def does_not_fit(error: Exception) -> bool:
    """Whether `error` says that a kernel needs more shared memory or registers than the device has."""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


# torch.compile cannot follow the look at the device, which does not change.
@torch.compiler.assume_constant_result
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on `device`; as much as it likes where it is interpreted."""
    if device.type != "cuda":
        return sys.maxsize
    properties = torch.cuda.get_device_properties(device)
    # What a program may ask for, where torch knows it; its type stubs do not.
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def as_bits(tensor: Tensor) -> Tensor:
    """bfloat16 as int16 bit patterns, which is how the kernels take it."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
