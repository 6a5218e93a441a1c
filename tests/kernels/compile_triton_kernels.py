"""Compile the Triton kernels for GPUs that this machine need not have; run by test_triton_compiled.py.

`python compile_triton_kernels.py CAPABILITY CASE...` prints one JSON object a line: shared memory, registers and bytes
of stack of the kernel that the operation would launch, and how many products it fuses with sums. It is a process of
its own, because Triton's interpreter cannot be left again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from hqdit.formats.catalog import E2M1
from hqdit.kernels.preparation import input_tables
from hqdit.kernels.triton import library, product_operation, rotate_quantize_operation
from hqdit.quantizers.spec import ActivationSpec
from hqdit.transforms.rotation import plan_rotation

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16",
}  # fmt: skip


def product(tokens: int, width: int, channels: int, groups: int = 1, function: str | None = None) -> None:
    """bfloat16 outputs with bias, gate and residual."""
    product_operation.product(
        torch.zeros(tokens, width, dtype=torch.int8), torch.ones(tokens, 1),
        torch.zeros(channels, width // 2, dtype=torch.uint8), ["e2m1", "e3m0"],
        torch.zeros(channels, dtype=torch.uint8), torch.ones(channels, groups), torch.ones(channels), function,
        torch.ones(2, channels), torch.zeros(tokens, channels, dtype=torch.bfloat16), torch.bfloat16,
    )  # fmt: skip


def rotate_quantize(rotation: str, width: int, group_size: int | None = None, head_dim: int | None = None) -> None:
    """bfloat16 inputs behind LayerNorm and modulation."""
    spec = plan_rotation(rotation, width, "test", head_dim)
    tables = input_tables(ActivationSpec(E2M1), spec)
    assert tables is not None
    rotate_quantize_operation.rotate_quantize(
        torch.zeros(32, width, dtype=torch.bfloat16), torch.zeros(-(-width // 8), dtype=torch.uint8), tables.sylvester,
        tables.paley, tables.inner, tables.normalization, None, None, None, None, "absmax", 1.0,
        group_size or width, "e2m1", None, torch.ones(2, width), torch.ones(2, width), 1e-6,
    )  # fmt: skip


CASES: dict[str, Any] = {
    "product": lambda: product(512, 1152, 4608, function="gelu-tanh"),
    "product in groups": lambda: product(512, 1152, 1152, groups=32),
    "product of few rows": lambda: product(2, 1152, 6912),
    "full 1152": lambda: rotate_quantize("full", 1152),
    "full 4608": lambda: rotate_quantize("full", 4608),
    "block 128": lambda: rotate_quantize("block:128", 1152),
    "across heads": lambda: rotate_quantize("full", 1152, head_dim=72),
    "groups": lambda: rotate_quantize("full", 1152, group_size=36),
    "full 12288": lambda: rotate_quantize("full", 12288),
}


def compiled(capability: int) -> Any:
    """What stands for the launch of a kernel: its compilation for a device that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | options
        signature, constants, facts = {}, {}, {}
        for place, parameter in enumerate(self.params):
            name, value = parameter.name, values[parameter.name]
            is_one = type(value) is int and value == 1
            if parameter.is_constexpr or is_one:  # as a launch does it
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], facts[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32"
                if value % 16 == 0:
                    facts[(place,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        kernel = triton.compile(
            ASTSource(fn=self, signature=signature, constexprs=constants, attrs=facts),
            target=GPUTarget("cuda", capability, 32),
            options={name: value for name, value in options.items() if name not in self.arg_names},
        )
        fused = len(re.findall(r"\bfma\.rn\.f32", kernel.asm["ptx"]))
        print(json.dumps({"shared": kernel.metadata.shared, "fused": fused} | resources(kernel.asm["cubin"])))

    return run


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "stack": int(found[2])}


if __name__ == "__main__":
    for operation in (product_operation, rotate_quantize_operation):
        vars(operation)["require_device"] = lambda operation, name, tensor: tensor.device
    vars(product_operation)["device_name"] = lambda device: "compiled"
    for module in (library, product_operation):
        vars(module)["is_interpreted"] = lambda: False
    from triton.runtime.jit import JITFunction

    JITFunction.run = compiled(int(sys.argv[1]))
    for case in sys.argv[2:]:
        CASES[case]()
