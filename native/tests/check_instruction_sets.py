"""Look into the object files: wide instructions only where their flags are, and nothing there that linkers share.

`check_instruction_sets.py BUILD` reads the objects of the target hqdit_kernels below BUILD with objdump and nm. An
object compiled for a wide instruction set may define no weak symbol: of several equal inline functions the linker keeps
one, and a wide one would then run on every machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

#: Registers that give an instruction set away, and the instruction sets (by the end of the file's name) that have them.
REGISTERS = {"ymm": ("_avx2", "_avx512", "_amx"), "zmm": ("_avx512", "_amx"), "tmm": ("_amx",)}
#: The baseline of x86-64: what every other file has to get by with. VEX-encoded instructions begin with a v.
BASELINE = re.compile(r"^\s*[0-9a-f]+:\t(?:[0-9a-f]{2} )+\s*\t(v[a-z0-9]+|tdp\w+|tileload\w*)", re.MULTILINE)
HARMLESS = {"verr", "verw"}


def instruction_set_of(path: Path) -> str:
    stem = path.name.split(".")[0]
    return next((end for end in ("_avx2", "_avx512", "_amx") if stem.endswith(end)), "")


def faults(path: Path) -> list[str]:
    code = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True).stdout
    isa = instruction_set_of(path)
    found = [
        f"{path.name}: uses {register} registers"
        for register, allowed in REGISTERS.items()
        if isa not in allowed and re.search(rf"%{register}\d", code)
    ]
    if not isa and (wide := set(BASELINE.findall(code)) - HARMLESS):
        found.append(f"{path.name}: uses {', '.join(sorted(wide)[:5])}, beyond the baseline")
    if isa:
        symbols = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
        found += [
            f"{path.name}: weak symbol {line.split(maxsplit=2)[2]}"
            for line in symbols.splitlines()
            if re.match(r"[0-9a-f]+ [WVu] ", line)
        ]
    return found


def main() -> None:
    objects = sorted(Path(sys.argv[1]).rglob("hqdit_kernels.dir/**/*.o"))
    wide = {instruction_set_of(path) for path in objects}
    if not {"", "_avx2", "_avx512", "_amx"} <= wide:
        sys.exit(f"{sys.argv[1]}: found objects for {sorted(wide)}, needed one for each instruction set")
    found = [fault for path in objects for fault in faults(path)]
    print("\n".join(found) or f"{len(objects)} object files keep to their instruction sets")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
