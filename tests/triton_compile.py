"""Compiles every kernel launch of the published networks for one GPU target, with no GPU; prints one JSON row each.

    python tests/triton_compile.py sm_90 bf16 pvt_v2_b0,pvt_v2_b2 [PART OF A KERNEL'S NAME]

The launches are those that the backend itself makes: the models run on meta tensors and the launches are recorded, so
block sizes, argument types and alignment hints are what the launcher would use on such a device. A row
holds kernel, constants, bytes of shared memory, registers, spills and the number of matrix instructions.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pvt_fast
from pvt_fast import kernels
from pvt_fast.kernels.launch import Chip, Launch, recorded

KIB = 1024
# Target and shared memory that one block may use there (CUDA programming guide, table of compute capabilities; the
# 64 KiB of LDS of a CDNA3 compute unit).
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 163 * KIB, 108),  # A100
        Chip("sm_89", 99 * KIB, 128),  # RTX 4090
        Chip("sm_90", 227 * KIB, 132),  # H100, H200
        Chip("sm_100", 227 * KIB, 148),  # B200
        Chip("gfx942", 64 * KIB, 304),  # MI300X
    )
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPE_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
MATRIX_INSTRUCTION = re.compile(r"wgmma\.mma_async|tcgen05\.mma|\bmma\.sync|v_mfma_")
# 49 and 256 keys: one key block, and a loop over key blocks
IMAGE_SIZES = (224, 512)


class Compilation(NamedTuple):
    """One kernel as the launcher would specialise it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]  # places of the arguments that are multiples of 16
    options: dict[str, int]

    def key(self) -> str:
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.aligned} {self.options}"


def compilation(launch: Launch) -> Compilation:
    """Types, constants and alignment hints that Triton's launcher derives from these arguments."""
    kernel, _, args, keywords = launch
    options = {name: keywords[name] for name in ("num_warps", "num_stages") if name in keywords}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in keywords.items() if name not in options}
    signature, constants, aligned = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values.pop(parameter.name)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPE_NAMES[value.dtype]
            aligned.append(place)  # torch allocates at multiples of 64 bytes or more
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                aligned.append(place)
        else:
            signature[name] = "fp32"
    assert not values, f"{kernel.__name__}: arguments without a parameter: {sorted(values)}"
    return Compilation(kernel, signature, constants, tuple(aligned), options)


def compilations(
    variants: list[str], dtype: torch.dtype, chip: Chip, batches: tuple[int, ...] = (8,)
) -> list[Compilation]:
    """What the backend would compile for whole models on that chip, each once."""
    found: dict[str, Compilation] = {}
    for name in variants:
        with torch.device("meta"):
            model = pvt_fast.create_model(name).eval().to(dtype)
            for batch, size in itertools.product(batches, IMAGE_SIZES):
                with torch.no_grad(), recorded(chip) as launches:
                    tokens, _ = model._run_stages(torch.empty(batch, 3, size, size, dtype=dtype), kernels)
                    kernels.head(tokens, None)
                for launch in launches:
                    made = compilation(launch)
                    found.setdefault(made.key(), made)
    return list(found.values())


def target_of(chip: Chip) -> GPUTarget:
    if chip.arch.startswith("sm_"):
        return GPUTarget("cuda", int(chip.arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", chip.arch, 64)


def compile_resources(launch: Compilation, target: GPUTarget) -> dict[str, Any]:
    """Compile; the resources of the result."""
    constants = {(launch.kernel.arg_names.index(name),): value for name, value in launch.constants.items()}
    hints = {(place,): [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, constants, hints)
    compiled = triton.compile(source, target=target, options=launch.options)
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    resources = _cubin_resources(compiled.asm["cubin"]) if target.backend == "cuda" else _amd_resources(text)
    return {
        "kernel": launch.kernel.__name__,
        "constants": {name: value for name, value in launch.constants.items() if name.isupper()},
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "shared": compiled.metadata.shared,
        "matrix": len(MATRIX_INSTRUCTION.findall(text)),
        **resources,
    }


def _cubin_resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and as spills the bytes of stack: these kernels have no other use for one."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
    return {"registers": int(numbers["REG"]), "spills": int(numbers["STACK"]) + int(numbers["LOCAL"])}


def _amd_resources(text: str) -> dict[str, int]:
    """Vector registers per lane, and as spills the number of spilled registers."""
    count = {name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in AMD_COUNTS}
    return {"registers": count["vgpr_count"], "spills": count["vgpr_spill_count"] + count["sgpr_spill_count"]}


AMD_COUNTS = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")


def main(arch: str, dtype_name: str, variants: str, part: str = "") -> None:
    chip = CHIPS[arch]
    for made in compilations(variants.split(","), DTYPES[dtype_name], chip):
        if part in made.kernel.__name__:
            row = {
                "target": arch,
                "dtype": dtype_name,
                "limit": chip.shared,
                **compile_resources(made, target_of(chip)),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "TRITON_INTERPRET must be unset: nothing would be compiled"
    main(*sys.argv[1:])
