"""What the machine is, as far as speed depends on it; read without torch."""

import contextlib
import os
import platform
import re
from pathlib import Path

# The widest unit for matrix products, widest first; the last two have none for bfloat16, which is emulated there.
UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def processor(described: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, its units for matrix products where they are told, and its cores: `AMD EPYC, avx2, 2 cores`.

    described : the file in which Linux describes it; elsewhere the name is what Python knows.
    """
    text = ""
    with contextlib.suppress(OSError):
        text = described.read_text(encoding="utf-8")
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = re.search(r"flags\s*:\s*(.*)", text)
    unit = [unit for unit in UNITS if flags and unit in flags[1].split()][:1]
    return ", ".join([name[1] if name else platform.processor() or platform.machine(), *unit, f"{os.cpu_count()} cores"])
