"""`hqdit doctor`."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import hqdit
from hqdit.cli.options import Debug, JsonFile, require_json, say, write_json
from hqdit.errors import EnvironmentUnavailable

_LIBRARIES = ("torch", "diffusers", "accelerate", "safetensors", "huggingface_hub", "numpy", "matplotlib", "jinja2")
_EXTRAS = {"scikit-learn": "training the bundled models: pip install 'hqdit[train]'"}


def _state(name: str) -> str:
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"missing. Fix: pip install {name}"
    try:
        importlib.import_module(name.replace("-", "_").replace("scikit_learn", "sklearn"))
    except Exception as error:  # whatever a broken install raises is what the user needs to see
        return f"{found}, broken: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


def doctor(json_file: JsonFile = None, debug: Debug = False) -> None:
    """Say which backends exist here, and why the others do not."""
    require_json(json_file)
    libraries = {name: _state(name) for name in _LIBRARIES}
    extras = {name: _state(name) if _is_installed(name) else f"not installed ({use})" for name, use in _EXTRAS.items()}
    result: dict[str, Any] = {"hqdit": hqdit.__version__, "libraries": libraries, "extras": extras}
    say(f"hqdit {hqdit.__version__}")
    for name, state in {**libraries, **extras}.items():
        say(f"  {name}: {state}")
    broken = [name for name in _LIBRARIES if "missing" in libraries[name] or "broken" in libraries[name]]
    if broken:
        write_json(json_file, result | {"broken": broken})
        raise EnvironmentUnavailable(
            f"{', '.join(broken)}: not usable, needed for every command. Fix: reinstall with pip install hqdit"
        )

    import torch

    from hqdit.kernels import native_library
    from hqdit.kernels.selection import BACKENDS, default_backend
    from hqdit.pipeline.environment import describe_environment

    result["environment"] = describe_environment()
    result["backends"] = {name: backend.unavailable_reason() or "available" for name, backend in BACKENDS.items()}
    result["cuda"] = "available" if torch.cuda.is_available() else "no CUDA device, or a torch build without CUDA"
    say(f"  processor: {result['environment']['processor']}, {torch.get_num_threads()} threads")
    say(f"  cuda: {result['cuda']}")
    for name, state in result["backends"].items():
        say(f"  backend {name}: {state}")
    if native_library.unavailable_reason() is None:
        result["native"] = {
            "instruction_set": native_library.current_instruction_set(),
            "instruction_sets": native_library.instruction_sets(),
            "threads": "torch's" if native_library.shares_threads_with_torch() else "started for each call",
        }
        available = ", ".join(native_library.instruction_sets())
        say(f"  native kernels: {result['native']['instruction_set']} (of {available})")
        say(f"  native threads: {result['native']['threads']}")
    write_json(json_file, result)
    say(f"  default backend: {default_backend()}")


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
