"""Compiles every kernel launch of the published networks for one GPU target, with no GPU; prints one JSON row each.

    python tests/triton_compile.py sm_90 bf16 pvt_v2_b0,pvt_v2_b2 [PART OF A KERNEL'S NAME]

The launches are those that the backend itself makes: the models run on meta tensors with `launch` replaced by a
recorder, so block sizes, argument types and alignment hints are what the launcher would use on such a device. A row
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

KIB = 1024
# Target and shared memory that one block may use there (CUDA programming guide, table of compute capabilities; the
# 64 KiB of LDS of a CDNA3 compute unit).
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPE_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
MATRIX_INSTRUCTION = re.compile(r"wgmma\.mma_async|tcgen05\.mma|\bmma\.sync|v_mfma_")
KERNEL_MODULES = [module for name, module in sys.modules.items() if name.startswith("pvt_fast.kernels.")]
# 49 and 256 keys: one key block, and a loop over key blocks
IMAGE_SIZES = (224, 512)


class Launch(NamedTuple):
    """One kernel as the launcher would specialise it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]  # places of the arguments that are multiples of 16
    options: dict[str, int]

    def key(self) -> str:
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.aligned} {self.options}"


def describe(kernel: Any, args: tuple, keywords: dict[str, Any]) -> Launch:
    """Types, constants and alignment hints that Triton's launcher derives from these arguments."""
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
    return Launch(kernel, signature, constants, tuple(aligned), options)


def record_launches(
    variants: list[str], dtype: torch.dtype, shared: int, batches: tuple[int, ...] = (8,)
) -> list[Launch]:
    """What the backend would launch for whole models, each distinct compilation once."""
    found: dict[str, Launch] = {}

    def record(kernel: Any, grid: tuple, tensor: Any, *args: Any, **keywords: Any) -> None:
        launch = describe(kernel, args, keywords)
        found.setdefault(launch.key(), launch)

    for module in KERNEL_MODULES:
        for name, replacement in (("launch", record), ("shared_limit", lambda device: shared)):
            if hasattr(module, name):
                setattr(module, name, replacement)
    for name in variants:
        with torch.device("meta"):
            model = pvt_fast.create_model(name).eval().to(dtype)
            for batch, size in itertools.product(batches, IMAGE_SIZES):
                with torch.no_grad():
                    tokens, _ = model._run_stages(torch.empty(batch, 3, size, size, dtype=dtype), kernels)
                    kernels.head(tokens, None)
    return list(found.values())


def compile_launch(launch: Launch, target: GPUTarget) -> dict[str, Any]:
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


def main(target_name: str, dtype_name: str, variants: str, part: str = "") -> None:
    target, shared = TARGETS[target_name]
    for launch in record_launches(variants.split(","), DTYPES[dtype_name], shared):
        if part in launch.kernel.__name__:
            row = {"target": target_name, "dtype": dtype_name, "limit": shared, **compile_launch(launch, target)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "TRITON_INTERPRET must be unset: nothing would be compiled"
    main(*sys.argv[1:])
