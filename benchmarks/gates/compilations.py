"""Compiles every kernel launch of the published networks for one GPU target, with no GPU; prints one JSON row each.

    python tests/triton_compile.py sm_90 bf16 pvt_v2_b0,pvt_v2_b2 [PART OF A NAME [EVERY/NTH [candidates]]]

The launches are those that the backend itself makes: the models run on meta tensors and the launches are recorded, so
block sizes, argument types and alignment hints are what the launcher would use on such a device. A row
holds kernel, constants, bytes of shared memory, registers, spills; and from the machine code whether it has matrix
instructions, also in a loop, the width of the widest global load in bytes, and for the kernel of convolution and fc2
the instructions of its main loop per hidden element.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pvt_fast
from pvt_fast import kernels
from pvt_fast.kernels import tuning
from pvt_fast.kernels.config import Config
from pvt_fast.kernels.launch import Chip, Launch, recorded
from pvt_fast.kernels.tuning_records import Key

dwconv_mlp = sys.modules["pvt_fast.kernels.dwconv_mlp"]  # the package has the function under that name

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
TYPE_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
# Of NVIDIA's machine code: wgmma, mma.sync, tcgen05; and of AMD's.
MATRIX_INSTRUCTION = re.compile(r"[HQ]GMMA|HMMA|UTC[HQ]MMA|v_mfma_")
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
    options = {name: keywords[name] for name in ("num_warps", "num_stages", "maxnreg") if name in keywords}
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
    variants: list[str],
    dtype: torch.dtype,
    chip: Chip,
    batches: tuple[int, ...] = (8,),
    sizes: tuple[int, ...] = IMAGE_SIZES,
) -> list[Compilation]:
    """What the backend would compile for whole models on that chip, each once.

    In bf16 both with a hidden map in fp16, and as where the weights do not prove that it fits.
    """
    found: dict[str, Compilation] = {}
    for fits_half in {dtype == torch.bfloat16, False}:
        with mock.patch.object(dwconv_mlp, "_fits_half", lambda _, fits=fits_half: fits):
            for made in _compilations(variants, dtype, chip, batches, sizes):
                found.setdefault(made.key(), made)
    return list(found.values())


class Candidate(NamedTuple):
    """Stands for the tuner: always the n-th candidate, or the last."""

    n: int

    def known(self, key: Key, bucket: int, chip: Chip) -> Config:
        offered = tuning.candidates(key.kernel, dict(key.default), chip)
        return offered[min(self.n, len(offered) - 1)]


def candidate_compilations(variants: list[str], dtype: torch.dtype, chip: Chip) -> list[Compilation]:
    """What the autotuner would compile beside the defaults."""
    found: dict[str, Compilation] = {}
    for n in range(1, 1 + max(map(len, tuning._OVERRIDES.values()))):
        with tuning.use(Candidate(n)):
            found |= {made.key(): made for made in compilations(variants, dtype, chip)}
    defaults = {made.key() for made in compilations(variants, dtype, chip)}
    return [made for key, made in found.items() if key not in defaults]


def _compilations(
    variants: list[str], dtype: torch.dtype, chip: Chip, batches: tuple[int, ...], sizes: tuple[int, ...]
) -> Iterator[Compilation]:
    for name in variants:
        with torch.device("meta"):
            model = pvt_fast.create_model(name).eval().to(dtype)
            for batch, size in itertools.product(batches, sizes):
                ahead: list[Launch] = []
                with torch.no_grad(), recorded(chip, ahead) as launches:
                    tokens, _ = model._run_stages(torch.empty(batch, 3, size, size, dtype=dtype), kernels)
                    kernels.head(tokens, None)
                yield from map(compilation, launches + ahead)


def target_of(chip: Chip) -> GPUTarget:
    if chip.arch.startswith("sm_"):
        return GPUTarget("cuda", int(chip.arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", chip.arch, 64)


def compile_resources(made: Compilation, target: GPUTarget) -> dict[str, Any]:
    """Compile; the resources of the result."""
    constants = {(made.kernel.arg_names.index(name),): value for name, value in made.constants.items()}
    hints = {(place,): [["tt.divisibility", 16]] for place in made.aligned}
    source = ASTSource(made.kernel, made.signature, constants, hints)
    compiled = triton.compile(source, target=target, options=made.options)
    warps = compiled.metadata.num_warps
    row = {
        "kernel": made.kernel.__name__,
        "constants": {name: value for name, value in made.constants.items() if name.isupper()},
        "warps": warps,
        "stages": compiled.metadata.num_stages,
        "shared": compiled.metadata.shared,
    }
    if target.backend == "hip":
        return row | _amd_resources(compiled.asm["amdgcn"])
    row |= _nvidia_resources(compiled.asm["cubin"])
    if made.kernel.__name__ == "dwconv_fc2_kernel":
        elements = math.prod(made.constants[name] for name in ("ROWS", "BLOCK_P", "BLOCK_H"))
        row["per_element"] = round(row["loop"] * 32 * warps / elements, 1)
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


def main(arch: str, dtype_name: str, variants: str, part: str = "", share: str = "0/1", of: str = "defaults") -> None:
    chip, (first, step) = CHIPS[arch], map(int, share.split("/"))
    list_all = {"defaults": compilations, "candidates": candidate_compilations}[of]
    for made in list_all(variants.split(","), DTYPES[dtype_name], chip)[first::step]:
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
