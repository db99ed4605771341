"""One kernel compiled ahead of time, and what its machine code takes.

Bytes of shared memory, registers, spills; whether it has matrix instructions, also in a loop; the width of the widest
global load in bytes; and for the kernel of convolution and fc2 the instructions of its main loop per hidden element.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pvt_fast.kernels.chip import Chip

from .compilations import Compilation

# Of NVIDIA's machine code: wgmma, mma.sync, tcgen05; and of AMD's.
MATRIX_INSTRUCTION = re.compile(r"[HQ]GMMA|HMMA|UTC[HQ]MMA|v_mfma_")


def target_of(chip: Chip) -> GPUTarget:
    if chip.arch.startswith("sm_"):
        return GPUTarget("cuda", int(chip.arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", chip.arch, 64)


def compile_resources(made: Compilation) -> dict[str, Any]:
    """Compile for the chip; the resources of the result."""
    target = target_of(made.chip)
    constants = {(made.kernel.arg_names.index(name),): value for name, value in made.constants.items()}
    hints = {(place,): [["tt.divisibility", 16]] for place in made.aligned}
    source = ASTSource(made.kernel, made.signature, constants, hints)
    compiled = triton.compile(source, target=target, options=made.options)
    row = {"shared": compiled.metadata.shared}
    if target.backend == "hip":
        return row | _amd_resources(compiled.asm["amdgcn"])
    row |= _nvidia_resources(compiled.asm["cubin"])
    if made.kernel.__name__ == "dwconv_fc2_kernel":
        elements = math.prod(made.constants[name] for name in ("ROWS", "BLOCK_P", "BLOCK_H"))
        row["per_element"] = round(row["loop"] * 32 * compiled.metadata.num_warps / elements, 1)
    return row


def _nvidia_resources(cubin: bytes) -> dict[str, Any]:
    """Registers per thread, as spills the bytes of stack (these kernels have no other use for one), loops, loads."""
    tools = Path(triton.knobs.nvidia.cuobjdump.path).parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [tools / "cuobjdump", "-res-usage", "-sass", path]
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}  # it calls nvdisasm
        listing = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
    bodies = loops(listing)
    widths = [
        int(bits) // 8 for bits in re.findall(r"LDG(?:STS)?[A-Z0-9.]*?\.(?:BYPASS\.)?(?:LTC128B\.)?(64|128)\b", listing)
    ]
    return {
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "matrix": MATRIX_INSTRUCTION.search(listing) is not None,
        "matrix_in_loop": any(MATRIX_INSTRUCTION.match(op) for body in bodies for op in body),
        "load": max(widths, default=4),
        "loop": max(map(len, bodies), default=0),
    }


def loops(listing: str) -> list[list[str]]:
    """Operation codes of each loop in a listing of NVIDIA's machine code: from a backward branch's target to it."""
    pattern = r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)([^;]*);"
    code = [(int(address, 16), op, rest) for address, op, rest in re.findall(pattern, listing)]
    found = []
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            found.append([o for at, o, _ in code if int(target[1], 16) <= at <= address])
    return found


def _amd_resources(text: str) -> dict[str, Any]:
    """Vector registers per lane, as spills the bytes of scratch memory, matrix instructions, loads.

    Scalars that do not fit go to lanes of a vector register, which costs no memory.
    """
    loads = re.findall(r"(?:global|buffer)_load_dwordx([234])", text)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
        "spills": int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1]),
        "matrix": MATRIX_INSTRUCTION.search(text) is not None,
        "load": max((4 * int(words) for words in loads), default=4),
    }
